"""What of an archive would differ here, in words: the sweep is planned again, and code, packages,
inputs and tables are compared.

Nothing is run. Equal digests mean that this machine would do the same work; whether it gave the
same bytes is told for the artifacts that a store here holds as well.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import DataError, SpecError, SpecFaults
from ftsec_ray.identity import content_hash
from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.search_rounds import OutcomeLookup, nothing_known
from ftsec_ray.results.archive import (
    Archive,
    Manifest,
    PackedArtifact,
    PackedCell,
    PackedPlan,
)
from ftsec_ray.results.archive_zip import ARTIFACTS, PLAN
from ftsec_ray.results.pack import located, packed_plan
from ftsec_ray.results.read import Results
from ftsec_ray.results.search_results import look_at_results
from ftsec_ray.results.verify_code import (
    code_words,
    digest_words,
    listed,
    maker_words,
    version_words,
)

if TYPE_CHECKING:
    from ftsec_ray.store.artifact_store import Store

Topic = str
"""archive | tables | versions | code | inputs | plan | artifacts"""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a look at an archive found."""

    sweep: str
    cells: int
    stages: int
    differences: tuple[tuple[Topic, str], ...]
    """(topic, what differs) in words; empty when everything is equal here."""
    notes: tuple[str, ...]
    """What could not be compared."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing would differ here."""
        return not self.differences


def verify_archive(path: Path, *, base: Path, store: Store | None) -> Verification:
    """Compare an archive with this machine; ArchiveError when the file is none.

    Args:
        path: The archive.
        base: Folder at which the relative paths of its sweep start here.
        store: Where artifacts of the same stages may be; None compares none.
    """
    archive = Archive.open(path)
    manifest, packed = archive.manifest, archive.read(PLAN, PackedPlan)
    found: list[tuple[Topic, str]] = [
        ("archive" if not name.startswith("results/") else "tables", f"{name}: {why}")
        for name, why in archive.damage.items()
    ]
    found += [("versions", one) for one in version_words(manifest.versions)]
    found += [("code", one) for one in code_words(manifest.code)]
    found += [("inputs", one) for one in _input_words(manifest, base)]
    notes: list[str] = []
    if packed is None:
        if PLAN not in archive.damage:
            found.append(("archive", f"{PLAN}: not a plan as ftsec writes it"))
        notes.append("the plan is damaged: digests and tables were not compared")
    else:
        found += [("archive", one) for one in digest_words(manifest, packed)]
        found += [("code", one) for one in maker_words(archive, packed)]
        found += [("tables", one) for one in _table_words(archive, packed)]
        found += [("plan", one) for one in _plan_words(archive, packed, base)]
        notes += list(_unpinned(packed))
        found += [("artifacts", one) for one in _artifact_words(archive, packed, store, notes)]
    return Verification(
        sweep=_clean(manifest.sweep),
        cells=len(packed.cells) if packed else 0,
        stages=len(packed.stages) if packed else 0,
        differences=tuple((topic, _clean(what)) for topic, what in found),
        notes=tuple(map(_clean, notes)),
    )


def _clean(text: str) -> str:
    """A text of the archive without what would steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _input_words(manifest: Manifest, base: Path) -> Iterator[str]:
    for one in manifest.inputs:
        try:
            path = located(one.path, base)
            # No other folder is a model, and none is walked through because an archive names it.
            here = (
                content_hash(path) if path.is_file() or (path / "config.json").is_file() else None
            )
        except (OSError, RuntimeError, ValueError) as error:
            yield f"{one.what}: {one.path} cannot be read here: {error}"
            continue
        if here is None:
            yield f"{one.what}: nothing usable at {one.path} here (looked for {path})"
        elif here != one.sha256:
            yield f"{one.what}: {one.path} has other bytes here"


# The plan.


def _plan_words(archive: Archive, packed: PackedPlan, base: Path) -> Iterator[str]:
    text = archive.text(archive.manifest.file)
    if text is None:
        return
    with tempfile.TemporaryDirectory(prefix="ftsec-verify-") as scratch:
        file = Path(scratch) / Path(archive.manifest.file).name
        file.write_text(text, encoding="utf-8")
        try:
            spec = load_sweep(file, base=base)
            plan = build_plan(
                spec, _known(archive, Path(scratch) / "results") if spec.searches else nothing_known
            )
        except SpecError as error:
            faults = error.faults if isinstance(error, SpecFaults) else (("sweep", error),)
            yield from (
                f"cannot be planned here: {place}: {fault.what}, {fault.got!r}"
                for place, fault in faults
            )
            return
        except OSError as error:
            yield f"cannot be planned here: {error}"
            return
    yield from _plans_differ(packed, plan)


def _known(archive: Archive, folder: Path) -> OutcomeLookup:
    """What the archive's own tables tell of the trials of searches, so that a searched sweep is
    planned to its end without a store.
    """
    try:
        return look_at_results(Results.open(archive.unpack("results", folder)))
    except DataError:  # told with the tables
        return nothing_known


def _plans_differ(packed: PackedPlan, plan: Plan) -> Iterator[str]:
    here = packed_plan(plan)
    if len(here.cells) != len(packed.cells):
        yield f"the sweep gives {len(here.cells)} cells here and {len(packed.cells)} there"
    other = {cell.cell for cell in packed.cells} - {cell.cell for cell in here.cells}
    if other:
        yield f"{len(other)} of {len(packed.cells)} cells have another digest here"
    anew = Counter(stage.name for stage in packed.stages if stage.digest not in plan.stages)
    if anew:
        yield (
            f"{sum(anew.values())} of {len(packed.stages)} stages have another digest here and"
            f" would run anew: {listed(f'{name} ({count})' for name, count in anew.most_common())}"
        )
    elif not other and here != packed:
        yield "the plan here has the same digests in another order, or further stages"
    changes = dict.fromkeys(
        one
        for pair in zip(packed.cells, here.cells, strict=False)
        for one in _cells_differ(*pair, packed, here)
    )
    if changes:
        yield f"parameters: {listed(changes)}"


def _cells_differ(
    there: PackedCell, here: PackedCell, packed: PackedPlan, mine: PackedPlan
) -> Iterator[str]:
    """How two cells at one place of the grid differ in what the sweep and its defaults say; code
    and inputs are told elsewhere.
    """
    if there.cell == here.cell:
        return
    if there.names != here.names:
        yield f"cell {_cell_words(there)} is {_cell_words(here)} here"
        return
    theirs, ours = ({stage.digest: stage for stage in one.stages} for one in (packed, mine))
    for old, new in zip_longest(
        (theirs.get(one) for one in there.stages), (ours[one] for one in here.stages)
    ):
        if old is None or new is None or old.name != new.name:
            yield f"cell {_cell_words(there)} has other stages here"
            return
        yield from (f"{old.name}: {one}" for one in _leaves_differ(old.params, new.params))


def _cell_words(cell: PackedCell) -> str:
    return (
        f"{cell.model} x {cell.task} x {cell.attack.name} x"
        f" {'+'.join(one.name for one in cell.defenses) or 'none'}, seed {cell.seed}"
    )


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


def _unpinned(packed: PackedPlan) -> Iterator[str]:
    """Models and rows of the hub that the sweep pins to no revision."""
    found: dict[str, None] = {}
    for stage in packed.stages:
        if (
            stage.kind == "source"
            and stage.params.get("source") == "hub"
            and not stage.params.get("revision")
        ):
            found[f"model {stage.params.get('id')}"] = None
        if stage.kind == "task":
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # a plan made by hand
                found.update(
                    {
                        f"rows {source['dataset']}": None
                        for _, source in stage.params["task"]["splits"]
                        if source["dataset"] and not source["revision"]
                    }
                )
    if found:
        yield f"not pinned to a revision, so they may be others here: {listed(found)}"


# Tables and artifacts.


def _table_words(archive: Archive, packed: PackedPlan) -> Iterator[str]:
    """Whether the tables open, and are of the plan."""
    with tempfile.TemporaryDirectory(prefix="ftsec-verify-") as scratch:
        try:
            results = Results.open(archive.unpack("results", Path(scratch)))
        except DataError as fault:
            if not any(name.startswith("results/") for name in archive.damage):  # told already
                yield f"they cannot be opened: {fault.what.replace(scratch, 'results')}"
            return
        if results.meta.get("plan") != archive.manifest.plan:
            yield "they are of another plan than the archive"
        for name, column, wanted in (
            ("cells", "cell", {cell.cell for cell in packed.cells}),
            ("stages", "digest", {stage.digest for stage in packed.stages}),
        ):
            if set(results.table(name, trials=True)[column].to_pylist()) != wanted:
                yield f"the table {name} does not hold the {name} of the plan"


def _artifact_words(
    archive: Archive, packed: PackedPlan, store: Store | None, notes: list[str]
) -> Iterator[str]:
    """Artifacts that the store here holds with other bytes; what is not compared is noted."""
    artifacts = archive.read(ARTIFACTS, dict[str, PackedArtifact]) or {}
    there = {one: artifact.files for one, artifact in artifacts.items()}
    named = {stage.digest: stage.name for stage in packed.stages}
    both = set() if store is None else store.done() & set(named) & set(there)
    if store is None or not both:
        notes.append("no store here holds an artifact of its stages: bytes were not compared")
        return
    records = store.records(both)
    other = {
        one: (
            [name for name, held in record["files"].items() if there[one].get(name) != held]
            or sorted(set(there[one]) - set(record["files"]))
        )
        for one, record in records.items()
        if record["files"] != there[one]
    }
    notes.append(
        f"{len(records) - len(other)} of {len(records)} artifacts that the store here holds too"
        " have the same bytes"
    )
    if other:
        files = dict.fromkeys(
            f"{named[one]}: {name}"
            for one in sorted(other, key=lambda one: named[one])
            for name in other[one]
        )
        yield (
            f"{len(other)} of {len(records)} artifacts have other bytes in the store here:"
            f" {listed(files)}"
        )
