"""Seeds folded into points: the mean over seeds with two spreads, over prompts within a run and
over seeds.

Over prompts: the Wilson interval at one seed's number of prompts. All seeds answer the same
prompts, so that counting each prompt once per seed would promise a precision that is not there.

Over seeds: the t interval on the seeds' values, from two seeds on. A bootstrap that resamples seeds
has three values to draw from when there are three, cannot leave their range and is far too narrow;
t at two degrees of freedom is wide because so little is known. With many seeds the two agree, since
the mean of many is nearly normal, so that t serves for any number. One seed has no such spread, and
everything that shows it says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.results.intervals import wilson

if TYPE_CHECKING:
    import pyarrow as pa

Interval = tuple[float, float]
PLACE = ("model", "task", "attack", "attack_params", "defenses", "defense_params")
"""Columns of `cells` that all seeds of a point share."""


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One metric of one point over its seeds."""

    value: float
    n_seeds: int
    n_prompts: int | None
    """Judged items of one seed, the smallest of the seeds."""
    n_null: int | None
    """Null verdicts of one seed, the largest of the seeds; None where no judge gives verdicts, and
    in results that did not count them.
    """
    prompts: Interval | None
    """95 % over prompts; None where the metric is no share."""
    seeds: Interval | None
    """95 % over seeds; None with one seed."""

    @property
    def span(self) -> Interval | None:
        """The interval that covers both spreads."""
        known = [one for one in (self.prompts, self.seeds) if one is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def folded(rows: Sequence[Mapping[str, Any]], metric: str) -> Aggregate:
    """One metric's rows (`value`, `n`, `n_null`, `ci_low`, `ci_high`; one per seed, no value null)
    as one aggregate.
    """
    values = [row["value"] for row in rows]
    mean = sum(values) / len(values)
    n = min((row["n"] for row in rows if row["n"] is not None), default=None)
    nulls = max((row["n_null"] for row in rows if row["n_null"] is not None), default=None)
    is_share = metric in schema.METRICS and schema.METRICS[metric].proportion
    if len(rows) == 1:
        low, high = rows[0]["ci_low"], rows[0]["ci_high"]
        prompts = None if low is None or high is None else (low, high)
        return Aggregate(
            value=mean, n_seeds=1, n_prompts=n, n_null=nulls, prompts=prompts, seeds=None
        )
    low, high = t_interval(values)
    return Aggregate(
        value=mean,
        n_seeds=len(rows),
        n_prompts=n,
        n_null=nulls,
        prompts=wilson(mean, n) if is_share and n else None,
        seeds=(max(0.0, low), min(1.0, high)) if is_share else (low, high),
    )


def null_frac(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of null verdicts among all answers of rows of `metrics`, 0..1; None where they were
    not counted or nothing was asked.
    """
    known = [row for row in rows if row["n_null"] is not None]
    asked = sum(row["n_null"] + (row["n"] or 0) for row in known)
    return sum(row["n_null"] for row in known) / asked if asked else None


def t_interval(values: Sequence[float]) -> Interval:
    """The 95 % t interval of the mean of two or more values."""
    from scipy.special import stdtrit

    mean, free = sum(values) / len(values), len(values) - 1
    half = float(stdtrit(free, 0.975)) * math.sqrt(
        sum((value - mean) ** 2 for value in values) / free / len(values)
    )
    return mean - half, mean + half


def aggregate(cells: pa.Table, metrics: pa.Table) -> pa.Table:
    """Every point and metric of a run (schema.aggregates); what no seed has measured has no row."""
    import pyarrow as pa

    points: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    shared: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells.to_pylist():
        key = place_of(cell)
        points[key].append(cell["cell"])
        shared.setdefault(key, {name: cell[name] for name in PLACE})
    measured: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in metrics.to_pylist():
        if row["value"] is not None:
            measured[row["cell"]][row["metric"]] = row
    order = {name: index for index, name in enumerate(schema.METRICS)}
    found = []
    for key in sorted(points, key=repr):
        names = {name for cell in points[key] for name in measured.get(cell, ())}
        for name in sorted(names, key=lambda one: (order.get(one, len(order)), one)):
            one = folded(
                [measured[cell][name] for cell in points[key] if name in measured.get(cell, ())],
                name,
            )
            found.append(
                {
                    **shared[key],
                    "metric": name,
                    "value": one.value,
                    "n_seeds": one.n_seeds,
                    "n_planned": len(points[key]),
                    "n_prompts": one.n_prompts,
                    "n_null": one.n_null,
                    **_ends("prompts", one.prompts),
                    **_ends("seeds", one.seeds),
                    **_ends("ci", one.span),
                }
            )
    return pa.Table.from_pylist(found, schema.aggregates())


def place_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a cell shares with its other seeds, as a key."""
    return (
        cell["model"],
        cell["task"],
        cell["attack"],
        cell["attack_params"],
        tuple(cell["defenses"] or ()),
        cell["defense_params"],
    )


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
