"""Canonical JSON and digests: equal values have the same digest in every process.

The encoder refuses values that have no canonical text (callables, NaN, sets, arbitrary objects). A
digest is the first 32 hex digits of the SHA-256 of canonical JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields, is_dataclass
from enum import Enum

from ftsec_ray.errors import IdentityError

DIGEST_CHARS = 32
FORMAT_VERSION = 3
"""Part of every digest: increase it if no artifact of an older package may be reused. 2: digests
hold VERSIONs in place of hashed source; 3: rows are conversations.
"""


LATER = "later"
"""Key in the metadata of a dataclass field that is left out of canonical JSON at its default, so
that a field added later does not change the digests from before.
"""


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        given = ((f, getattr(value, f.name)) for f in fields(value))
        return {f.name: _plain(v) for f, v in given if not (LATER in f.metadata and v == f.default)}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise IdentityError("this number has no canonical JSON", value, "a finite number")
        return value
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise IdentityError("a mapping key is not a string", odd[0], "only string keys")
        return {key: _plain(item) for key, item in value.items()}
    raise IdentityError(
        "a value of this type has no canonical JSON",
        type(value).__qualname__,
        "str, int, float, bool, None, list, mapping or dataclass",
    )


def canonical(value: object) -> str:
    """Canonical JSON of a value: sorted keys, no spaces, ASCII; IdentityError if it has none."""
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def digest_text(text: str) -> str:
    """The digest (32 hex digits) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def digest(value: object) -> str:
    """The digest (32 hex digits) of a value's canonical JSON."""
    return digest_text(canonical(value))


def unit_interval(*parts: object) -> float:
    """A number in [0, 1) that depends only on `parts`: for decisions on single rows that are the
    same in every process and order.
    """
    raw = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(raw[:8], "big") / 2**64
