"""The parts of a method's module docstring."""

from __future__ import annotations

import inspect
import re

SECTIONS = ("Paper", "Differs", "Cost", "Reads", "Needs")
"""`Reads` says with what care its results are to be read; a method may leave it out."""


def summary(doc: str) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join(doc.strip().split("\n\n")[0].split())


def sections(doc: str) -> dict[str, str]:
    """The parts of a module docstring: `""` for the text before the first section, then Paper,
    Differs, Cost, Reads, Needs.
    """
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(doc), flags=re.MULTILINE)
    found = {"": parts[0].strip()}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        found[name] = " ".join(text.split())
    return found
