"""The texts of prompts, compared without differences in case and spacing: which prompts of one set
of rows another set asks too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from ftsec_ray.conversation import Row, asked_text

if TYPE_CHECKING:
    from ftsec_ray.context import TaskData

ASKED = ("test", "harmful_test", "benign_test", "borderline_test")
"""Splits that the finished model is evaluated on."""


def plain(prompt: str) -> str:
    """A prompt without differences in case and spacing."""
    return " ".join(prompt.split()).casefold()


def prompts_of(rows: Iterable[Row]) -> set[str]:
    """What the rows ask, without differences in case and spacing."""
    return {plain(asked_text(row)) for row in rows}


def evaluated_prompts(task: TaskData) -> set[str]:
    """What the splits of a task ask that the finished model is evaluated on, in the form of
    `plain`.
    """
    known = [task.splits[name].to_pylist() for name in ASKED if name in task.splits]
    return set[str]().union(*map(prompts_of, known))


def asked_in(prompts: Iterable[str], rows: Iterable[Row]) -> set[str]:
    """Those of `prompts`, in the form of `plain`, that a row asks, also with other text around."""
    asked = prompts_of(rows)
    said = "\n".join(asked)
    return {one for one in prompts if one in asked or (one and one in said)}


def not_asked(rows: Sequence[Row], prompts: frozenset[str] | set[str]) -> list[dict[str, Any]]:
    """The rows whose prompt is not one of `prompts`, which are in the form of `plain`."""
    return [dict(row) for row in rows if plain(asked_text(row)) not in prompts]


def as_long(filler: str, text: str) -> str:
    """The words of `filler`, repeated or cut to as many words as `text` has."""
    return " ".join(islice(cycle(filler.split()), len(text.split())))
