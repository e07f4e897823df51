"""What the headers of safetensors files tell of weights, without loading any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

_HEADER_BYTES = 100_000_000
"""Bytes of a header, at most: the limit of the safetensors format."""
_LEAST_BITS = 8
"""A byte holds eight weights, at most."""


@dataclass(frozen=True)
class Weights:
    """How much a model's files hold."""

    count: int
    """Weights."""
    tensors: int


def header_of(file: Path) -> dict[str, dict[str, Any]] | None:
    """Name of a weight -> its dtype, shape and place in a safetensors file; None where it cannot
    be read. A file that stands as it was is read once.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    return _header(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _header(file: Path, size: int, changed_ns: int) -> dict[str, dict[str, Any]] | None:
    del size, changed_ns  # a file that changed is another one
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _HEADER_BYTES else None
    except (OSError, ValueError, RecursionError):  # whoever loads the model says what is wrong
        return None
    if not isinstance(header, dict):
        return None
    return {n: e for n, e in header.items() if n != "__metadata__" and isinstance(e, dict)}


def weights_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a weight -> its dtype and shape, as the headers of the safetensors files of a folder
    tell; empty where there are none to read.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header = header_of(file)
        if header is None:
            return {}
        found |= header
    return found


_MOST_DIMENSIONS = 64
"""Of a shape; no library has arrays of more."""


def counted(entries: Iterable[Mapping[str, Any]]) -> int | None:
    """Weights in the entries of headers; None where a shape is none."""
    try:
        shapes = [entry["shape"] for entry in entries]
        if any(len(shape) > _MOST_DIMENSIONS for shape in shapes):
            return None
        return sum(prod(int(n) for n in shape) for shape in shapes)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None  # whoever loads the model says what is wrong


def weights_of(files: Iterable[Path]) -> Weights | None:
    """What files hold together; None where there are none, or a header cannot be read."""
    files = list(files)
    headers = [header_of(file) for file in files]
    known = [header for header in headers if header is not None]
    count = counted(entry for header in known for entry in header.values())
    if not headers or len(known) < len(headers) or count is None:
        return None
    held = sum(file.stat().st_size for file in files) * _LEAST_BITS
    return Weights(min(count, held), sum(len(header) for header in known))


def gguf_weights(file: Path) -> Weights:
    """The most that a GGUF file can hold, by its size."""
    size = file.stat().st_size
    return Weights(size * _LEAST_BITS, size // _TENSOR_BYTES)


_TENSOR_BYTES = 32
"""Bytes in which a GGUF file describes a tensor, at least."""
