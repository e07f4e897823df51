"""Compares an archive with this machine: plans its sweep again, recomputes its metrics, comparisons
and report, and compares code, packages and inputs.

Nothing runs, and no file that the archive names outside one folder is opened. Equal digests mean
that this machine would do the same work. Whether the work gave the same bytes is compared for those
artifacts that a local store holds as well.
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
    """The result of verifying an archive. Its texts may quote the archive: pass them through
    `shown_text` before printing.
    """

    sweep: str
    cells: int
    stages: int
    differences: tuple[tuple[Topic, str], ...]
    """(topic, description) of each difference; empty if everything that was checked agrees."""
    checked: tuple[str, ...]
    """What was recomputed here and agrees."""
    unchecked: tuple[str, ...]
    """What cannot be checked here."""
    signature: str
    """The signer."""
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether everything that was checked agrees; `unchecked` lists the rest."""
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
    """Compare an archive with this machine; ArchiveError if the file is not an archive.

    Args:
        path: The archive.
        base: Folder here for the relative paths of its sweep.
        store: Store that may hold artifacts of the same stages; None: compare none.
        render: Makes the report page of results.
        inside: Folder outside which no file is opened because the archive names it; None: `base`.
        signer: File with the public keys of allowed signers; None: any signer.
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
            found.add("archive", [f"{PLAN}: not a plan written by ftsec"])
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
    """What this machine compares an archive with."""

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
    for entry in manifest.inputs:
        try:
            path = located(entry.path, base)
            fault = _place_fault(path, inside)
            if fault is not None:
                yield f"{entry.what}: {entry.path} {fault}"
                continue
            # Another folder is not a model, and is not searched because an archive names it.
            here = (
                content_hash(path) if path.is_file() or (path / "config.json").is_file() else None
            )
        except (OSError, RuntimeError, ValueError, SpecError) as error:
            reason = getattr(error, "what", error)
            yield f"{entry.what}: {entry.path} cannot be read here: {reason}"
            continue
        if here is None:
            yield f"{entry.what}: no usable file at {entry.path} here (searched {path})"
        elif here != entry.sha256:
            yield f"{entry.what}: {entry.path} has other bytes here"


def _place_fault(path: Path, inside: Path) -> str | None:
    """Why a path, with its links resolved, is not opened for an archive."""
    if not path.is_relative_to(inside):
        return f"is not opened: {path} is outside {inside} (allow another folder with --inside DIR)"
    if path.exists() and not (path.is_file() or path.is_dir()):
        return "is not opened: it is neither a regular file nor a folder"
    return None


# The plan.


def _plan_here(
    found: Findings, archive: Archive, here: _Here, scratch: Path, results: Results | None
) -> Plan | None:
    """The plan that this machine makes of the archive's sweep; None if it cannot."""
    text = archive.text(archive.manifest.file)
    if text is None:
        return None
    file = scratch / Path(archive.manifest.file).name
    file.write_text(text, encoding="utf-8")
    is_read = FILE_BYTES.exceeded_by(len(text)) is None
    outside = list(_outside(text, here.base, here.inside)) if is_read else []
    if outside:
        found.add("plan", [f"not made here: the sweep names {name}" for name in outside])
        return None
    try:
        spec = load_sweep(file, base=here.base)
        # The archive's own tables hold the trials of searches, so that a sweep with searches can be
        # planned completely without a store.
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
    """Files on this machine that a sweep names and that may not be opened for an archive."""
    for name in dict.fromkeys(texts_in(read_yaml(text, Faults("sweep")))):
        with suppress(OSError, RuntimeError, ValueError):  # an invalid path is not a path
            path = located(name, base)
            fault = _place_fault(path, inside) if path.exists() else None
            if fault is not None:
                yield f"{name}, which {fault}"


# Artifacts.


def _artifact_words(
    archive: Archive,
    packed: PackedPlan,
    store: Store | None,
    found: Findings,
    notes: list[str],
) -> Iterator[str]:
    """Artifacts with other bytes in the local store; what is not compared is recorded."""
    artifacts = archive.read(ARTIFACTS, dict[str, PackedArtifact]) or {}
    there = {digest: artifact.files for digest, artifact in artifacts.items()}
    named = {stage.digest: stage.name for stage in packed.stages}
    both = set() if store is None else store.done() & set(named) & set(there)
    if store is None or not both:
        found.unchecked.append("artifacts: no local store holds one of these stages")
        return
    records = store.records(both)
    other = {
        digest: (
            [name for name, held in record["files"].items() if there[digest].get(name) != held]
            or sorted(set(there[digest]) - set(record["files"]))
        )
        for digest, record in records.items()
        if record["files"] != there[digest]
    }
    notes.append(
        f"{len(records) - len(other)} of {len(records)} artifacts that the local store also holds"
        " have the same bytes"
    )
    if other:
        files = dict.fromkeys(
            f"{named[digest]}: {name}"
            for digest in sorted(other, key=lambda digest: named[digest])
            for name in other[digest]
        )
        yield (
            f"{len(other)} of {len(records)} artifacts have other bytes in the local store:"
            f" {listed(files)}"
        )
