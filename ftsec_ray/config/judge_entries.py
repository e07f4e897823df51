"""Judge models of a sweep file: reads their rubrics and resolves paths relative to the file's
folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.local_files import looks_local, named_path
from ftsec_ray.config.sweep import JudgeConfig
from ftsec_ray.config.typed import parse

PLACES = ("{request}", "{answer}")
PAIR_PLACES = ("{request}", "{first}", "{second}")


def with_judges(given: object, base: Path, faults: Faults) -> object:
    """The `evaluation` of a sweep file with rubrics read and paths resolved in its judges.

    Args:
        given: The value of `evaluation`; returned unchanged if it is not a mapping.
        base: Folder at which relative paths start.
        faults: Collects the faults of judges that are mappings, each under the place of its key.
    """
    if not isinstance(given, Mapping):
        return given
    plain = dict(given)
    if "judge" in plain:
        plain["judge"] = _judge(plain["judge"], base, "evaluation.judge", faults)
    if isinstance(plain.get("win_rate"), Mapping):
        plain["win_rate"] = _judge(
            plain["win_rate"], base, "evaluation.win_rate", faults, PAIR_PLACES
        )
    if isinstance(plain.get("judges"), (list, tuple)):
        plain["judges"] = [
            _judge(judge, base, f"evaluation.judges[{i}]", faults)
            for i, judge in enumerate(plain["judges"])
        ]
    return {key: value for key, value in plain.items() if value is not _WRONG}


_WRONG = object()
"""Stands for a judge whose fault is already recorded."""


def _judge(
    given: object, base: Path, place: str, faults: Faults, marks: Sequence[str] = PLACES
) -> Any:
    if isinstance(given, str):
        file, colon, source = given.partition(":")
        return f"{file}:{_located(source, base, place, faults)}" if colon else given
    if not isinstance(given, Mapping):
        return given
    plain = dict(given)
    if isinstance(plain.get("rubric"), str):
        plain["rubric"] = _rubric(plain["rubric"], base, f"{place}.rubric", faults, marks)
    if isinstance(plain.get("model"), str) and "endpoint" not in plain:
        plain["model"] = _located(plain["model"], base, f"{place}.model", faults)
    return plain if parse(JudgeConfig, plain, place, faults) is not None else _WRONG


def _located(source: str, base: Path, place: str, faults: Faults) -> str:
    """The absolute path of a local model; any other source unchanged."""
    path = named_path(source, base, place, faults) if source else None
    is_path = path is not None and (looks_local(source) or path.exists())
    return str(path.resolve()) if path is not None and is_path else source


def _rubric(given: str, base: Path, place: str, faults: Faults, marks: Sequence[str]) -> str | None:
    text, want = given, f"a text that contains {', '.join(marks)}, or the path of such a file"
    if not any(mark in given for mark in marks) and "\n" not in given:
        try:
            text = (base / Path(given).expanduser()).read_text(encoding="utf-8")
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~` has no home folder
            faults.add(place, "cannot read this rubric file", given, want, str(error))
            return None
    missing = [mark for mark in marks if mark not in text]
    if missing:
        faults.add(place, f"the rubric lacks {', '.join(missing)}", text[:200], want)
    return text
