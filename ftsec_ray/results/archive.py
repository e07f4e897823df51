"""One archive of a finished sweep: what somebody needs who wants to repeat its numbers, or to see
what would differ.

    manifest.json                    plan, versions, code and local inputs by hash, and the checksum
    of every other file plan.json                        cells and stages with all that decides
    their digests artifacts.json                   checksums of the artifacts, as their records in
    the store told them sweep/<file>                     the sweep as its author wrote it
    results/report.html, results/run.json, results/<table>/part-0.parquet

A zip without time stamps, its names sorted: the same content gives the same bytes. It holds no
weights and no rows of the user. Checksums tell damage and not forgery: sign the archive, or publish
its own SHA-256 beside a number. `pack` writes them.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.identity.content import stream_sha256
from ftsec_ray.results.archive_limits import ArchiveError, check_json
from ftsec_ray.results.archive_zip import (
    BROKEN,
    FIX,
    MANIFEST,
    SIGNATURE,
    name_fault,
    opened,
    read,
)
from ftsec_ray.store.record import listing_fault

T = TypeVar("T")
FORMAT = 2
"""Raise when an older package could not read the archive any more. 2: VERSIONs and hashes of the
lock in place of hashed source.
"""
CHUNK = 1 << 20
"""Bytes copied at a time."""


@dataclass(frozen=True, kw_only=True)
class CodeVersion:
    """The code of a stage kind or a method."""

    version: int
    code: str | None
    """Its hash in versions.lock; of a method from outside of the package the token hash of its
    file.
    """
    is_outside: bool = False
    """Whether it is of no lock: then the hash is part of its digests, besides the version."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code behind the digests of a plan."""

    format: int
    """Of stages: see identity.FORMAT_VERSION."""
    kinds: dict[str, CodeVersion]
    """Kind of stage -> its code."""
    methods: dict[str, CodeVersion]
    """`attack badnets` -> its code."""
    edited: list[str]
    """Files of the exporting package that were not as its versions.lock says."""


@dataclass(frozen=True, kw_only=True)
class PackedArtifact:
    """What the record of an artifact says of it."""

    files: dict[str, dict[str, Any]]
    """Name -> size and checksum."""
    code: str | None
    """Hash of the code that made it: see code_versions.stage_code."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file or folder that the sweep names by path; it is not packed."""

    what: str
    path: str
    """As the sweep names it."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an archive says of itself."""

    format: int
    sweep: str
    file: str
    """Name of the sweep file among the files."""
    plan: str
    versions: dict[str, list[str]]
    """Package -> the versions that stages ran with."""
    code: Code
    inputs: list[Input]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PackedStage:
    """A stage and all that decides its digest."""

    digest: str
    kind: str
    method: str | None
    seed: int | None
    inputs: list[tuple[str, str]]
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """The stage in words."""
        return f"{self.kind} {self.method}" if self.method else self.kind


@dataclass(frozen=True, kw_only=True)
class PackedMethod:
    """A method as the stages name it."""

    kind: str
    name: str
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PackedCell:
    """A cell by names and digests."""

    cell: str
    model: str
    task: str
    attack: PackedMethod
    defenses: list[PackedMethod]
    seed: int
    answers: list[str]
    """Digests of the stages whose artifacts the results read."""
    stages: list[str]
    search: str | None = None
    """Digest of the attacker's search that the cell belongs to."""
    trial: int | None = None
    """Its number in the search; None for the chosen setting."""

    @property
    def names(self) -> tuple[object, ...]:
        """What a reader knows the cell by."""
        return (
            self.model,
            self.task,
            self.attack.name,
            tuple(one.name for one in self.defenses),
            self.seed,
            self.search is not None,
            self.trial,
        )


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """The cells and stages of a plan, in its order."""

    cells: list[PackedCell]
    stages: list[PackedStage]


@dataclass(frozen=True)
class Archive:
    """An archive that is one: its manifest can be read, and no name in it leads out of a folder."""

    path: Path
    manifest: Manifest
    damage: dict[str, str] = field(default_factory=dict)
    """File that is not as the manifest says -> what is wrong with it."""

    signature: bytes | None = None
    """What a publisher signed the manifest with: see archive_signature."""
    signed: bytes = b""
    """The bytes of the manifest."""

    @classmethod
    def open(cls, path: Path) -> Archive:
        """The archive in a file, every checksum looked at; ArchiveError when it is none, of a newer
        format, holds what no archive may hold, or is larger than the limits allow.
        """
        with opened(path) as (archive, entries):
            if MANIFEST not in entries:
                raise ArchiveError(
                    f"{path.name} is not an archive of a sweep",
                    sorted(entries)[:8],
                    f"a zip with {MANIFEST}",
                    FIX,
                )
            content = read(archive, entries[MANIFEST])
            manifest = _manifest(content)
            return cls(
                path,
                manifest,
                _damage(archive, entries, manifest),
                read(archive, entries[SIGNATURE]) if SIGNATURE in entries else None,
                content,
            )

    def read(self, name: str, shape: type[T]) -> T | None:
        """The values of a JSON file of the archive; None when the file is damaged or not of this
        shape. ArchiveError where it holds more values than any that ftsec writes.
        """
        content = self._bytes(name)
        if content is None:
            return None
        check_json(content, name)
        return _parsed(content, shape)

    def text(self, name: str) -> str | None:
        """A text of the archive; None when it is damaged."""
        content = self._bytes(name)
        return None if content is None else content.decode(errors="replace")

    def _bytes(self, name: str) -> bytes | None:
        if name in self.damage or name not in self.manifest.files:
            return None
        with opened(self.path) as (archive, entries):
            return read(archive, entries[name])

    def unpack(self, under: str, folder: Path) -> Path:
        """Write the undamaged files below a name of the archive into a folder, and return it;
        EnvironmentFault where the folder has no room for them.
        """
        with opened(self.path) as (archive, entries):
            for name in sorted(self.manifest.files):
                if name.startswith(f"{under}/") and name not in self.damage:
                    target = folder / name.removeprefix(f"{under}/")
                    try:
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(entries[name]) as source, target.open("wb") as sink:
                            shutil.copyfileobj(source, sink, CHUNK)
                    except OSError as fault:
                        raise EnvironmentFault(
                            f"{self.path.name} cannot be unpacked",
                            str(fault),
                            "room in the folder of temporary files",
                            "make room, or name another folder by TMPDIR",
                        ) from fault
        return folder


def _manifest(content: bytes) -> Manifest:
    check_json(content, MANIFEST)
    try:
        plain = json.loads(content)
    except (ValueError, RecursionError) as broken:
        raise ArchiveError(
            f"its {MANIFEST} is not JSON", str(broken), "JSON as ftsec writes it"
        ) from broken
    form = plain.get("format") if isinstance(plain, dict) else None
    if not isinstance(form, int) or form > FORMAT:
        raise ArchiveError(
            "an archive of a format that this ftsec_ray does not know",
            form,
            f"up to {FORMAT}",
            "read it with a newer ftsec_ray",
        )
    if form < FORMAT:
        raise ArchiveError(
            "an archive of an older format, which tells of code what no plan holds any more",
            form,
            f"format {FORMAT}",
            "verify it with the ftsec_ray that its manifest names",
        )
    found = _parsed(content, Manifest)
    fault = listing_fault(plain) or _names_fault(plain["files"])
    if found is None or fault is not None or found.file not in found.files:
        raise ArchiveError(
            f"its {MANIFEST} does not say what a manifest says",
            fault or sorted(plain)[:8],
            "a manifest as ftsec writes it",
        )
    return found


def _names_fault(files: Mapping[str, Any]) -> str | None:
    """What is wrong with the files that a manifest lists; None for those that an archive has."""
    if MANIFEST in files or SIGNATURE in files:
        return "it lists itself"
    return next((fault for name in files if (fault := name_fault(name)) is not None), None)


def _parsed(content: bytes, shape: type[T]) -> T | None:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(shape).validate_json(content)
    except ValidationError:
        return None


def _damage(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], manifest: Manifest
) -> dict[str, str]:
    found = {
        name: "not in its manifest"
        for name in entries
        if name not in (MANIFEST, SIGNATURE) and name not in manifest.files
    }
    for name, expected in manifest.files.items():
        fault = _fault(archive, entries.get(name), expected)
        if fault is not None:
            found[name] = fault
    return dict(sorted(found.items()))


def _fault(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None, expected: Mapping[str, Any]
) -> str | None:
    if entry is None:
        return "missing"
    if entry.file_size != expected["bytes"]:
        return f"{entry.file_size} bytes instead of {expected['bytes']}"
    try:
        with archive.open(entry) as stream:
            same = stream_sha256(stream) == expected["sha256"]
    except BROKEN as broken:
        return f"it cannot be read back: {broken}"
    return None if same else "its bytes have changed"
