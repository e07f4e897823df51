"""What the methods of a sweep need of the structure of its models: refused here where the
`config.json` of a local model tells, and handed to the stage that loads the model for all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.errors import SpecError
from ftsec_ray.models.families import PACKED_ROWS, lacking
from ftsec_ray.plan.origin import known_config
from ftsec_ray.plan.stage import Cell, Stage
from ftsec_ray.registry import name_of

Needs = dict[str, frozenset[str]]
"""`attack badedit`, `training.batching: packed`, ... -> what it needs."""


def structure_needs(spec: SweepSpec, cells: Iterable[Cell]) -> dict[str, Needs]:
    """Model -> who needs what of it, over the cells that no rule leaves out."""
    found: dict[str, Needs] = {}
    for cell in cells:
        for method in (cell.attack, *cell.defenses):
            if method.STRUCTURE:
                needs = found.setdefault(cell.model.name, {})
                needs[f"{method.KIND} {name_of(method)}"] = method.STRUCTURE
        training = cell.searched.training if cell.searched else spec.training
        if training.batching == "packed":
            needs = found.setdefault(cell.model.name, {})
            needs["training.batching: packed"] = frozenset({PACKED_ROWS})
    return found


def structure_faults(
    cells: Iterable[Cell], needs: Mapping[str, Needs]
) -> dict[tuple[str, ...], tuple[str, SpecError]]:
    """One for every method that cannot work on a model whose class is known."""
    faults: dict[tuple[str, ...], tuple[str, SpecError]] = {}
    for model in {cell.model.name: cell.model for cell in cells}.values():
        if model.name not in needs:
            continue
        missing = lacking(known_config(model.source))
        for who, wanted in needs[model.name].items():
            for need in sorted(wanted & missing.keys()):
                kind, _, name = who.partition(" ")
                is_method = kind in ("attack", "defense")
                rule = f"exclude {{model: {model.name}, {kind}: {name}}}"
                faults["structure", model.name, who, need] = (
                    who,
                    SpecError(
                        f"{who} cannot work on model {model.name!r}: {missing[need]}",
                        model.source,
                        "a method or setting that the class of the model allows",
                        rule if is_method else "batching: length_grouped | shuffled",
                    ),
                )
    return faults


def with_structure(
    stages: Mapping[str, Stage], cells: Iterable[Cell], needs: Mapping[str, Needs]
) -> dict[str, Stage]:
    """The stages, each that loads a model knowing what the methods need of it."""
    known = dict(stages)
    # all cells of a model begin with one source, which models may share
    for name, cell in {cell.model.name: cell for cell in cells}.items():
        wanted = {who: sorted(need) for who, need in needs.get(name, {}).items()}
        digest = next((d for d in cell.stages if stages[d].kind == "source"), None)
        if wanted and digest is not None:
            where = known[digest].where
            structure = {**where.get("structure", {}), **wanted}
            known[digest] = replace(known[digest], where={**where, "structure": structure})
    return known
