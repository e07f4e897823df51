"""The zip file of an archive: opened only if every member is a plain file with a known name and all
together stay within the limits.

The directory at the end of the file decides this, before any byte is unpacked.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ftsec_ray.results.archive_limits import (
    MEMBERS,
    PACKED,
    RATIO,
    SMALL,
    TEXT_BYTES,
    UNPACKED,
    ArchiveError,
    check,
)
from ftsec_ray.results.write import PART, RUN_FILE, TABLES
from ftsec_ray.store.record import member_fault

MANIFEST, PLAN, ARTIFACTS, SIGNATURE = (
    "manifest.json",
    "plan.json",
    "artifacts.json",
    "manifest.json.sig",
)
SWEEP_FOLDER, PAGE = "sweep", "results/report.html"
NAMES = frozenset(
    {
        MANIFEST,
        PLAN,
        ARTIFACTS,
        SIGNATURE,
        PAGE,
        f"results/{RUN_FILE}",
        *(f"results/{table}/{PART}" for table in TABLES),
    }
)
"""Allowed members of an archive, besides its sweep file."""
WANT, FIX = "a zip written by `ftsec export`", "download it again, or give the path of an archive"
BROKEN = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, struct.error)
"""Exceptions when a damaged zip is read."""
_SWEEP_SUFFIXES = ("", ".yaml", ".yml", ".json", ".txt")
_MAX_NAME = 255
_END = struct.Struct("<4s4H2LH")
_END_MARK, _ZIP64_MARK = b"PK\5\6", b"PK\6\7"
_ENCRYPTED = 0x1
_MSDOS_FOLDER = 0x10
_MAX_ENTRY_BYTES = 46 + _MAX_NAME + 1024
"""Maximum size of an entry in a zip's directory: header, name, and extra fields of other zips."""


def name_fault(name: str) -> str | None:
    """What is wrong with the name of a member; None if it is allowed."""
    shown = name if len(name) <= _MAX_NAME else f"{name[:40]}... ({len(name)} characters)"
    fault = member_fault(name)
    if fault is not None:
        return "its name points outside the folder, or is that of a pickle"
    if len(name.encode(errors="replace")) > _MAX_NAME:
        return f"its name is longer than {_MAX_NAME} bytes"
    path = PurePosixPath(name)
    if path.parent == PurePosixPath(SWEEP_FOLDER):
        if path.suffix.lower() in _SWEEP_SUFFIXES and not path.name.startswith("."):
            return None
        return f"{shown} is not the name of a sweep file"
    return None if name in NAMES else f"ftsec does not write {shown}"


@contextmanager
def opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, Mapping[str, zipfile.ZipInfo]]]:
    """The zip and its members by name; ArchiveError for a file that is not a zip, for forbidden
    members, and above the limits.
    """
    if not path.is_file():  # not a folder, and not a pipe, which would never end
        raise ArchiveError("no such archive", str(path), WANT, FIX)
    check(PACKED, path.stat().st_size, path.name)
    try:
        _check_end(path)
        archive = zipfile.ZipFile(path)
    except (*BROKEN, UnicodeError) as broken:
        raise _no_zip(path, broken) from broken
    with archive:
        try:
            members = _members(archive, path)
        except (*BROKEN, UnicodeError) as broken:
            raise _no_zip(path, broken) from broken
        yield archive, members


def _no_zip(path: Path, broken: Exception) -> ArchiveError:
    return ArchiveError(f"{path.name} is not an undamaged zip archive", str(broken), WANT, FIX)


def _check_end(path: Path) -> None:
    """Checks that the file ends as `ftsec export` writes it, with a directory of few members:
    zipfile would read a directory of any size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - 20))
        tail = file.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != _END_MARK:
        raise zipfile.BadZipFile("it does not end with the directory of a zip")
    _, disk, start_disk, here, members, bytes_, start, comment = _END.unpack(tail[-_END.size :])
    check(MEMBERS, members, path.name)
    check(MEMBERS, -(-bytes_ // _MAX_ENTRY_BYTES), path.name)
    is_plain = (disk, start_disk, here, comment) == (0, 0, members, 0)
    if not is_plain or tail.startswith(_ZIP64_MARK) or start + bytes_ + _END.size != size:
        raise zipfile.BadZipFile("the file holds more than the members of one zip")


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    entries = archive.infolist()
    check(MEMBERS, len(entries), path.name)
    for entry in entries:
        fault = name_fault(entry.orig_filename) or _kind_fault(entry)
        if fault is not None:
            raise ArchiveError(
                f"the archive holds a forbidden file: {fault}",
                entry.orig_filename[:_MAX_NAME],
                "plain files with the names that ftsec writes",
                "do not unpack it",
            )
        _check_size(entry)
    named = {entry.filename: entry for entry in entries}
    if len(named) != len(entries):
        raise ArchiveError(
            "the archive holds a forbidden file: two with the same name",
            sorted(name for name in named if [e.filename for e in entries].count(name) > 1),
            "every name once",
            "do not unpack it",
        )
    check(UNPACKED, sum(entry.file_size for entry in entries), path.name)
    if sum(entry.compress_size for entry in entries) > path.stat().st_size:
        raise zipfile.BadZipFile("its members overlap")
    return named


def _kind_fault(entry: zipfile.ZipInfo) -> str | None:
    """Why a member is not a plain file that every program can unpack; None if it is."""
    mode = entry.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or entry.external_attr & _MSDOS_FOLDER:
        return "a folder, pipe or device"
    if entry.flag_bits & _ENCRYPTED:
        return "it is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"its compression method {entry.compress_type} is neither stored nor deflated"
    return None


def _check_size(entry: zipfile.ZipInfo) -> None:
    if entry.file_size > SMALL:
        check(RATIO, entry.file_size // max(1, entry.compress_size), entry.filename)
    if not entry.filename.endswith(f"/{PART}"):
        check(TEXT_BYTES, entry.file_size, entry.filename)


def read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of a member, at most as many as its entry says; ArchiveError if it is damaged."""
    try:
        with archive.open(entry) as stream:
            return stream.read(entry.file_size + 1)
    except (*BROKEN, UnicodeError) as broken:
        raise _no_zip(Path(archive.filename or ""), broken) from broken
