"""Canonical JSON, digests and source fingerprints: what decides a result gets one name, everywhere.

The encoder refuses what it cannot write the same way in every process (callables, NaN, sets,
arbitrary objects) instead of guessing. A digest is the first 32 hex digits of the SHA-256 of
canonical JSON.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from ftsec_ray.errors import IdentityError

DIGEST_CHARS = 32
FORMAT_VERSION = 1
"""Raise when artifacts written by an older package may no longer be reused."""


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise IdentityError("a number without a stable text", value, "a finite number")
        return value
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise IdentityError("a mapping key that is not a string", odd[0], "string keys only")
        return {key: _plain(item) for key, item in value.items()}
    raise IdentityError(
        "no text that is the same in every process",
        type(value).__qualname__,
        "str, int, float, bool, None, list, mapping or dataclass",
    )


def canonical(value: object) -> str:
    """Canonical JSON of a value: sorted keys, no spaces, ASCII; raises IdentityError where there is
    none.
    """
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
    """A number in [0, 1) decided by `parts` alone: the fate of one row, the same in every process
    and order.
    """
    raw = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(raw[:8], "big") / 2**64


class _DropDocstrings(ast.NodeTransformer):
    def _strip(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                n
                for n in body
                if not (
                    isinstance(n, ast.Expr)
                    and isinstance(n.value, ast.Constant)
                    and isinstance(n.value.value, str)
                )
            ]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _strip  # noqa: N815


@cache
def source_fingerprint(module_name: str) -> str:
    """Digest of a module's code without comments, docstrings and layout, so that a reworded text
    reruns nothing.
    """
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        raise IdentityError(
            "a module without a source file", module_name, "an importable .py module"
        )
    tree = _DropDocstrings().visit(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return digest_text(ast.dump(tree))
