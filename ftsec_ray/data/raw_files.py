"""A data file as bytes and as text: unpacked within a limit, and refused if its bytes have another
format than its name says.
"""

from __future__ import annotations

import gzip
import re
import zlib
from itertools import accumulate
from pathlib import Path

from ftsec_ray.config.limits import Limit
from ftsec_ray.config.open_limits import DATA_BYTES, DATA_RATIO, raised_by
from ftsec_ray.data.not_rows import refuse_pointer
from ftsec_ray.errors import DataError

_PIECE_BYTES = 2**20
_ROW_BYTES = 64
"""Bytes of a short row of text."""
_FREE_BYTES = 64 * 2**20
"""Bytes that a .gz may always unpack to, whatever its size: every machine has this much memory."""
_MAGIC = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip archive",
    **{b"BZh%d1AY&SY" % level: "a bzip2 archive" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "an lz4 archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"ARROW1\x00\x00": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"%PDF-": "a PDF document",
    b"\x89PNG\r\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
}
_TARRED = 257
"""Position of the format mark in a tar archive."""
_WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_GOT_BYTES = 60


def read_raw(path: str, *, is_packed: bool, is_parquet: bool) -> bytes | bytearray:
    """The bytes of a file, unpacked if its name ends in .gz; DataError if it cannot be read, is
    empty, is too large, or has another format.
    """
    raw: bytes | bytearray = _plain(path)
    refuse_pointer(raw, path)
    if is_packed and raw:
        _refuse_format(raw, path, "a gzip archive", allowed=b"\x1f\x8b")
        raw = _unpacked(path, len(raw))
        refuse_pointer(raw, path)
    if _is_blank(raw):
        raise DataError(
            f"the data file {path} is empty",
            f"{len(raw)} bytes",
            "rows",
            "write or download the file again",
        )
    if is_parquet:
        _refuse_format(raw, path, "a Parquet file", allowed=b"PAR1")
    else:
        _refuse_format(raw, path, "text")
    return raw


def _is_blank(raw: bytes | bytearray) -> bool:
    """Whether the file is white space only, checked without copying it."""
    start = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    return re.compile(rb"\s*\Z").match(raw, start) is not None


def _plain(path: str) -> bytes:
    """The bytes of a file as stored."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise DataError("a data file cannot be read: it is not a regular file", path, "a file")
        refuse_beyond(DATA_BYTES, Path(path).stat().st_size, path)
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, "a readable file", error) from error


def refuse_beyond(limit: Limit, count: int, path: str) -> None:
    """DataError if a file exceeds a limit."""
    fix = f"use fewer rows; {raised_by(limit)}"
    if fault := limit.exceeded_by(count, where=path, fix=fix):
        raise DataError(*fault.args)


def head_of(path: str, size: int) -> bytes:
    """The first bytes of a file; empty if it cannot be read."""
    if not Path(path).is_file():
        return b""
    try:
        with Path(path).open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def holds_more(path: Path, rows: int) -> bool:
    """Whether a file holds more than `rows` rows, estimated from its unpacked size: the packed size
    says nothing.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(path).num_rows) > rows
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                pieces = iter(lambda: len(file.read(_PIECE_BYTES)), 0)
                return any(size > rows * _ROW_BYTES for size in accumulate(pieces))
    except (OSError, EOFError, ValueError, zlib.error):  # the code that reads the rows reports it
        return False
    return path.stat().st_size > rows * _ROW_BYTES


def decoded(raw: bytes | bytearray, path: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark; DataError that names the encoding or the
    line if they are not UTF-8.
    """
    wide = next((name for mark, name in _WIDE.items() if raw.startswith(mark)), None)
    if wide is None and _looks_wide(raw):
        wide = "UTF-16"
    if wide is not None:
        raise DataError(
            f"the data file {path} is {wide} text",
            bytes(raw[:_GOT_BYTES]),
            "UTF-8",
            f"iconv -f {wide} -t UTF-8 {Path(path).name} > converted{Path(path).suffix}, or save"
            " it as UTF-8",
        )
    place = raw.find(b"\0")
    if place >= 0:
        raise DataError(
            f"line {raw.count(10, 0, place) + 1} of {path} holds a NUL byte",
            bytes(raw[max(0, place - 20) : place + 20]),
            "UTF-8 text",
            "the file is binary or damaged: download it again, or remove the byte",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "a data file is not UTF-8 text",
            path,
            "UTF-8",
            f"line {raw.count(10, 0, error.start) + 1}: {error}; convert it, for example with"
            " iconv -f LATIN1 -t UTF-8",
        ) from error


def _looks_wide(raw: bytes | bytearray) -> bool:
    """Whether bytes without a byte order mark are UTF-16 of mostly Latin text: every other byte is
    0.
    """
    head = raw[:512]
    return len(head) >= 4 and any(
        head[offset::2].count(0) > 0.8 * len(head[offset::2]) and not head[1 - offset :: 2].count(0)
        for offset in (0, 1)
    )


def _refuse_format(raw: bytes | bytearray, path: str, wanted: str, *, allowed: bytes = b"") -> None:
    """DataError if the bytes begin like another format, or not with `allowed`."""
    if allowed and raw.startswith(allowed):
        return
    name = next((what for magic, what in _MAGIC.items() if raw.startswith(magic)), None)
    if name is None and raw[_TARRED : _TARRED + 6] in (b"ustar\x00", b"ustar "):
        name = "a tar archive"
    if name is None and raw.startswith(b"PAR1") and raw.endswith(b"PAR1"):
        name = "a Parquet file"
    if name is None and not allowed:
        return
    raise DataError(
        f"the data file {path} is not {wanted}" + (f" but {name}" if name else ""),
        bytes(raw[:_GOT_BYTES]),
        f"{wanted}, as its name says",
        "unpack or convert the file, or rename it to match its format",
    )


def _unpacked(path: str, size: int) -> bytearray:
    """The content of a .gz, read in pieces up to the limit that its `size` allows."""
    most = min(DATA_BYTES.value, max(_FREE_BYTES, DATA_RATIO.value * size))
    limit = DATA_BYTES if most == DATA_BYTES.value else DATA_RATIO
    raw = bytearray()
    try:
        with gzip.open(path) as file:
            while piece := file.read(_PIECE_BYTES):
                raw += piece
                if len(raw) > most:
                    raise DataError(
                        f"the archive {path} is too large when unpacked",
                        f"more than {most:,} bytes from {size:,}",
                        f"at most {DATA_BYTES.value:,} bytes, and above {_FREE_BYTES:,} bytes at"
                        f" most {DATA_RATIO.value:,} times the packed size",
                        f"unpack the file, or use fewer rows; {raised_by(limit)}",
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, "an undamaged gzip archive", error) from error
    return raw


def _unreadable(path: str, want: str, error: Exception) -> DataError:
    return DataError(
        "a data file cannot be read",
        path,
        want,
        f"{error or type(error).__name__}; download it or pack it again",
    )
