"""A data file as bytes and as text: unpacked within a limit, and refused where its bytes are of
another format than its name says.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ftsec_ray.data.not_rows import refuse_pointer
from ftsec_ray.errors import DataError

MAX_UNPACKED_BYTES = 4 * 2**30
"""Bytes that a .gz may unpack to: a few kilobytes can hold terabytes of zeros."""
_PIECE_BYTES = 2**20
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
"""Where a tar archive says that it is one."""
_WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_GOT_BYTES = 60


def read_raw(path: str, *, is_packed: bool, is_parquet: bool) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz; DataError when it cannot be read,
    is empty, or is of another format.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, "a readable file", error) from error
    refuse_pointer(raw, path)
    if is_packed and raw:
        _refuse_format(raw, path, "a gzip archive", allowed=b"\x1f\x8b")
        raw = _unpacked(path)
        refuse_pointer(raw, path)
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(
            f"the data file {path} is empty",
            f"{len(raw)} bytes",
            "rows",
            "make or download the file again",
        )
    if is_parquet:
        _refuse_format(raw, path, "a Parquet file", allowed=b"PAR1")
    else:
        _refuse_format(raw, path, "text")
    return raw


def decoded(raw: bytes, path: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark; DataError that names the encoding or the
    line where they are not that.
    """
    wide = next((name for mark, name in _WIDE.items() if raw.startswith(mark)), None)
    if wide is None and _looks_wide(raw):
        wide = "UTF-16"
    if wide is not None:
        raise DataError(
            f"the data file {path} is {wide} text",
            raw[:_GOT_BYTES],
            "UTF-8",
            f"iconv -f {wide} -t UTF-8 {Path(path).name} > converted{Path(path).suffix}, or save"
            " it as UTF-8",
        )
    place = raw.find(b"\0")
    if place >= 0:
        raise DataError(
            f"line {raw.count(10, 0, place) + 1} of {path} holds a NUL byte",
            raw[max(0, place - 20) : place + 20],
            "UTF-8 text",
            "the file is binary or damaged: download it again, or take the byte out",
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


def _looks_wide(raw: bytes) -> bool:
    """Whether bytes without a mark are UTF-16 of mostly Latin text: every other byte is 0."""
    head = raw[:512]
    return len(head) >= 4 and any(
        head[offset::2].count(0) > 0.8 * len(head[offset::2]) and not head[1 - offset :: 2].count(0)
        for offset in (0, 1)
    )


def _refuse_format(raw: bytes, path: str, wanted: str, *, allowed: bytes = b"") -> None:
    """DataError where bytes begin as another format does, or not as `allowed`."""
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
        raw[:_GOT_BYTES],
        f"{wanted}, as its name says",
        "unpack or convert it, or give it the name of what it is",
    )


def _unpacked(path: str) -> bytes:
    """What a .gz of one or more members holds, read in pieces up to the limit."""
    pieces, size = [], 0
    try:
        with gzip.open(path) as file:
            while piece := file.read(_PIECE_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_UNPACKED_BYTES:
                    raise DataError(
                        f"the archive {path} unpacks to too much",
                        f"more than {size:,} bytes from {Path(path).stat().st_size:,}",
                        f"at most {MAX_UNPACKED_BYTES:,} bytes",
                        "give the rows unpacked, or fewer of them",
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, "a whole gzip archive", error) from error
    return b"".join(pieces)


def _unreadable(path: str, want: str, error: Exception) -> DataError:
    return DataError(
        "a data file cannot be read",
        path,
        want,
        f"{error or type(error).__name__}; download or pack it again",
    )
