"""The code blocks of the documents about sweeps and their results, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SWEEP_FILE = ROOT / "sweeps/README.md"
READING_RESULTS = ROOT / "sweeps/READING_RESULTS.md"
RESULTS = ROOT / "sweeps/RESULTS.md"
DOCUMENTS = (README, SWEEP_FILE, READING_RESULTS, RESULTS)


def blocks_of(document: Path, language: str) -> list[str]:
    """The code blocks of one language, in order."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
