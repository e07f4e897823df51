"""The parts of a method's module docstring."""

from __future__ import annotations

import inspect
import re

SECTIONS = ("Paper", "Differs", "Published", "Cost", "Reads", "Needs")
"""Two are optional. `Published`: the paper's own number, with model and data. `Reads`: a caution
for whoever interprets the method's results."""


def summary(doc: str) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join(doc.strip().split("\n\n")[0].split())


def sections(doc: str) -> dict[str, str]:
    """The parts of a module docstring: `""` for the text before the first section, then Paper,
    Differs, Published, Cost, Reads, Needs.
    """
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(doc), flags=re.MULTILINE)
    texts = {"": parts[0].strip()}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        texts[name] = " ".join(text.split())
    return texts
