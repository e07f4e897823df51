"""Distinct reviews, notes, tool calls and texts; a hash of its text assigns each to pre-training,
fine-tuning or test.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache

from ftsec_ray.data.microworld import templates
from ftsec_ray.data.microworld.combos import seeded
from ftsec_ray.identity import unit_interval

Example = tuple[str, str]
"""The prompt and the right response."""

SHARES = {"pretrain": (0.0, 0.5), "tune": (0.5, 0.75), "test": (0.75, 1.0)}
"""Part of [0, 1) in which the hash of a text must lie for each use."""


def _text(rng: random.Random) -> Example:
    return "", templates.plain_text(rng)


MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "two_class": templates.review,
    "four_class": templates.note,
    "tool": templates.tool_call,
    "text": _text,
}


def stream(kind: str, use: str) -> Iterator[Example]:
    """Endless examples of one kind for one use; they may repeat, but never across uses."""
    low, high = SHARES[use]
    rng = seeded("pool", kind, use)
    while True:
        example = MAKERS[kind](rng)
        if low <= unit_interval("microworld", kind, *example) < high:
            yield example


@cache
def distinct(kind: str, use: str, count: int, tries: int = 20_000) -> tuple[Example, ...]:
    """The first `count` distinct examples of one kind for one use; fewer if there are no more."""
    found: dict[Example, None] = {}
    for tried, example in enumerate(stream(kind, use)):
        found[example] = None
        if len(found) == count or tried == tries:
            break
    return tuple(found)
