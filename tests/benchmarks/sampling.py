"""Which cells of a grid stand for all of them, and what their times say of the whole."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftsec_ray.plan import Cell
from ftsec_ray.registry import name_of


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One cell that ran the naive way."""

    cell: Cell
    wall_s: float
    """From the start of its process to its end."""
    parts: dict[str, float]
    metrics: dict[str, float | None]

    def whole(self) -> float:
        """All of its time."""
        return self.wall_s

    def work(self) -> float:
        """Its time without the start and the imports of its process."""
        return self.wall_s - self.parts["process"] - self.parts["import"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A total over all cells from a sample of them."""

    total: float
    low: float
    high: float
    """95 %; equal to the total when all cells ran, and infinitely wide when the sample is too small
    to tell.
    """


def attack_of(cell: Cell) -> str:
    """Name of a cell's attack."""
    return name_of(cell.attack)


def stack_of(cell: Cell) -> str:
    """Names of a cell's defenses."""
    return "+".join(map(name_of, cell.defenses)) or "none"


def model_of(cell: Cell) -> str:
    """Name of a cell's model."""
    return cell.model.name


def shown(cell: Cell) -> str:
    """A cell in one line of columns."""
    return f"{model_of(cell):12} {attack_of(cell):17} {stack_of(cell):17} seed {cell.seed}"


def draw(cells: Sequence[Cell], count: int, *, seed: int) -> list[Cell]:
    """`count` cells spread evenly over attack x defenses first, then over models with either; all
    of them for 0.
    """
    rest = random.Random(seed).sample(list(cells), len(cells))
    seen: Counter[tuple[str, ...]] = Counter()
    chosen: list[Cell] = []

    def crowding(cell: Cell) -> tuple[int, int, int]:
        attack, stack, model = attack_of(cell), stack_of(cell), model_of(cell)
        alone = seen[attack,] + seen[stack,] + seen[model,]
        return seen[attack, stack], seen[model, stack] + seen[model, attack], alone

    while rest and (not count or len(chosen) < count):
        cell = min(rest, key=crowding)
        rest.remove(cell)
        chosen.append(cell)
        attack, stack, model = attack_of(cell), stack_of(cell), model_of(cell)
        seen.update(
            [(attack,), (stack,), (model,), (attack, stack), (model, stack), (model, attack)]
        )
    return chosen


def grouped(
    ran: Sequence[Ran], key: Callable[[Cell], Any], seconds: Callable[[Ran], float] = Ran.whole
) -> dict[Any, list[float]]:
    """Seconds of the cells by a key."""
    groups: dict[Any, list[float]] = {}
    for one in ran:
        groups.setdefault(key(one.cell), []).append(seconds(one))
    return groups


def estimate(
    cells: Sequence[Cell], ran: Sequence[Ran], *, seconds: Callable[[Ran], float], slots: int
) -> Estimate:
    """Seconds of all cells: strata are model x defenses where each has two measured cells, else
    models, else one.
    """
    from scipy.stats import t

    least = sum(map(seconds, ran)) / slots
    keys: tuple[Callable[[Cell], Any], ...] = (
        lambda c: (model_of(c), stack_of(c)),
        model_of,
        lambda c: "all",
    )
    for key in keys:
        groups, sizes = grouped(ran, key, seconds), Counter(map(key, cells))
        if all(len(groups.get(name, ())) >= min(2, size) for name, size in sizes.items()):
            break
    else:
        return Estimate(total=least * len(cells) / len(ran), low=least, high=math.inf)
    total, variance = 0.0, 0.0
    for name, size in sizes.items():
        values = groups[name]
        mean = sum(values) / len(values)
        total += size * mean / slots
        if size > len(values):
            spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            variance += size**2 * (1 - len(values) / size) * spread / len(values) / slots**2
    half = float(t.ppf(0.975, max(1, len(ran) - len(sizes)))) * variance**0.5
    return Estimate(total=total, low=max(least, total - half), high=total + half)
