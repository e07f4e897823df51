"""Names, types and shapes of weights from the headers of safetensors files, without loading any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

_HEADER_BYTES = 100_000_000
"""Maximum size of a header: the limit of the safetensors format."""
_LEAST_BITS = 8
"""Maximum number of weights in a byte."""


@dataclass(frozen=True)
class Weights:
    """How many weights and tensors a model's files hold."""

    count: int
    """Number of weights."""
    tensors: int


def header_of(file: Path) -> dict[str, dict[str, Any]] | None:
    """Name of a weight -> its dtype, shape and position in a safetensors file; None if it cannot be
    read. An unchanged file is read only once.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    return _header(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _header(file: Path, size: int, changed_ns: int) -> dict[str, dict[str, Any]] | None:
    del size, changed_ns  # part of the cache key: a changed file is read again
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _HEADER_BYTES else None
    except (OSError, ValueError, RecursionError):  # loading the model reports the error
        return None
    if not isinstance(header, dict):
        return None
    return {n: e for n, e in header.items() if n != "__metadata__" and isinstance(e, dict)}


def weights_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a weight -> its dtype and shape, from the headers of the safetensors files in a
    folder; empty if there are none that can be read.
    """
    entries: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header = header_of(file)
        if header is None:
            return {}
        entries |= header
    return entries


_MOST_DIMENSIONS = 64
"""Maximum number of dimensions of a shape; no library has arrays with more."""


def counted(entries: Iterable[Mapping[str, Any]]) -> int | None:
    """Number of weights in the entries of headers; None if a shape is invalid."""
    try:
        shapes = [entry["shape"] for entry in entries]
        if any(len(shape) > _MOST_DIMENSIONS for shape in shapes):
            return None
        return sum(prod(int(n) for n in shape) for shape in shapes)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None  # loading the model reports the error


def weights_of(files: Iterable[Path]) -> Weights | None:
    """What several files hold together; None if there are none, or a header cannot be read."""
    files = list(files)
    headers = [header_of(file) for file in files]
    known = [header for header in headers if header is not None]
    count = counted(entry for header in known for entry in header.values())
    if not headers or len(known) < len(headers) or count is None:
        return None
    held = sum(file.stat().st_size for file in files) * _LEAST_BITS
    return Weights(min(count, held), sum(len(header) for header in known))


def gguf_weights(file: Path) -> Weights:
    """The most that a GGUF file can hold, from its size."""
    size = file.stat().st_size
    return Weights(size * _LEAST_BITS, size // _TENSOR_BYTES)


_TENSOR_BYTES = 32
"""Minimum number of bytes that a GGUF file uses to describe a tensor."""
