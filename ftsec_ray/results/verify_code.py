"""Compares the code, packages and digests of an archive with this machine, and describes the
differences.

Code is compared by VERSION and by the hash in `versions.lock`: another VERSION means another
digest; other code under the same VERSION may mean other bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ftsec_ray.code_versions import code_hash
from ftsec_ray.identity import FORMAT_VERSION, digest, digests
from ftsec_ray.identity.lock import edited_files, read_lock
from ftsec_ray.lifecycle import kinds
from ftsec_ray.registry import ATTACKS, DEFENSES
from ftsec_ray.results.archive import (
    Archive,
    Code,
    CodeVersion,
    Manifest,
    PackedArtifact,
    PackedCell,
    PackedMethod,
    PackedPlan,
    PackedStage,
)
from ftsec_ray.results.archive_zip import ARTIFACTS
from ftsec_ray.results.pack import code_of_kind, code_of_method
from ftsec_ray.version import version_of

_SHOWN = 8
"""Maximum number of names in one sentence."""


def listed(names: Iterable[object]) -> str:
    """The first few names in one sentence."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def code_words(code: Code) -> Iterator[str]:
    """Stage kinds and methods whose VERSION or code differs here, and packages whose code differs
    from their lock.
    """
    if code.format != FORMAT_VERSION:
        yield (
            f"stages have format {code.format} there and {FORMAT_VERSION} here: every stage would"
            " run again"
        )
    under_one_version = []
    for name, there, here in _codes(code):
        if here is None:
            is_kind = name.endswith("stages")
            yield f"there are no {name} here" if is_kind else f"{name} is not installed here"
        elif here.version != there.version:
            has = "have" if name.endswith("stages") else "has"
            yield f"{name} {has} version {there.version} there and {here.version} here"
        elif here.is_outside != there.is_outside:
            inside = "there" if here.is_outside else "here"
            yield f"{name} is part of the package {inside} only"
        elif here != there:
            under_one_version.append(name)
    if under_one_version:
        yield f"the code of {listed(under_one_version)} differs under the same VERSION"
    if code.edited:
        yield f"the package there differed from its versions.lock: {listed(code.edited)}"
    edited = edited_files(read_lock())
    if edited:
        yield f"the package here differs from its versions.lock: {listed(edited)}"


def _codes(code: Code) -> Iterator[tuple[str, CodeVersion, CodeVersion | None]]:
    """Every stage kind and method by name, with its code there and here; None if it is missing
    here.
    """
    for kind, there in sorted(code.kinds.items()):
        yield f"{kind} stages", there, code_of_kind(kind) if kind in kinds() else None
    for name, there in sorted(code.methods.items()):
        kind, _, short = name.partition(" ")
        registry = {"attack": ATTACKS, "defense": DEFENSES}.get(kind)
        if registry is None or short not in registry.names():
            yield name, there, None
        else:
            yield name, there, code_of_method(name, registry.get(short))


def maker_words(archive: Archive, packed: PackedPlan) -> Iterator[str]:
    """Whether the artifacts were made by the code in the archive's manifest."""
    artifacts = archive.read(ARTIFACTS, dict[str, PackedArtifact]) or {}
    code = archive.manifest.code

    def expected(stage: PackedStage) -> str:
        acting = [(method["kind"], method["name"]) for method in stage.params.get("methods", ())]
        return code_hash(
            code.kinds[stage.kind].code,
            [(name, code.methods[f"{kind} {name}"].code) for kind, name in acting],
        )

    held = [stage for stage in packed.stages if stage.digest in artifacts]
    other = Counter(
        stage.kind for stage in held if or_none(expected, stage) != artifacts[stage.digest].code
    )
    if other:
        yield (
            f"{sum(other.values())} of {len(held)} artifacts were made by other code than that of"
            " the exporting package, under the same VERSION:"
            f" {listed(f'{kind} ({count})' for kind, count in other.most_common())}"
        )


def version_words(there: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Packages with another version here, or missing here; a package that is missing on both sides
    is no difference.

    Args:
        there: Package -> the versions with which stages ran, "" if it was not installed.
    """
    for name, known in sorted(there.items()):
        here = version_of(name)
        if list(known) != [here]:
            versions = ", ".join(known_version or "not installed" for known_version in known)
            yield f"{name} {versions} there, {here or 'not installed'} here"


def digest_words(manifest: Manifest, packed: PackedPlan) -> Iterator[str]:
    """Whether every digest in the archive follows from the packed content."""
    code = manifest.code

    def of_method(method: PackedMethod) -> str:
        own = code.methods[f"{method.kind} {method.name}"]
        return digests.of_method(
            method.kind,
            method.name,
            method.params,
            version=own.version,
            file=own.code if own.is_outside else None,
        )

    def of_stage(stage: PackedStage) -> str:
        acting = [of_method(PackedMethod(**method)) for method in stage.params.get("methods", ())]
        head = digests.of_head(
            stage.kind,
            code.kinds[stage.kind].version,
            acting,
            stage.params,
            form=code.format,
        )
        return digests.of_stage(head, stage.inputs, stage.seed)

    def of_cell(cell: PackedCell) -> str:
        recipe = digests.of_recipe([of_method(method) for method in (cell.attack, *cell.defenses)])
        return digests.of_cell(
            recipe,
            model=cell.model,
            task=cell.task,
            seed=cell.seed,
            answers=cell.answers,
            search=cell.search,
            trial=cell.trial,
        )

    wrong = [
        f"{stage.name} {stage.digest}"
        for stage in packed.stages
        if or_none(of_stage, stage) != stage.digest
    ]
    wrong += [f"cell {cell.cell}" for cell in packed.cells if or_none(of_cell, cell) != cell.cell]
    if wrong:
        yield f"{len(wrong)} digests do not follow from the packed content: {listed(wrong)}"
    if digest(sorted(cell.cell for cell in packed.cells)) != manifest.plan:
        yield "the packed cells are not those of the manifest's plan"


def or_none(make: Any, one: object) -> str | None:
    """The result of `make`, or None if the archive lacks something that it needs."""
    try:
        return str(make(one))
    except (KeyError, TypeError, AttributeError):
        return None
