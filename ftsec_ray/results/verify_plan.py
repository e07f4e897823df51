"""Describes how the plan in an archive differs from this machine's plan of the same sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest

from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.stage import cell_text
from ftsec_ray.results.archive import PackedCell, PackedPlan
from ftsec_ray.results.pack import packed_plan
from ftsec_ray.results.verify_code import listed


def plans_differ(packed: PackedPlan, plan: Plan) -> Iterator[str]:
    """How the plan here differs."""
    here = packed_plan(plan)
    if len(here.cells) != len(packed.cells):
        yield f"the sweep gives {len(here.cells)} cells here and {len(packed.cells)} there"
    other = {cell.cell for cell in packed.cells} - {cell.cell for cell in here.cells}
    if other:
        yield f"{len(other)} of {len(packed.cells)} cells have another digest here"
    changed = Counter(stage.name for stage in packed.stages if stage.digest not in plan.stages)
    if changed:
        yield (
            f"{sum(changed.values())} of {len(packed.stages)} stages have another digest here and"
            " would run again:"
            f" {listed(f'{name} ({count})' for name, count in changed.most_common())}"
        )
    elif not other and here != packed:
        yield "the plan here has the same digests in another order, or additional stages"
    changes = dict.fromkeys(
        change
        for pair in zip(packed.cells, here.cells, strict=False)
        for change in _cells_differ(*pair, packed, here)
    )
    if changes:
        yield f"parameters: {listed(changes)}"


def _cells_differ(
    there: PackedCell, here: PackedCell, packed: PackedPlan, mine: PackedPlan
) -> Iterator[str]:
    """How two cells at the same place of the grid differ in parameters and defaults; differences of
    code and inputs are reported elsewhere.
    """
    if there.cell == here.cell:
        return
    if there.names != here.names:
        yield f"cell {_cell_words(there)} is {_cell_words(here)} here"
        return
    theirs, ours = ({stage.digest: stage for stage in plan.stages} for plan in (packed, mine))
    for old, new in zip_longest(
        (theirs.get(digest) for digest in there.stages), (ours[digest] for digest in here.stages)
    ):
        if old is None or new is None or old.name != new.name:
            yield f"cell {_cell_words(there)} has other stages here"
            return
        yield from (f"{old.name}: {change}" for change in _leaves_differ(old.params, new.params))


def _cell_words(cell: PackedCell) -> str:
    defenses = [defense.name for defense in cell.defenses]
    return cell_text(cell.model, cell.task, cell.attack.name, defenses, cell.seed)


def _leaves_differ(there: object, here: object, place: str = "") -> Iterator[str]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            if key not in ("sha256", "content"):  # the bytes of inputs
                yield from _leaves_differ(
                    there.get(key), here.get(key), f"{place}.{key}" if place else str(key)
                )
    elif (
        isinstance(there, (list, tuple))
        and isinstance(here, (list, tuple))
        and len(there) == len(here)
    ):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from _leaves_differ(*pair, f"{place}[{index}]")
    elif there != here:
        yield f"{place} {there!r} there, {here!r} here"


def unpinned(packed: PackedPlan) -> Iterator[str]:
    """Models and rows of the Hugging Face hub that the sweep does not pin to a revision."""
    names: dict[str, None] = {}
    for stage in packed.stages:
        if (
            stage.kind == "source"
            and stage.params.get("source") == "hub"
            and not stage.params.get("revision")
        ):
            names[f"model {stage.params.get('id')}"] = None
        if stage.kind == "task":
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # a hand-made plan
                names.update(
                    {
                        f"rows {source['dataset']}": None
                        for _, source in stage.params["task"]["splits"]
                        if source["dataset"] and not source["revision"]
                    }
                )
    if names:
        yield f"not pinned to a revision, so that they may differ here: {listed(names)}"
