"""How large a sweep file may be: a file from a stranger must not take the machine of whoever plans
it.

A file cannot raise its own limits; the variables of the environment do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ftsec_ray.errors import SpecError

_PREFIX = "FTSEC_MAX_"


def limits_set() -> dict[str, str]:
    """The variables of this environment that set limits, for processes on other machines: counts
    alone, whatever else has such a name.
    """
    given = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in given.items() if value.isdecimal()}


@dataclass(frozen=True)
class Limit:
    """One limit of a sweep file, or of the files that it names."""

    name: str
    default: int
    counts: str
    """What is counted, in the plural."""

    @property
    def variable(self) -> str:
        """The variable of the environment that sets it."""
        return f"{_PREFIX}{self.name.upper()}"

    @property
    def value(self) -> int:
        """The limit in force; SpecError where the variable is no count."""
        given = os.environ.get(self.variable)
        if given is None:
            return self.default
        if not given.isdecimal() or len(given) > _MAX_DIGITS or int(given) < 1:
            raise SpecError(f"{self.variable} is not a count", given, "a whole number, >= 1")
        return int(given)

    def exceeded_by(self, count: int, *, where: str = "", fix: str = "") -> SpecError | None:
        """The fault of a file that holds `count` of them; None within the limit. `where` names the
        file, `fix` says what else than splitting the sweep helps.
        """
        most = self.value
        if count <= most:
            return None
        return SpecError(
            f"too many {self.counts}",
            f"{count:,} in {where}" if where else f"{count:,}",
            f"at most {most:,}",
            fix or f"split the sweep, or set {self.variable} in the environment",
        )


_MAX_DIGITS = 15
FILE_BYTES = Limit("file_bytes", 1_000_000, "bytes in a sweep file")
VALUES = Limit("values", 20_000, "values in a sweep file, aliases followed")
NESTING = Limit("nesting", 32, "levels of lists and mappings inside one another")
POINTS = Limit("grid_points", 5_000, "points of a grid")
RULES = Limit("exclude_rules", 1_000, "rules of exclude, lists inside them written out")
CELLS = Limit("cells", 20_000, "cells, before exclude")
LIMITS = (FILE_BYTES, VALUES, NESTING, POINTS, RULES, CELLS)
LARGEST_INT = 2**63 - 1
"""Ints in a sweep file have 64 bits, so that each fits a column and a float."""


def is_deeper(value: object, most: int) -> bool:
    """Whether a value of JSON has more than so many lists and objects inside one another."""
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
