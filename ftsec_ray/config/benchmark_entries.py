"""The benchmarks of a sweep file: paths of task files start at its folder, names stay as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.local_files import named_path

KEY = "benchmarks"
SUFFIXES = (".yaml", ".yml")
"""What the path of a task file ends with; everything else is a name."""


def with_paths(evaluation: object, base: Path, faults: Faults) -> object:
    """What a file says under `evaluation`, with the paths of its benchmarks made whole; a fault for
    a benchmark that is named twice.
    """
    given = evaluation.get(KEY) if isinstance(evaluation, Mapping) else None
    if not isinstance(evaluation, Mapping) or not isinstance(given, (list, tuple)):
        return evaluation  # whoever reads the values says what is wrong with them
    whole = [
        _with_path(entry, base, f"evaluation.{KEY}[{i}]", faults) for i, entry in enumerate(given)
    ]
    for index, entry in enumerate(whole):
        if entry in whole[:index]:
            faults.add(
                f"evaluation.{KEY}[{index}]",
                "the same benchmark twice",
                given[index],
                "each benchmark once",
            )
    return {**evaluation, KEY: whole}


def is_path(entry: str) -> bool:
    """Whether a benchmark is a task file of one's own."""
    return entry.endswith(SUFFIXES)


def _with_path(entry: object, base: Path, place: str, faults: Faults) -> object:
    if not isinstance(entry, str) or not is_path(entry):
        return entry
    path = named_path(entry, base, place, faults)
    return entry if path is None else str(path.resolve())


def data_files(config: Mapping[str, Any], folder: Path) -> Any:
    """`data_files` of a task in the shape that it gives them, with whole paths that start at the
    folder of the task file; None where it has none.
    """
    given = (config.get("dataset_kwargs") or {}).get("data_files")

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: whole(files) for split, files in value.items()}
        if isinstance(value, list):
            return [whole(file) for file in value]
        return str((folder / str(value)).resolve())

    return None if given is None else whole(given)
