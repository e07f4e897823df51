"""One archive of a finished sweep: what others need to repeat its numbers, or to see what would
differ.

    manifest.json      plan, versions, code and local inputs by hash, and the checksum of every
                       other file
    plan.json          cells and stages with everything that decides their digests
    artifacts.json     checksums of the artifacts, from their records in the store
    sweep/<file>       the sweep file as its author wrote it
    results/report.html, results/run.json, results/<table>/part-0.parquet

A zip without time stamps and with sorted names: the same content gives the same bytes. It holds no
weights and no rows of the user. Checksums detect damage, but not forgery: sign the archive, or
publish its SHA-256 together with the numbers. `pack` writes archives.
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
"""Raise this when an older package could no longer read the archive. 2: VERSIONs and hashes of the
lock instead of hashes of the source.
"""
CHUNK = 1 << 20
"""Bytes copied in one piece."""


@dataclass(frozen=True, kw_only=True)
class CodeVersion:
    """The code of a stage kind or a method."""

    version: int
    code: str | None
    """Its hash in versions.lock; for a method from another package the token hash of its file."""
    is_outside: bool = False
    """Whether it is not in the lock: then the hash is part of its digests, besides the version."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code behind the digests of a plan."""

    format: int
    """Format of stages: see identity.FORMAT_VERSION."""
    kinds: dict[str, CodeVersion]
    """Kind of stage -> its code."""
    methods: dict[str, CodeVersion]
    """`attack badnets` -> its code."""
    edited: list[str]
    """Files of the exporting package that differed from its versions.lock."""


@dataclass(frozen=True, kw_only=True)
class PackedArtifact:
    """The record of an artifact."""

    files: dict[str, dict[str, Any]]
    """Name -> size and checksum."""
    code: str | None
    """Hash of the code that made it: see code_versions.stage_code."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file or folder that the sweep names by path; it is not part of the archive."""

    what: str
    path: str
    """The path in the sweep file."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an archive."""

    format: int
    sweep: str
    file: str
    """Name of the sweep file among the files."""
    plan: str
    versions: dict[str, list[str]]
    """Package -> the versions with which stages ran."""
    code: Code
    inputs: list[Input]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PackedStage:
    """A stage and everything that decides its digest."""

    digest: str
    kind: str
    method: str | None
    seed: int | None
    inputs: list[tuple[str, str]]
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """Kind and method of the stage."""
        return f"{self.kind} {self.method}" if self.method else self.kind


@dataclass(frozen=True, kw_only=True)
class PackedMethod:
    """A method as in the params of stages."""

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
    """Number of its trial in the search; None for the chosen setting."""

    @property
    def names(self) -> tuple[object, ...]:
        """What identifies the cell for a reader."""
        return (
            self.model,
            self.task,
            self.attack.name,
            tuple(defense.name for defense in self.defenses),
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
    """A readable archive: it has a manifest, and no name in it points outside its folder."""

    path: Path
    manifest: Manifest
    damage: dict[str, str] = field(default_factory=dict)
    """File that differs from the manifest -> what is wrong with it."""

    signature: bytes | None = None
    """The publisher's signature of the manifest: see archive_signature."""
    signed: bytes = b""
    """The bytes of the manifest."""

    @classmethod
    def open(cls, path: Path) -> Archive:
        """The archive in a file, with all checksums checked; ArchiveError if it is not an archive,
        has a newer format, holds forbidden members, or exceeds the limits.
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
        """The content of a JSON file in the archive; None if the file is damaged or has another
        shape. ArchiveError if it holds more values than ftsec ever writes.
        """
        content = self._bytes(name)
        if content is None:
            return None
        check_json(content, name)
        return _parsed(content, shape)

    def text(self, name: str) -> str | None:
        """A text file of the archive; None if it is damaged."""
        content = self._bytes(name)
        return None if content is None else content.decode(errors="replace")

    def _bytes(self, name: str) -> bytes | None:
        if name in self.damage or name not in self.manifest.files:
            return None
        with opened(self.path) as (archive, entries):
            return read(archive, entries[name])

    def unpack(self, under: str, folder: Path) -> Path:
        """Write the undamaged files under `under` to a folder and return it; EnvironmentFault if
        the disk is full.
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
                            "free space in the folder for temporary files",
                            "free some space, or set TMPDIR to another folder",
                        ) from fault
        return folder


def _manifest(content: bytes) -> Manifest:
    check_json(content, MANIFEST)
    try:
        plain = json.loads(content)
    except (ValueError, RecursionError) as broken:
        raise ArchiveError(
            f"the {MANIFEST} of the archive is not JSON", str(broken), "JSON as ftsec writes it"
        ) from broken
    form = plain.get("format") if isinstance(plain, dict) else None
    if not isinstance(form, int) or form > FORMAT:
        raise ArchiveError(
            "the archive has a format that this ftsec_ray does not know",
            form,
            f"format {FORMAT} or older",
            "read it with a newer ftsec_ray",
        )
    if form < FORMAT:
        raise ArchiveError(
            "the archive has an older format, which describes code in another way",
            form,
            f"format {FORMAT}",
            "verify it with the ftsec_ray version in its manifest",
        )
    manifest = _parsed(content, Manifest)
    fault = listing_fault(plain) or _names_fault(plain["files"])
    if manifest is None or fault is not None or manifest.file not in manifest.files:
        raise ArchiveError(
            f"the {MANIFEST} of the archive is not a valid manifest",
            fault or sorted(plain)[:8],
            "a manifest as ftsec writes it",
        )
    return manifest


def _names_fault(files: Mapping[str, Any]) -> str | None:
    """What is wrong with the list of files in a manifest; None if nothing."""
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
    damage = {
        name: "not in its manifest"
        for name in entries
        if name not in (MANIFEST, SIGNATURE) and name not in manifest.files
    }
    for name, expected in manifest.files.items():
        fault = _fault(archive, entries.get(name), expected)
        if fault is not None:
            damage[name] = fault
    return dict(sorted(damage.items()))


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
        return f"it cannot be read: {broken}"
    return None if same else "its bytes have changed"
