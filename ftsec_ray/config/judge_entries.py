"""Judges of a sweep file that are models: rubrics are read, and relative paths start at the file's
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
    """The `evaluation` of a sweep file with its judges as they are meant, whatever else is in it.

    Args:
        given: The mapping, or whatever stands there.
        base: Folder of relative paths.
        faults: Takes what is wrong with a judge that is a mapping, each key by its place.
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
"""In the place of a judge whose fault is told."""


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
    """A model of the sweep file's folder by its whole path; any other as it is."""
    path = named_path(source, base, place, faults) if source else None
    is_path = path is not None and (looks_local(source) or path.exists())
    return str(path.resolve()) if path is not None and is_path else source


def _rubric(given: str, base: Path, place: str, faults: Faults, marks: Sequence[str]) -> str | None:
    text, want = given, f"a text with {', '.join(marks)}, or the path of a file with one"
    if not any(mark in given for mark in marks) and "\n" not in given:
        try:
            text = (base / Path(given).expanduser()).read_text(encoding="utf-8")
        except (OSError, RuntimeError, ValueError) as error:  # the second: no such home
            faults.add(place, "a rubric that cannot be read", given, want, str(error))
            return None
    missing = [mark for mark in marks if mark not in text]
    if missing:
        faults.add(place, "a rubric that does not show what is judged", text[:200], want)
    return text
