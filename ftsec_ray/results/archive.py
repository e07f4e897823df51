"""One archive of a finished sweep: what somebody needs who wants to repeat its numbers, or to see
what would differ.

    manifest.json                    plan, versions, code and local inputs by hash, and the checksum
    of every other file plan.json                        cells and stages with all that decides
    their digests artifacts.json                   checksums of the artifacts, as their records in
    the store told them sweep/<file>                     the sweep as its author wrote it
    results/report.html, results/run.json, results/<table>/part-0.parquet

A zip without time stamps, its names sorted: the same content gives the same bytes. It holds no
weights and no rows of the user. Checksums tell damage and not forgery: publish the archive's own
SHA-256 beside a number. `pack` writes them.
"""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ftsec_ray.errors import DataError
from ftsec_ray.identity.content import stream_sha256
from ftsec_ray.store.record import listing_fault, member_fault

T = TypeVar("T")
FORMAT = 2
"""Raise when an older package could not read the archive any more. 2: VERSIONs and hashes of the
lock in place of hashed source.
"""
MANIFEST, PLAN, ARTIFACTS = "manifest.json", "plan.json", "artifacts.json"
CHUNK = 1 << 20
"""Bytes copied at a time."""
_MAX_TEXT_BYTES = 512 * 2**20
"""Larger than any plan; more is a mistake or an attack on the reader's memory."""


class ArchiveError(DataError):
    """A file that is no archive of a sweep, or an archive that must not be written."""

    code = "archive"
    exit_code = 2


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

    @classmethod
    def open(cls, path: Path) -> Archive:
        """The archive in a file, every checksum looked at; ArchiveError when it is none or of a
        newer format.
        """
        want, fix = (
            "a zip that `ftsec export` wrote",
            "get it again, or give the path of an archive",
        )
        if not path.is_file():
            raise ArchiveError("no such archive", str(path), want, fix)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                for name in sorted(entries):
                    fault = member_fault(name)
                    if fault is not None:
                        raise ArchiveError(
                            f"a file that no archive may hold: {fault}",
                            name,
                            "names inside of one folder, and no pickles",
                            "do not unpack it",
                        )
                if MANIFEST not in entries:
                    raise ArchiveError(
                        f"{path.name} is not an archive of a sweep",
                        sorted(entries)[:8],
                        f"a zip with {MANIFEST}",
                        fix,
                    )
                manifest = _manifest(_read(archive, entries[MANIFEST], _MAX_TEXT_BYTES))
                twice = len(archive.infolist()) - len(entries)
                return cls(
                    path,
                    manifest,
                    {
                        **_damage(archive, entries, manifest),
                        **({"names": f"{twice} of them occur twice"} if twice else {}),
                    },
                )
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as broken:
            raise ArchiveError(
                f"{path.name} is not a whole zip archive", str(broken), want, fix
            ) from broken

    def read(self, name: str, shape: type[T]) -> T | None:
        """The values of a JSON file of the archive; None when the file is damaged or not of this
        shape.
        """
        text = self.text(name)
        return None if text is None else _parsed(text, shape)

    def text(self, name: str) -> str | None:
        """A text of the archive; None when it is damaged."""
        if name in self.damage or name not in self.manifest.files:
            return None
        with zipfile.ZipFile(self.path) as archive:
            return _read(archive, archive.getinfo(name), _MAX_TEXT_BYTES).decode(errors="replace")

    def unpack(self, under: str, folder: Path) -> Path:
        """Write the undamaged files below a name of the archive into a folder, and return it."""
        with zipfile.ZipFile(self.path) as archive:
            for name in sorted(self.manifest.files):
                if name.startswith(f"{under}/") and name not in self.damage:
                    target = folder / name.removeprefix(f"{under}/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink, CHUNK)
        return folder


def _manifest(content: bytes) -> Manifest:
    try:
        plain = json.loads(content)
    except ValueError as broken:
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
    fault = listing_fault(plain)
    found = _parsed(content.decode(errors="replace"), Manifest)
    if found is None or fault is not None or found.file not in found.files:
        raise ArchiveError(
            f"its {MANIFEST} does not say what a manifest says",
            fault or sorted(plain),
            "a manifest as ftsec writes it",
        )
    return found


def _parsed(text: str, shape: type[T]) -> T | None:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(shape).validate_json(text)
    except ValidationError:
        return None


def _damage(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], manifest: Manifest
) -> dict[str, str]:
    found = {
        name: "not in its manifest"
        for name in entries
        if name != MANIFEST and name not in manifest.files
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
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a link"
    if entry.file_size != expected["bytes"]:
        return f"{entry.file_size} bytes instead of {expected['bytes']}"
    try:
        with archive.open(entry) as stream:
            same = stream_sha256(stream) == expected["sha256"]
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as broken:
        return f"it cannot be read back: {broken}"
    return None if same else "its bytes have changed"


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    if entry.file_size > limit:
        raise ArchiveError(
            f"{entry.filename} is larger than any that ftsec writes",
            f"{entry.file_size} bytes",
            f"at most {limit}",
        )
    with archive.open(entry) as stream:
        return stream.read(limit)
