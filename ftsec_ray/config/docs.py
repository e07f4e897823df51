"""The texts beside the code: docstrings under dataclass fields and the sections of a method's
module docstring.
"""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from typing import Any

SECTIONS = ("Paper", "Differs", "Cost", "Needs")


@cache
def _class_docs(cls: Any) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    body = ast.parse(inspect.cleandoc("\n" + source) if source[:1].isspace() else source).body[0]
    docs: dict[str, str] = {}
    name: str | None = None
    for node in getattr(body, "body", []):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            and name
        ):
            docs[name] = " ".join(node.value.value.split())
        name = (
            node.target.id
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            else None
        )
    return docs


@cache
def field_docs(cls: Any) -> dict[str, str]:
    """Field name -> the docstring under it, over a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object:
            docs |= _class_docs(base)
    return docs


def summary(doc: str) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join(doc.strip().split("\n\n")[0].split())


def sections(doc: str) -> dict[str, str]:
    """The parts of a module docstring: `""` for the text before the first section, then Paper,
    Differs, Cost, Needs.
    """
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(doc), flags=re.MULTILINE)
    found = {"": parts[0].strip()}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        found[name] = " ".join(text.split())
    return found
