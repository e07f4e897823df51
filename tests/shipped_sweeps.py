"""The sweep files of the repository, and what each needs to be planned."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))


def beside_its_inputs(path: Path, folder: Path) -> Path:
    """A copy of a sweep file beside files of the names that it mentions: a plan needs that they
    exist, not what they hold.
    """
    copy = folder / "sweeps" / path.name
    copy.parent.mkdir(parents=True)
    shutil.copy(path, copy)
    shutil.copytree(FOLDER / "benchmarks", copy.parent / "benchmarks")
    benchmarks = (FOLDER / "benchmarks").glob("*.yaml")
    data = [
        name for file in benchmarks for name in re.findall(r"test: ([^,}\s]+)", file.read_text())
    ]
    for name in [*inputs_of(path), *(name.removeprefix("../") for name in data)]:
        given = copy.parent / name
        given.parent.mkdir(parents=True, exist_ok=True)
        given.write_text(name)
    return copy


def inputs_of(path: Path) -> list[str]:
    """Paths of the files beside the repository that a sweep file names, each once."""
    named = re.findall(r"(?:path|model): (\.\.[^,}\s]+)", path.read_text(encoding="utf-8"))
    return list(dict.fromkeys(named))
