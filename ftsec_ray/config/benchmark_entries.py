"""The benchmarks of a sweep file: relative paths of task files start at its folder, names stay
unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.local_files import named_path

KEY = "benchmarks"
SUFFIXES = (".yaml", ".yml")
"""Suffixes of the path of a task file; everything else is a name."""


def with_paths(evaluation: object, base: Path, faults: Faults) -> object:
    """The `evaluation` of a sweep file with absolute paths of its benchmarks; a duplicate benchmark
    is a fault.
    """
    given = evaluation.get(KEY) if isinstance(evaluation, Mapping) else None
    if not isinstance(evaluation, Mapping) or not isinstance(given, (list, tuple)):
        return evaluation  # the type check of the values reports this fault later
    resolved = [
        _with_path(entry, base, f"evaluation.{KEY}[{i}]", faults) for i, entry in enumerate(given)
    ]
    for index, entry in enumerate(resolved):
        if entry in resolved[:index]:
            faults.add(
                f"evaluation.{KEY}[{index}]",
                "a duplicate benchmark",
                given[index],
                "each benchmark once",
            )
    return {**evaluation, KEY: resolved}


def is_path(entry: str) -> bool:
    """Whether a benchmark entry is the path of a task file."""
    return entry.endswith(SUFFIXES)


def _with_path(entry: object, base: Path, place: str, faults: Faults) -> object:
    if not isinstance(entry, str) or not is_path(entry):
        return entry
    path = named_path(entry, base, place, faults)
    return entry if path is None else str(path.resolve())


def data_files(config: Mapping[str, Any], folder: Path) -> Any:
    """The `data_files` of a task with absolute paths, in their given structure (path, list or
    mapping); None if the task has none.

    Args:
        config: The task's configuration.
        folder: Folder of the task file, at which relative paths start.
    """
    given = (config.get("dataset_kwargs") or {}).get("data_files")

    def absolute(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: absolute(files) for split, files in value.items()}
        if isinstance(value, list):
            return [absolute(file) for file in value]
        return str((folder / str(value)).resolve())

    return None if given is None else absolute(given)
