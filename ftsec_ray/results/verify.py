"""What of an archive would differ here, in words: the sweep is planned again, its metrics,
comparisons and report are made again, and code, packages and inputs are compared.

Nothing is run, and no file is opened that the archive names outside of one folder. Equal digests
mean that this machine would do the same work; whether it gave the same bytes is told for the
artifacts that a store here holds as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.limits import FILE_BYTES
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.config.yaml_text import read_yaml
from ftsec_ray.errors import SpecError, SpecFaults
from ftsec_ray.identity import content_hash
from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.search_rounds import nothing_known
from ftsec_ray.results.archive import Archive, Manifest, PackedArtifact, PackedPlan
from ftsec_ray.results.archive_signature import look_at_signature
from ftsec_ray.results.archive_zip import ARTIFACTS, PLAN
from ftsec_ray.results.pack import located
from ftsec_ray.results.read import Results
from ftsec_ray.results.search_results import look_at_results
from ftsec_ray.results.verify_code import (
    code_words,
    digest_words,
    listed,
    maker_words,
    version_words,
)
from ftsec_ray.results.verify_findings import Findings
from ftsec_ray.results.verify_plan import plans_differ, unpinned
from ftsec_ray.results.verify_tables import Render, look_at_tables, open_tables
from ftsec_ray.schedule.upload import texts_in

if TYPE_CHECKING:
    from ftsec_ray.store.artifact_store import Store

Topic = str
"""archive | signature | versions | code | inputs | plan | tables | metrics | comparisons | searches
| report | artifacts"""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a look at an archive found. Its texts may quote the archive as it is: they are for no
    terminal before `shown_text` has been through them.
    """

    sweep: str
    cells: int
    stages: int
    differences: tuple[tuple[Topic, str], ...]
    """(topic, what differs) in words; empty when all that was checked agrees."""
    checked: tuple[str, ...]
    """What was made again here and agrees."""
    unchecked: tuple[str, ...]
    """What nothing here can tell."""
    signature: str
    """Who signed it."""
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether all that was checked agrees; `unchecked` says what was not."""
        return not self.differences


def verify_archive(
    path: Path,
    *,
    base: Path,
    store: Store | None,
    render: Render,
    inside: Path | None = None,
    signer: Path | None = None,
) -> Verification:
    """Compare an archive with this machine; ArchiveError when the file is none.

    Args:
        path: The archive.
        base: Folder at which the relative paths of its sweep start here.
        store: Where artifacts of the same stages may be; None compares none.
        render: Makes the page of some results.
        inside: Folder out of which no file is opened because the archive names it; None: `base`.
        signer: File with the public keys of those who may have signed it; None asks for none.
    """
    archive = Archive.open(path)
    manifest, packed = archive.manifest, archive.read(PLAN, PackedPlan)
    found = Findings()
    found.add_each(
        ("archive" if not name.startswith("results/") else "tables", f"{name}: {why}")
        for name, why in archive.damage.items()
    )
    signature = look_at_signature(found, archive, signer)
    found.add("versions", version_words(manifest.versions))
    found.add("code", code_words(manifest.code))
    inside = (base if inside is None else inside).resolve()
    found.add("inputs", _input_words(manifest, base, inside))
    notes: list[str] = []
    if packed is None:
        if PLAN not in archive.damage:
            found.add("archive", [f"{PLAN}: not a plan as ftsec writes it"])
        found.unchecked.append("plan, digests, tables and report: the plan is damaged")
    else:
        _look_at_packed(found, archive, packed, _Here(base, inside, store, render, notes))
    return Verification(
        sweep=manifest.sweep,
        cells=len(packed.cells) if packed else 0,
        stages=len(packed.stages) if packed else 0,
        differences=tuple(found.differences),
        checked=tuple(found.checked),
        unchecked=tuple(found.unchecked),
        signature=signature,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Here:
    """What this machine has to compare an archive with."""

    base: Path
    inside: Path
    store: Store | None
    render: Render
    notes: list[str]


def _look_at_packed(found: Findings, archive: Archive, packed: PackedPlan, here: _Here) -> None:
    manifest = archive.manifest
    with found.hostile("archive", PLAN):
        words = list(digest_words(manifest, packed))
        found.add("archive", words)
        if not words:
            found.checked.append(
                f"digests of {len(packed.cells)} cells and {len(packed.stages)} stages"
            )
        found.add("code", maker_words(archive, packed))
    with tempfile.TemporaryDirectory(prefix="ftsec-verify-") as scratch:
        tables = Path(scratch) / "results"
        tables.mkdir()
        results, plan = open_tables(found, archive, tables), None
        with found.hostile("plan", "the plan here"):
            plan = _plan_here(found, archive, here, Path(scratch), results)
        if plan is not None:
            words = list(plans_differ(packed, plan))
            found.add("plan", words)
            plan = None if words or plan.digest != manifest.plan else plan
        if results is not None:
            look_at_tables(found, archive, packed, plan, results, here.render)
    with found.hostile("archive", PLAN):
        here.notes.extend(unpinned(packed))
    with found.hostile("artifacts", ARTIFACTS):
        found.add("artifacts", _artifact_words(archive, packed, here.store, found, here.notes))


def _input_words(manifest: Manifest, base: Path, inside: Path) -> Iterator[str]:
    for one in manifest.inputs:
        try:
            path = located(one.path, base)
            fault = _place_fault(path, inside)
            if fault is not None:
                yield f"{one.what}: {one.path} {fault}"
                continue
            # No other folder is a model, and none is walked through because an archive names it.
            here = (
                content_hash(path) if path.is_file() or (path / "config.json").is_file() else None
            )
        except (OSError, RuntimeError, ValueError, SpecError) as error:
            told = getattr(error, "what", error)
            yield f"{one.what}: {one.path} cannot be read here: {told}"
            continue
        if here is None:
            yield f"{one.what}: nothing usable at {one.path} here (looked for {path})"
        elif here != one.sha256:
            yield f"{one.what}: {one.path} has other bytes here"


def _place_fault(path: Path, inside: Path) -> str | None:
    """Why a path, its links followed, is not opened because an archive names it."""
    if not path.is_relative_to(inside):
        return (
            f"is not opened: {path} lies outside of {inside} (--inside DIR allows another folder)"
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        return "is not opened: neither a plain file nor a folder"
    return None


# The plan.


def _plan_here(
    found: Findings, archive: Archive, here: _Here, scratch: Path, results: Results | None
) -> Plan | None:
    """The plan that this machine makes of the archive's sweep; None where it makes none."""
    text = archive.text(archive.manifest.file)
    if text is None:
        return None
    file = scratch / Path(archive.manifest.file).name
    file.write_text(text, encoding="utf-8")
    is_read = FILE_BYTES.exceeded_by(len(text)) is None
    outside = list(_outside(text, here.base, here.inside)) if is_read else []
    if outside:
        found.add("plan", [f"not made here: the sweep names {one}" for one in outside])
        return None
    try:
        spec = load_sweep(file, base=here.base)
        # The archive's own tables tell of the trials of searches: no store is needed to plan a
        # searched sweep to its end.
        known = look_at_results(results) if spec.searches and results else nothing_known
        return build_plan(spec, known)
    except SpecError as error:
        faults = error.faults if isinstance(error, SpecFaults) else (("sweep", error),)
        found.add(
            "plan",
            [
                f"cannot be planned here: {place}: {fault.what}, {fault.got!r}"
                for place, fault in faults
            ],
        )
    except OSError as error:
        found.add("plan", [f"cannot be planned here: {error}"])
    return None


def _outside(text: str, base: Path, inside: Path) -> Iterator[str]:
    """What a sweep names that is on this machine and may not be opened for an archive."""
    for one in dict.fromkeys(texts_in(read_yaml(text, Faults("sweep")))):
        with suppress(OSError, RuntimeError, ValueError):  # what no system call takes is no path
            path = located(one, base)
            fault = _place_fault(path, inside) if path.exists() else None
            if fault is not None:
                yield f"{one}, which {fault}"


# Artifacts.


def _artifact_words(
    archive: Archive,
    packed: PackedPlan,
    store: Store | None,
    found: Findings,
    notes: list[str],
) -> Iterator[str]:
    """Artifacts that the store here holds with other bytes; what is not compared is noted."""
    artifacts = archive.read(ARTIFACTS, dict[str, PackedArtifact]) or {}
    there = {one: artifact.files for one, artifact in artifacts.items()}
    named = {stage.digest: stage.name for stage in packed.stages}
    both = set() if store is None else store.done() & set(named) & set(there)
    if store is None or not both:
        found.unchecked.append("artifacts: no store here holds one of these stages")
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
