"""Hashes of files: digests use them for the files that a sweep names, and artifacts and archives
hold one for every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from ftsec_ray.errors import SpecError
from ftsec_ray.identity.cache_folder import cache_folder
from ftsec_ray.identity.canonical import digest
from ftsec_ray.identity.folder_files import plain_files

_SHA256 = re.compile("[0-9a-f]{64}")
_REMEMBER_BYTES = 16 * 2**20
"""Size in bytes from which the hash of a file is cached on disk, by its path, size and time."""


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's files; SpecError if `path` does
    not exist or the folder is empty, or for a link that leads out of the folder.
    """
    if path.is_file():
        return _file_hash(path)
    if not path.is_dir():
        raise SpecError(
            "no file or folder at this path",
            str(path),
            "an existing path",
            "check the spelling; a relative path starts at the folder of the sweep file, else at"
            " the working directory",
        )
    files = plain_files(path, skips=is_aside)
    if not files:
        raise SpecError("the folder is empty", str(path), "a folder that contains a model or rows")
    return digest([[str(p.relative_to(path)), _file_hash(p)] for p in files])


def is_aside(relative: Path) -> bool:
    """Whether a file of a folder is not part of its content: a `.md` file, or hidden."""
    return relative.suffix == ".md" or any(part.startswith(".") for part in relative.parts)


def _file_hash(path: Path) -> str:
    stat = path.stat()
    return _hash_known(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@cache
def _hash_known(path: str, size: int, mtime_ns: int) -> str:
    if size < _REMEMBER_BYTES:
        return sha256(Path(path))
    entry = cache_folder() / "content" / f"{digest([path, size, mtime_ns])}.json"
    known = _kept(entry, path)
    if known is not None:
        return known
    content = sha256(Path(path))
    scratch = entry.with_suffix(f".{os.getpid()}")
    with suppress(OSError, UnicodeError):  # without a cache, the next process hashes it again
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"path": path, "sha256": content}), encoding="utf-8")
        scratch.rename(entry)
    with suppress(OSError):  # already renamed if there was no error
        scratch.unlink()
    return content


def _kept(entry: Path, path: str) -> str | None:
    """The hash in a cache entry of a file; None if the entry is missing or not valid."""
    try:
        held = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or held.get("path") != path:
        return None
    content = held.get("sha256")
    return content if isinstance(content, str) and _SHA256.fullmatch(content) else None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return stream_sha256(stream)


def stream_sha256(stream: IO[bytes]) -> str:
    """SHA-256 of the rest of an open file, as 64 hex digits."""
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
