"""The sweep as a grid: seeds folded into points, methods labelled by what varies, an interval on
every number.

A point is model x task x attack x defense stack. Its estimate is the mean over seeds with the
spreads of `results.aggregate`; its interval spans both, and with one seed it is the cell's own.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.errors import DataError
from ftsec_ray.results.aggregate import folded, place_of
from ftsec_ray.success import ASR, WITHOUT_TRIGGER, is_driven_up, shown_metric, source_of

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

NONE = "none"
SUCCESS = "attack_success"
"""The view over the success metric that each attack declares, as the share of prompts at which it
succeeded: 1 - cacc for an attack that drives clean accuracy down.
"""
_PHASES = {"pre": 0, "during": 1, "post": 2}
Key = tuple[str, str, str, str]
"""model, task, attack, defense stack; the last two by label."""
SHORT = {
    "cacc": "cacc",
    "benign_rate": "benign",
    "over_refusal_rate": "over",
    "coherent_rate": "coh",
}
"""Utility as it stands beside every safety metric: clean accuracy (or right answers to benign
requests), over-refusal, coherence.
"""


def null_text(nulls: tuple[int, int] | None) -> str:
    """A share of null verdicts; never rounded to 0 % where there is one."""
    if nulls is None:
        return "? null"
    null, asked = nulls
    share = 100 * null / asked if asked else 0.0
    return f"{share:.0f} % null" if null == 0 or share >= 1 else "< 1 % null"


def seeds_text(seeds: int) -> str:
    """How many seeds; one is told everywhere."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    """Judged items of one seed (the smallest of the seeds)."""
    seeds: int
    prompts: tuple[float, float] | None = None
    """The part of the interval that is over prompts."""
    over_seeds: tuple[float, float] | None = None
    """The part that is over seeds; None with one seed."""
    nulls: tuple[int, int] | None = None
    """Prompts that could not be judged and prompts asked, over all seeds; None where that is not
    known.
    """

    @property
    def null_text(self) -> str:
        """The share of prompts that could not be judged, as every rate has it beside it."""
        return null_text(self.nulls)

    @property
    def text(self) -> str:
        """The value with its interval, for sentences and tooltips."""
        return f"{self.value:.2f}" + (
            f" [{self.low:.2f}, {self.high:.2f}]"
            if self.low is not None and self.high is not None
            else ""
        )


@dataclass(frozen=True)
class UtilityMark:
    """One measure of what a model is still good for."""

    metric: str
    value: float | None
    fell: bool = False
    """Whether it is clearly worse than undefended."""

    @property
    def number(self) -> str:
        """The value, with an arrow where it clearly fell (or rose, where lower is better)."""
        arrow = (
            "" if not self.fell else "↑" if schema.METRICS[self.metric].better == "lower" else "↓"
        )
        return "–" if self.value is None else f"{self.value:.2f}{arrow}"

    @property
    def text(self) -> str:
        """Short name and value."""
        return f"{SHORT[self.metric]} {self.number}"


@dataclass(frozen=True)
class Model:
    """One model of the sweep."""

    name: str
    family: str
    params: int | None
    aligned: bool | None

    @property
    def params_or_zero(self) -> int:
        """For sorting."""
        return self.params or 0


@dataclass(frozen=True)
class MethodLabel:
    """An attack, or a stack of defenses, as the page names it."""

    label: str
    phases: tuple[str, ...]
    success: str = ""
    """Of attacks: the metric that is their success."""
    only_inspects: bool = False
    """Of stacks: whether all members only look, so that the model is the undefended one."""

    @property
    def turned(self) -> str:
        """How the success is read from a metric that the attack drives down; empty for others."""
        return f"1 − {self.success}" if self.success and not is_driven_up(self.success) else ""

    @property
    def phase(self) -> str:
        """One word for tables: the phase, or `mixed` for a stack over several."""
        distinct = set(self.phases)
        return "" if not distinct else distinct.pop() if len(distinct) == 1 else "mixed"


@dataclass(frozen=True)
class Seconds:
    """What one cell costs when it does all its stages itself."""

    gpu: float
    cpu: float


@dataclass
class Point:
    """All seeds of one model, task, attack and defense stack."""

    cells: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    success: str = ASR
    """The metric that is the attack's success here."""
    unjudged: dict[str, int] = field(default_factory=dict)
    """Metrics that no seed has a value of, since no prompt could be judged -> how many prompts."""
    seconds: Seconds | None = None
    """Mean over the seeds; None where the results do not say."""

    @property
    def status(self) -> str:
        """done, partly, failed or pending."""
        if set(self.statuses) == {"done"}:
            return "done"
        if self.statuses["done"]:
            return "partly"
        return "failed" if self.statuses["failed"] else "pending"

    @property
    def incoherent(self) -> bool:
        """Whether most of what the model says is not coherent text: then low attack success is not
        safety.
        """
        coherent = self.estimates.get("coherent_rate")
        return coherent is not None and coherent.value < schema.INCOHERENT_BELOW


@dataclass(frozen=True)
class Grid:
    """The axes in reading order and the points by (model, task, attack, defense)."""

    models: tuple[Model, ...]
    tasks: tuple[str, ...]
    attacks: tuple[MethodLabel, ...]
    defenses: tuple[MethodLabel, ...]
    seeds: tuple[int, ...]
    points: Mapping[Key, Point]
    metrics: tuple[str, ...]
    """Metrics measured anywhere, the view `attack_success` first."""
    place: Mapping[str, Key]
    """Cell digest -> the key of its point."""
    compared: Mapping[tuple[Key, Key, str], Mapping[str, Any]] = field(default_factory=dict)
    """(point, the point compared with, metric) -> its row of `comparisons`."""

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        return (
            {one.name: i for i, one in enumerate(self.models)},
            {one.label: i for i, one in enumerate(self.attacks)},
            {one.label: i for i, one in enumerate(self.defenses)},
        )

    def facets(self, key: Key) -> tuple[int, int, int]:
        """Numbers of a point's model, attack and defense in the axes, as the page's filters know
        them.
        """
        models, attacks, defenses = self._numbers
        return models[key[0]], attacks[key[2]], defenses[key[3]]

    @cached_property
    def cost_unit(self) -> str:
        """What cost is counted in: GPU-hours, or CPU-hours where no cell used a GPU; empty where
        the results do not say.
        """
        known = [point.seconds for point in self.points.values() if point.seconds is not None]
        return "" if not known else "GPU-hours" if any(one.gpu for one in known) else "CPU-hours"

    def hours(self, key: Key) -> float | None:
        """What a cell of this point costs in `cost_unit`, shared stages counted whole."""
        point = self.points.get(key)
        if point is None or point.seconds is None:
            return None
        return (point.seconds.gpu if self.cost_unit == "GPU-hours" else point.seconds.cpu) / 3600

    def comparison(self, key: Key, against: Key, metric: str = SUCCESS) -> Mapping[str, Any] | None:
        """The tested comparison of two points, None where there is none."""
        if metric == SUCCESS and key in self.points:
            row = self.success_row(key, against)
        else:
            row = self.compared.get((key, against, metric))
        return None if row is None or row["q"] is None else row

    def success_row(self, key: Key, against: Key) -> Mapping[str, Any] | None:
        """The comparison of attack success of two points, tested or not: a drop is good for the
        defender, whichever way the attack drives its metric.
        """
        name = self.points[key].success
        row = self.compared.get((key, against, name))
        if row is None or is_driven_up(name) or row["effect"] is None:
            return row
        turned = {
            "rate": 1 - row["rate"],
            "rate_against": 1 - row["rate_against"],
            "effect": -row["effect"],
            "ci_low": None if row["ci_high"] is None else -row["ci_high"],
            "ci_high": None if row["ci_low"] is None else -row["ci_low"],
        }
        return {**row, **turned}

    def utilities(self, key: Key) -> tuple[UtilityMark, ...]:
        """The utility of a point, and where it is clearly worse than undefended."""
        model, task, attack, _ = key
        found = []
        for metric in self.utility_metrics[task]:
            row = self.comparison(key, (model, task, attack, NONE), metric)
            measured = self.value(key, metric)
            found.append(
                UtilityMark(
                    metric,
                    None if measured is None else measured.value,
                    row is not None and row["conclusion"] == "worse",
                )
            )
        return tuple(found)

    @cached_property
    def utility_metrics(self) -> dict[str, tuple[str, str, str]]:
        """Task -> what stands beside every safety metric: clean accuracy, or right answers to
        benign requests where there is none.
        """
        scored = {key[1] for key, point in self.points.items() if "cacc" in point.estimates}
        return {
            task: (
                "cacc" if task in scored else "benign_rate",
                "over_refusal_rate",
                "coherent_rate",
            )
            for task in self.tasks
        }

    def value(self, key: Key, metric: str = SUCCESS) -> Estimate | None:
        """The estimate at a point, None where nothing was measured."""
        point = self.points.get(key)
        return None if point is None else point.estimates.get(metric)

    def reference(self, model: str, task: str, attack: MethodLabel) -> Estimate | None:
        """What an undefended attack's success is held against: of a backdoor the same prompts
        without the trigger, of others the same metric without an attack.
        """
        plain = self.value((model, task, attack.label, NONE), WITHOUT_TRIGGER)
        if attack.success == ASR and plain is not None:
            return plain
        clean = self.value((model, task, NONE, NONE), attack.success)
        return None if clean is None else _as_success(attack.success, clean)

    def slices(self) -> list[tuple[Model, str]]:
        """The (model, task) pairs that hold at least one planned cell, in reading order."""
        held = {(model, task) for model, task, _, _ in self.points}
        return [
            (model, task)
            for task in self.tasks
            for model in self.models
            if (model.name, task) in held
        ]

    @property
    def acting(self) -> list[MethodLabel]:
        """The defense stacks that change something: neither `none` nor detectors alone."""
        return [
            defense
            for defense in self.defenses
            if defense.label != NONE and not defense.only_inspects
        ]

    @property
    def real_attacks(self) -> list[MethodLabel]:
        """All attacks but `none`."""
        return [attack for attack in self.attacks if attack.label != NONE]


def build_grid(results: Results) -> Grid:
    """The grid of a sweep's results."""
    cells = results.cells.to_pylist()
    hooks: dict[str, list[str]] = results.meta.get("defense_hooks", {})
    attack_of, defense_of = _labels(cells)
    values: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in with_nulls(results):
        values[row["cell"]][row["metric"]] = row
    spent: dict[str, list[float]] = results.meta.get("spent", {})
    points: dict[Key, Point] = defaultdict(Point)
    place, attacks, defenses = {}, {}, {}
    for cell in cells:
        attack, defense = attack_of[cell["cell"]], defense_of[cell["cell"]]
        attacks[attack] = MethodLabel(
            attack,
            () if attack == NONE or not cell["attack_phase"] else (cell["attack_phase"],),
            shown_metric(cell),
        )
        looks = bool(cell["defenses"]) and all(
            set(hooks.get(name, ["?"])) <= {"inspect"} for name in cell["defenses"]
        )
        defenses[defense] = MethodLabel(
            defense, tuple(cell["defense_phases"] or ()), only_inspects=looks
        )
        key = place[cell["cell"]] = (cell["model"], cell["task"], attack, defense)
        points[key].cells.append(cell["cell"])
        points[key].statuses[cell["status"]] += 1
    for key, point in points.items():
        measured = [values[cell] for cell in point.cells if cell in values]
        point.estimates, point.unjudged = _estimates(measured), _unjudged(measured)
        point.seconds = _seconds([spent[cell] for cell in point.cells if cell in spent])
        point.success = attacks[key[2]].success
        if point.success in point.estimates:
            point.estimates[SUCCESS] = _as_success(point.success, point.estimates[point.success])
    found = {name for point in points.values() for name in point.estimates}
    names = [SUCCESS, *schema.METRICS]
    return Grid(
        models=_models(cells),
        tasks=tuple(sorted({c["task"] for c in cells})),
        attacks=_ordered(attacks.values()),
        defenses=_ordered(defenses.values()),
        seeds=tuple(sorted({c["seed"] for c in cells})),
        points=dict(points),
        place=place,
        metrics=tuple([m for m in names if m in found] + sorted(found - set(names))),
        compared=_compared(cells, place, results),
    )


def _compared(
    cells: Sequence[Mapping[str, Any]], place: Mapping[str, Key], results: Results
) -> dict[tuple[Key, Key, str], dict[str, Any]]:
    """The table `comparisons` by the labels of the page."""
    key_of = {place_of(cell): place[cell["cell"]] for cell in cells}
    found = {}
    for row in results.comparisons.to_pylist():
        own, other = (
            place_of(row),
            place_of({**row, "defenses": row["against"], "defense_params": row["against_params"]}),
        )
        if own not in key_of or other not in key_of:
            raise DataError(
                "a comparison of stacks that `cells` does not have",
                [row["defenses"], row["against"]],
                "stacks of this run",
                "collect the sweep again: ftsec report SWEEP",
            )
        found[key_of[own], key_of[other], row["metric"]] = row
    return found


def _models(cells: Sequence[Mapping[str, Any]]) -> tuple[Model, ...]:
    models = {
        c["model"]: Model(c["model"], c["family"] or "", c["model_params"], c["aligned"])
        for c in cells
    }
    return tuple(sorted(models.values(), key=lambda m: (m.family, m.params or 0, m.name)))


def _ordered(labels: Iterable[MethodLabel]) -> tuple[MethodLabel, ...]:
    def rank(item: MethodLabel) -> tuple[bool, int, int, str]:
        return (
            item.label != NONE,
            len(item.phases),
            _PHASES.get(item.phases[0], 9) if item.phases else -1,
            item.label,
        )

    return tuple(sorted(labels, key=rank))


def _labels(cells: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Labels of each cell's attack and stack: names, with those parameters that differ somewhere in
    the sweep.
    """
    seen: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    stacks = {}
    for cell in cells:
        own = json.loads(cell["attack_params"] or "{}")
        seen["attack", cell["attack"]].append(own)
        names = cell["defenses"] or []
        params = json.loads(cell["defense_params"] or "[]") or [{} for _ in names]
        stacks[cell["cell"]] = (cell["attack"], own, list(zip(names, params, strict=True)))
        for name, given in zip(names, params, strict=True):
            seen["defense", name].append(given)
    varying = {key: _varying(given) for key, given in seen.items()}

    def label(kind: str, name: str, params: Mapping[str, Any]) -> str:
        shown = [f"{key}={params[key]}" for key in varying[kind, name] if key in params]
        return f"{name} ({', '.join(shown)})" if shown else name

    attacks = {cell: label("attack", name, own) for cell, (name, own, _) in stacks.items()}
    defenses = {
        cell: " + ".join(label("defense", n, p) for n, p in stack) or NONE
        for cell, (_, _, stack) in stacks.items()
    }
    return attacks, defenses


def _varying(given: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = [
        {key: json.dumps(value, sort_keys=True) for key, value in params.items()}
        for params in given
    ]
    return sorted(
        key for key in {k for t in texts for k in t} if len({t.get(key) for t in texts}) > 1
    )


def _estimates(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Estimate]:
    names = {name for seed in seeds for name, row in seed.items() if row["value"] is not None}
    return {name: _estimate([seed[name] for seed in seeds if name in seed], name) for name in names}


def _estimate(rows: Sequence[Mapping[str, Any]], metric: str) -> Estimate:
    one = folded([row for row in rows if row["value"] is not None], metric)
    low, high = one.span or (None, None)
    known = [
        (row["n_null"], row["n_null"] + (row["n"] or 0))
        for row in rows
        if row["n_null"] is not None
    ]
    nulls = (
        (sum(null for null, _ in known), sum(asked for _, asked in known))
        if len(known) == len(rows)
        else None
    )
    return Estimate(one.value, low, high, one.n_prompts, one.n_seeds, one.prompts, one.seeds, nulls)


def _as_success(metric: str, found: Estimate) -> Estimate:
    """A success metric as the share of prompts at which the attack succeeded."""
    if is_driven_up(metric):
        return found

    def turned(ends: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if ends is None else (1 - ends[1], 1 - ends[0])

    whole = None if found.low is None or found.high is None else (found.low, found.high)
    low, high = turned(whole) or (None, None)
    return replace(
        found,
        value=1 - found.value,
        low=low,
        high=high,
        prompts=turned(found.prompts),
        over_seeds=turned(found.over_seeds),
    )


def _unjudged(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, int]:
    """Metrics without any value -> the prompts that could not be judged."""
    found: dict[str, int] = defaultdict(int)
    for row in (row for seed in seeds for row in seed.values()):
        found[row["metric"]] += row["n_null"] or 0
    valued = {name for seed in seeds for name, row in seed.items() if row["value"] is not None}
    return {name: count for name, count in found.items() if name not in valued}


def _seconds(spent: Sequence[Sequence[float]]) -> Seconds | None:
    return Seconds(*(fmean(one) for one in zip(*spent, strict=True))) if spent else None


def with_nulls(results: Results) -> list[dict[str, Any]]:
    """The rows of `metrics` with `n_null`, the prompts that could not be judged.

    Results that have no such column are counted from `generations`: null verdicts of the probes
    that the metric is a share of. None where that cannot be known, as for a metric that is no share
    of verdicts.
    """
    rows: list[dict[str, Any]] = results.metrics.to_pylist()
    success = {cell["cell"]: shown_metric(cell) for cell in results.cells.to_pylist()}
    counted: dict[tuple[str, str], int] | None = None
    for row in rows:
        if row.get("n_null") is None:
            counted = _null_verdicts(results) if counted is None else counted
            known = [
                counted[row["cell"], probe]
                for probe in _probes(row, counted, success[row["cell"]])
                if (row["cell"], probe) in counted
            ]
            row["n_null"] = sum(known) if known else None
    return rows


def _probes(
    row: Mapping[str, Any], counted: Mapping[tuple[str, str], int], success: str
) -> tuple[str, ...]:
    """The probes whose verdicts make up a metric in a cell."""
    metric = row["metric"]
    own = schema.METRICS[metric].probes if metric in schema.METRICS else ()
    if any((row["cell"], probe) in counted for probe in own):
        return own
    source = source_of(metric, success)
    return own if source == metric else schema.METRICS[source].probes


def _null_verdicts(results: Results) -> dict[tuple[str, str], int]:
    """(cell, probe) -> null verdicts."""
    import pyarrow.compute as pc

    asked = results.generations.select(["cell", "probe"]).append_column(
        "null", pc.is_null(results.generations["verdict"])
    )
    found = asked.group_by(["cell", "probe"]).aggregate([("null", "sum")]).to_pydict()
    return dict(
        zip(zip(found["cell"], found["probe"], strict=True), found["null_sum"], strict=True)
    )
