"""Limits on the size of a sweep file: a file from an untrusted source must not exhaust the machine
that plans it.

A file cannot raise its own limits; environment variables can.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ftsec_ray.errors import SpecError

_PREFIX = "FTSEC_MAX_"


def limits_set() -> dict[str, str]:
    """The environment variables that set limits, to pass to processes on other machines; variables
    whose value is not a count are left out.
    """
    given = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in given.items() if value.isdecimal()}


@dataclass(frozen=True)
class Limit:
    """One limit of a sweep file, or of the files that it names."""

    name: str
    default: int
    counts: str
    """What the limit counts, in the plural."""

    @property
    def variable(self) -> str:
        """The environment variable that sets the limit."""
        return f"{_PREFIX}{self.name.upper()}"

    @property
    def value(self) -> int:
        """The current limit; SpecError if the environment variable is not a count."""
        given = os.environ.get(self.variable)
        if given is None:
            return self.default
        if not given.isdecimal() or len(given) > _MAX_DIGITS or int(given) < 1:
            raise SpecError(
                f"the environment variable {self.variable} is not a count", given, "integer >= 1"
            )
        return int(given)

    def exceeded_by(self, count: int, *, where: str = "", fix: str = "") -> SpecError | None:
        """The error for a count above the limit; None within the limit.

        Args:
            count: The number found.
            where: The file, for the message.
            fix: How to fix it, in place of the advice to split the sweep.
        """
        most = self.value
        if count <= most:
            return None
        return SpecError(
            f"too many {self.counts}",
            f"{count:,} in {where}" if where else f"{count:,}",
            f"at most {most:,}",
            fix or f"split the sweep, or set the environment variable {self.variable}",
        )


_MAX_DIGITS = 15
FILE_BYTES = Limit("file_bytes", 1_000_000, "bytes in a sweep file")
VALUES = Limit("values", 20_000, "values in a sweep file, with aliases expanded")
NESTING = Limit("nesting", 32, "nested levels of lists and mappings")
POINTS = Limit("grid_points", 5_000, "points of a grid")
RULES = Limit("exclude_rules", 1_000, "rules of exclude, with lists expanded")
CELLS = Limit("cells", 20_000, "cells, before exclude")
LIMITS = (FILE_BYTES, VALUES, NESTING, POINTS, RULES, CELLS)
LARGEST_INT = 2**63 - 1
"""Largest integer in a sweep file: it must fit a 64-bit column."""


def is_deeper(value: object, most: int) -> bool:
    """Whether a JSON value has more than `most` nested levels of lists and objects."""
    level: list[Any] = [value]
    for _ in range(most + 1):
        holders = [inner for inner in level if isinstance(inner, (dict, list))]
        if not holders:
            return False
        level = [
            inner
            for holder in holders
            for inner in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return True
