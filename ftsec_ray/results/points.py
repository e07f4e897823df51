"""The grid over its seeds: one point is a model, a task, an attack with its parameters and a stack
of defenses with their parameters.

Comparisons, aggregates, the Markdown table, the report page and the claims read these points.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ftsec_ray import schema
from ftsec_ray.measured import (
    Measured,
    Nulls,
    Utility,
    pooled,
    summed,
    utility_metrics,
)
from ftsec_ray.success import is_driven_up, shown_metric

Row = Mapping[str, Any]
NONE = "none"
SUCCESS = "attack_success"
"""The attack's success: its declared success metric as the share of prompts at which it succeeded
(1 - cacc for an attack that lowers clean accuracy).
"""
PLACE = ("model", "task", "attack", "attack_params", "defenses", "defense_params")
"""Columns of `cells` that all seeds of a point share."""


@dataclass(kw_only=True)
class GridPoint:
    """One point of the grid over all its seeds."""

    cell: Row
    """The row of `cells` of its first seed."""
    seeds: dict[str, int] = field(default_factory=dict)
    """Cell -> seed."""
    statuses: Counter[str] = field(default_factory=Counter)
    values: dict[str, dict[str, Measured]] = field(default_factory=lambda: defaultdict(dict))
    """Metric -> cell -> value."""
    without_value: dict[str, dict[str, Nulls | None]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """Metric -> cell in which no answer could be judged -> its null verdicts."""

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.cell["model"])

    @property
    def family(self) -> str:
        """Family of the model."""
        return self.cell["family"] or ""

    @property
    def size(self) -> int | None:
        """Weights of the model."""
        return self.cell["model_params"]  # type: ignore[no-any-return]

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.cell["task"]  # type: ignore[no-any-return]

    @property
    def slice(self) -> tuple[str, str]:
        """Model and task."""
        return self.model, self.task

    @property
    def attack(self) -> str:
        """Name of the attack."""
        return str(self.cell["attack"])

    @cached_property
    def params(self) -> dict[str, Any]:
        """Parameters of the attack."""
        return _params(self.cell["attack_params"])

    @cached_property
    def stack(self) -> tuple[tuple[str, str], ...]:
        """Name and parameters (JSON) of each defense."""
        return tuple((name, json.dumps(own, sort_keys=True)) for name, own in stack_of(self.cell))

    @property
    def defenses(self) -> tuple[str, ...]:
        """Names of the defenses."""
        return tuple(self.cell["defenses"] or ())

    @property
    def success_metric(self) -> str:
        """The metric that is the attack's success."""
        return shown_metric(self.cell)

    @property
    def status(self) -> str:
        """done, partly, failed or pending."""
        if set(self.statuses) == {"done"}:
            return "done"
        if self.statuses["done"]:
            return "partly"
        return "failed" if self.statuses["failed"] else "pending"

    @cached_property
    def cell_of(self) -> dict[int, str]:
        """Seed -> cell."""
        return {seed: cell for cell, seed in self.seeds.items()}

    def runs(self, metric: str) -> dict[int, Measured]:
        """Seed -> the value of a metric, for seeds that have one."""
        return {
            self.seeds[cell]: measured for cell, measured in self.values.get(metric, {}).items()
        }

    @property
    def successes(self) -> dict[int, Measured]:
        """Seed -> the share of prompts at which the attack succeeded, where it was measured."""
        return self.successes_by(self.success_metric)

    def successes_by(self, metric: str) -> dict[int, Measured]:
        """The same with the success metric of another attack."""
        return {seed: as_success(metric, measured) for seed, measured in self.runs(metric).items()}

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """Every metric with a value in some seed, over those seeds."""
        return {
            metric: replace(
                pooled(list(own.values()), is_share=is_share(metric)), nulls=self.nulls(metric)
            )
            for metric, own in self.values.items()
        }

    def value(self, metric: str = SUCCESS) -> Measured | None:
        """A metric over the seeds, or the attack's success; None where it has no value."""
        if metric != SUCCESS:
            return self.measured.get(metric)
        measured = self.measured.get(self.success_metric)
        return None if measured is None else as_success(self.success_metric, measured)

    def nulls(self, metric: str) -> Nulls | None:
        """Null verdicts of a metric over all seeds, also of those without a value."""
        return summed(
            [measured.nulls for measured in self.values.get(metric, {}).values()]
            + list(self.without_value.get(metric, {}).values())
        )

    @property
    def unjudged(self) -> dict[str, int]:
        """Metrics without a value in any seed -> the answers that could not be judged."""
        return {
            metric: sum(nulls[0] for nulls in own.values() if nulls)
            for metric, own in self.without_value.items()
            if metric not in self.values
        }

    @property
    def is_incoherent(self) -> bool:
        """Whether most of the model's answers are incoherent: then low attack success is not
        safety. False if coherence was not measured.
        """
        coherent = self.value("coherent_rate")
        return coherent is not None and coherent.value < schema.INCOHERENT_BELOW

    @property
    def utility_metrics(self) -> tuple[str, ...]:
        """The utility metrics that are shown with its safety metrics."""
        return utility_metrics({*self.values, *self.without_value})


def as_success(metric: str, measured: Measured) -> Measured:
    """A success metric as the share of prompts at which the attack succeeded."""
    return measured if is_driven_up(metric) else measured.complement


def is_share(metric: str) -> bool:
    """Whether a metric is a share of judged items."""
    return metric in schema.METRICS and schema.METRICS[metric].proportion


def points_of(cells: Iterable[Row], metrics: Iterable[Row]) -> list[GridPoint]:
    """The points of rows of `cells` with their rows of `metrics`, in the order of the cells."""
    points: dict[tuple[Any, ...], GridPoint] = {}
    point_of: dict[str, GridPoint] = {}
    for cell in cells:
        point = points.setdefault(place_of(cell), GridPoint(cell=cell))
        point.seeds[cell["cell"]] = cell["seed"] or 0
        point.statuses[cell["status"]] += 1
        point_of[cell["cell"]] = point
    rows = [row for row in metrics if row["cell"] in point_of]
    beside = utilities(rows)
    for row in rows:
        cell, metric = row["cell"], row["metric"]
        null = row.get("n_null")
        nulls = None if null is None else (null, null + (row["n"] or 0))
        if row["value"] is None:
            point_of[cell].without_value[metric][cell] = nulls
            continue
        ends = row["ci_low"], row["ci_high"]
        point_of[cell].values[metric][cell] = Measured(
            value=row["value"],
            n=row["n"],
            n_null=null,
            prompts=None if None in ends else ends,
            nulls=nulls,
            utility=beside[cell],
        )
    return list(points.values())


def utilities(metrics: Iterable[Row]) -> dict[str, Utility]:
    """The utility of every measured cell, from the rows of the table `metrics`."""
    values: dict[str, dict[str, float | None]] = defaultdict(dict)
    for row in metrics:
        values[row["cell"]][row["metric"]] = row["value"]
    return {
        cell: Utility(*(own.get(metric) for metric in utility_metrics(own)))
        for cell, own in values.items()
    }


def place_of(cell: Row) -> tuple[Any, ...]:
    """Key of what a cell shares with its other seeds."""
    return tuple(tuple(cell[name] or ()) if name == "defenses" else cell[name] for name in PLACE)


# Names.


def stack_of(cell: Row) -> list[tuple[str, dict[str, Any]]]:
    """Name and parameters of each defense of a row of `cells`."""
    names = cell["defenses"] or []
    params = json.loads(cell["defense_params"] or "[]") or [{} for _ in names]
    return list(zip(names, params, strict=True))


def method_names(cells: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Cell -> its attack and its stack, with the parameters that differ between these cells."""
    attacks = [(cell["attack"], _params(cell["attack_params"])) for cell in cells]
    stacks = [stack_of(cell) for cell in cells]
    of_attacks, of_defenses = (
        _varied(attacks),
        _varied([defense for stack in stacks for defense in stack]),
    )
    return {
        cell["cell"]: (
            _named(*attack, of_attacks),
            " + ".join(_named(*defense, of_defenses) for defense in stack) or NONE,
        )
        for cell, attack, stack in zip(cells, attacks, stacks, strict=True)
    }


def attack_name(point: GridPoint, among: Iterable[GridPoint]) -> str:
    """A point's attack, with those parameters that differ between these points."""
    return _named(point.attack, point.params, _varied([(one.attack, one.params) for one in among]))


def sizes_of(cells: Iterable[Mapping[str, Any]]) -> dict[str, int | None]:
    """Number of parameters of every model; None if no cell knows it, as no pending one does."""
    sizes: dict[str, int | None] = {}
    for cell in cells:
        sizes[cell["model"]] = cell["model_params"] or sizes.get(cell["model"])
    return sizes


def _params(text: str | None) -> dict[str, Any]:
    try:
        params = json.loads(text or "{}")
    except ValueError:
        return {}
    return params if isinstance(params, dict) else {}


def _varied(methods: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Method -> its parameters that differ somewhere, sorted."""
    seen: dict[str, list[dict[str, str]]] = defaultdict(list)
    for name, params in methods:
        seen[name].append({key: json.dumps(own, sort_keys=True) for key, own in params.items()})
    return {
        name: sorted(key for key in set().union(*given) if len({one.get(key) for one in given}) > 1)
        for name, given in seen.items()
    }


def _named(name: str, params: Mapping[str, Any], varied: Mapping[str, Sequence[str]]) -> str:
    shown = ", ".join(f"{key} {params[key]}" for key in varied[name] if key in params)
    return f"{name} ({shown})" if shown else name
