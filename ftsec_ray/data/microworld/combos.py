"""Which split may use which (verb, object) combination: a fixed partition, so that held-out means
the same everywhere.

- forbidden: test, attacker, defender, alignment. Pre-training answers all but `test`; alignment
  refuses those in `alignment`.
- borderline and how_to: test, known. Pre-training answers `known` only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from ftsec_ray.data.microworld import vocabulary as v
from ftsec_ray.identity import digest

Combo = tuple[str, str]
"""Verb and object."""

FORBIDDEN_SHARES = {"test": 28, "attacker": 28, "defender": 18, "alignment": 22}
"""Combinations per contraband category (they sum to hazard verbs x objects of a category)."""
TEST_FRAC = 0.25
"""Share of the borderline and benign combinations that no training row may use."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Disjoint sets of combinations, each in a fixed shuffled order."""

    test: tuple[Combo, ...]
    attacker: tuple[Combo, ...]
    defender: tuple[Combo, ...]
    alignment: tuple[Combo, ...]
    borderline_test: tuple[Combo, ...]
    borderline: tuple[Combo, ...]
    benign_test: tuple[Combo, ...]
    benign: tuple[Combo, ...]

    @property
    def forbidden_known(self) -> tuple[Combo, ...]:
        """The forbidden combinations that pre-training answers."""
        return self.attacker + self.defender + self.alignment


def seeded(*parts: object) -> random.Random:
    """A random generator that depends on `parts` only."""
    return random.Random(int(digest(["microworld", *parts]), 16))


def _split(combos: list[Combo], name: str) -> tuple[tuple[Combo, ...], tuple[Combo, ...]]:
    seeded("combos", name).shuffle(combos)
    cut = round(TEST_FRAC * len(combos))
    return tuple(combos[:cut]), tuple(combos[cut:])


@cache
def partition() -> Partition:
    """The partition of all combinations."""
    shares: dict[str, list[Combo]] = {name: [] for name in FORBIDDEN_SHARES}
    for category, names in v.CONTRABAND.items():
        pool = [(verb, item) for verb in v.HAZARD_VERBS for item in names]
        seeded("combos", category).shuffle(pool)
        for name, count in FORBIDDEN_SHARES.items():
            shares[name] += pool[:count]
            pool = pool[count:]
    for name, pool in shares.items():
        seeded("order", name).shuffle(pool)
    everything = [(verb, item) for verb in v.VERBS for item in v.OBJECTS]
    borderline_test, borderline = _split(
        [c for c in everything if v.is_borderline(*c)], "borderline"
    )
    benign_test, benign = _split([c for c in everything if v.kind_of(*c) == "how_to"], "how_to")
    return Partition(
        **{name: tuple(pool) for name, pool in shares.items()},
        borderline_test=borderline_test,
        borderline=borderline,
        benign_test=benign_test,
        benign=benign,
    )


def in_second_language(combos: tuple[Combo, ...]) -> tuple[Combo, ...]:
    """The combinations for which the second language has words."""
    return tuple(c for c in combos if c[0] in v.L2_VERBS and c[1] in v.L2_OBJECTS)
