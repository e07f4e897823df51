"""Files by their bytes: what a sweep names by path enters a digest so, and artifacts and archives
keep it beside every file.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import IO

from ftsec_ray.errors import SpecError
from ftsec_ray.identity.canonical import digest

_REMEMBER_BYTES = 16 * 2**20
"""From this size on, the hash of a file is kept on disk by its path, size and time."""


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's files; SpecError when there is
    nothing at `path`.
    """
    if path.is_file():
        return _file_hash(path)
    if not path.is_dir():
        raise SpecError(
            "no file or folder at this path",
            str(path),
            "an existing path",
            "check the spelling; paths are "
            "relative to the folder of the sweep file or to the working directory",
        )
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_aside(p.relative_to(path)))
    if not files:
        raise SpecError("an empty folder", str(path), "a folder with a model or rows in it")
    return digest([[str(p.relative_to(path)), _file_hash(p)] for p in files])


def _is_aside(relative: Path) -> bool:
    return relative.suffix == ".md" or any(part.startswith(".") for part in relative.parts)


def _file_hash(path: Path) -> str:
    stat = path.stat()
    return _hash_known(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@cache
def _hash_known(path: str, size: int, mtime_ns: int) -> str:
    if size < _REMEMBER_BYTES:
        return sha256(Path(path))
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftsec_ray" / "content"
    )
    entry = cache / f"{digest([path, size, mtime_ns])}.json"
    if entry.is_file():
        return str(json.loads(entry.read_text())["sha256"])
    content = sha256(Path(path))
    cache.mkdir(parents=True, exist_ok=True)
    scratch = entry.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({"path": path, "sha256": content}))
    scratch.rename(entry)
    return content


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return stream_sha256(stream)


def stream_sha256(stream: IO[bytes]) -> str:
    """SHA-256 of what is left of an open file, as 64 hex digits."""
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
