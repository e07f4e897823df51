"""Lift: an attack's success minus the same metric of the same model without attack and defense.

A model that fulfils many forbidden requests anyway makes every attack look strong: a success of
0.95 over a base of 0.94 is no attack. Both sides answered the same prompts in the same seeds, and
the interval is that of `comparisons` (see `results.paired`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftsec_ray.results.answers import Answers, answers_of
from ftsec_ray.results.paired import paired, plain
from ftsec_ray.results.points import NONE, GridPoint
from ftsec_ray.success import is_driven_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftsec_ray.results.read import Results


@dataclass(frozen=True, kw_only=True)
class Lift:
    """Success of an attack minus the same metric without attack and defense."""

    value: float
    base: float
    low: float | None = None
    """95 %, over prompts and, from two seeds on, over seeds; None if verdicts per prompt are not
    stored for both sides."""
    high: float | None = None

    @property
    def text(self) -> str:
        """The lift with its interval."""
        ends = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.value:+.2f}{ends}".replace("-", "−")


def lifts(results: Results, points: Sequence[GridPoint]) -> dict[str, Lift]:
    """First cell of a point -> its lift, for attacked points whose success metric was also measured
    on the model without attack and defense.
    """
    bases = {point.slice: point for point in points if point.attack == NONE and not point.defenses}
    pairs = [
        (point, base)
        for point in points
        if point.attack != NONE
        and (base := bases.get(point.slice)) is not None
        and point.value(point.success_metric) is not None
        and base.value(point.success_metric) is not None
    ]
    if not pairs:
        return {}
    answers = answers_of(results.cells["cell"].to_pylist(), results.generations, points)
    return {point.cell["cell"]: _lift(answers, point, base) for point, base in pairs}


def _lift(answers: Answers, point: GridPoint, base: GridPoint) -> Lift:
    metric = point.success_metric
    sign = 1 if is_driven_up(metric) else -1
    ours, theirs = point.measured[metric].value, base.measured[metric].value
    shared = sorted(set(point.runs(metric)) & set(base.runs(metric)))
    plain_base = theirs if sign > 0 else 1 - theirs
    sides = [[point_of.cell_of[seed] for seed in shared] for point_of in (point, base)]
    cells = [cell for side in sides for cell in side]
    is_paired = bool(shared) and all(
        answers.asked(cell, metric) and (cell, metric) not in answers.foreign for cell in cells
    )
    if not is_paired:
        return Lift(value=sign * (ours - theirs), base=plain_base)
    matrix = answers.hits[metric]
    comparison = paired(*(matrix[[[answers.line[cell] for cell in side]]] for side in sides))
    low, high = plain(comparison.low[0]), plain(comparison.high[0])
    if low is None or high is None:
        return Lift(value=sign * (ours - theirs), base=plain_base)
    ends = (low, high) if sign > 0 else (-high, -low)
    return Lift(
        value=sign * float(comparison.effect[0]), base=plain_base, low=ends[0], high=ends[1]
    )
