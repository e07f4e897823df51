"""The sweep as a grid: seeds folded into points, methods labelled by what varies, an interval on
every number.

A point is model x task x attack x defense stack. Its estimate is the mean over seeds with the
spreads of `measured`; its interval spans both, and with one seed it is the cell's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.config.sweep import BEFORE
from ftsec_ray.errors import DataError
from ftsec_ray.measured import Measured, utility_metrics
from ftsec_ray.report.null_counts import with_nulls
from ftsec_ray.results.compare import CONTROL, MEMBER, MOMENT
from ftsec_ray.results.lift import Lift, lifts
from ftsec_ray.results.points import (
    NONE,
    SUCCESS,
    GridPoint,
    as_success,
    method_names,
    place_of,
    points_of,
    sizes_of,
)
from ftsec_ray.success import is_driven_up, without_trigger

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

_PHASES = {"pre": 0, "during": 1, "post": 2}
Key = tuple[str, str, str, str]
"""model, task, attack, defense stack; the last two by label."""
SHORT = {
    "cacc": "accuracy",
    "benign_rate": "benign",
    "over_refusal_rate": "over-refusal",
    "coherent_rate": "coherent",
    "no_answer_rate": "no answer",
}
"""Utility as it stands beside every safety metric, in one word each."""
WORDS = {
    "cacc": "clean accuracy",
    "benign_rate": "right answers to benign requests",
    "over_refusal_rate": "over-refusal",
    "coherent_rate": "coherent answers",
    "no_answer_rate": "forbidden requests without an answer",
}
"""The same in full, for legends, hover texts and sentences."""


def seeds_text(seeds: int) -> str:
    """How many seeds, in words."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


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

    @property
    def words(self) -> str:
        """Name in full and value, and what the arrow means."""
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        fell = ", clearly worse than without a defense" if self.fell else ""
        return f"{WORDS[self.metric]} {value}{fell}"


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
    name: str = ""
    """The same without parameters."""

    @property
    def settings(self) -> str:
        """The parameters in the label, of a single method; empty for others."""
        rest = self.label.removeprefix(self.name)
        return rest.strip(" ()") if rest.startswith(" (") and " + " not in self.name else ""

    @property
    def turned(self) -> str:
        """How the success is read from a metric that the attack drives down; empty for others."""
        return f"1 − {self.success}" if self.success and not is_driven_up(self.success) else ""

    @property
    def phase(self) -> str:
        """One word: the phase, or `mixed` for a stack over several."""
        distinct = set(self.phases)
        return "" if not distinct else distinct.pop() if len(distinct) == 1 else "mixed"


@dataclass(frozen=True)
class Seconds:
    """What one cell costs when it does all its stages itself."""

    gpu: float
    cpu: float


@dataclass(frozen=True)
class Grid:
    """The axes in reading order and the points by (model, task, attack, defense)."""

    models: tuple[Model, ...]
    tasks: tuple[str, ...]
    attacks: tuple[MethodLabel, ...]
    defenses: tuple[MethodLabel, ...]
    seeds: tuple[int, ...]
    points: Mapping[Key, GridPoint]
    metrics: tuple[str, ...]
    """Metrics measured anywhere, the view `attack_success` first."""
    place: Mapping[str, Key]
    """Cell digest -> the key of its point."""
    compared: Mapping[tuple[Key, Key, str], Mapping[str, Any]] = field(default_factory=dict)
    """(point, the point compared with, metric) -> its row of `comparisons`."""
    seconds: Mapping[Key, Seconds] = field(default_factory=dict)
    """What a cell of a point costs, mean over its seeds; where the results say so."""
    lifts: Mapping[Key, Lift] = field(default_factory=dict)
    """Success of an attacked point over the unattacked, undefended model; where both have it."""

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
        known = self.seconds.values()
        return "" if not known else "GPU-hours" if any(one.gpu for one in known) else "CPU-hours"

    def hours(self, key: Key) -> float | None:
        """What a cell of this point costs in `cost_unit`, shared stages counted whole."""
        seconds = self.seconds.get(key)
        if seconds is None:
            return None
        return (seconds.gpu if self.cost_unit == "GPU-hours" else seconds.cpu) / 3600

    def comparison(self, key: Key, against: Key, metric: str = SUCCESS) -> Mapping[str, Any] | None:
        """The tested comparison of two points, None where there is none."""
        if metric == SUCCESS and key in self.points:
            row = self.success_row(key, against)
        else:
            row = self.compared.get((key, against, metric))
        return None if row is None or row["q"] is None else row

    @cached_property
    def _against(self) -> dict[tuple[str, Key], list[Key]]:
        found: dict[tuple[str, Key], dict[Key, None]] = {}
        for (own, other, _), row in self.compared.items():
            found.setdefault((row["kind"], own), {})[other] = None
        return {own: list(others) for own, others in found.items()}

    def controls_at(self, key: Key) -> list[Key]:
        """The points that hold a control of this point's stack."""
        return self._against.get((CONTROL, key), [])

    def best_member_at(self, key: Key) -> Key | None:
        """The point of the best single member of this point's stack; None where there is none."""
        return next(iter(self._against.get((MEMBER, key), [])), None)

    def success_row(self, key: Key, against: Key) -> Mapping[str, Any] | None:
        """The comparison of attack success of two points, tested or not: a drop is good for the
        defender, whichever way the attack drives its metric.
        """
        name = self.points[key].success_metric
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
    def utility_metrics(self) -> dict[str, tuple[str, ...]]:
        """Task -> what stands beside every safety metric: clean accuracy, or right answers to
        benign requests where there is none.
        """
        measured: dict[str, set[str]] = {task: set() for task in self.tasks}
        for key, point in self.points.items():
            measured[key[1]] |= set(point.measured)
        return {task: utility_metrics(own) for task, own in measured.items()}

    def value(self, key: Key, metric: str = SUCCESS) -> Measured | None:
        """A metric at a point, None where it was not measured."""
        point = self.points.get(key)
        return None if point is None else point.value(metric)

    def reference(self, model: str, task: str, attack: MethodLabel) -> Measured | None:
        """The base rate of an attack without a defense: of a backdoor the same prompts without the
        trigger, of others the same metric without an attack.
        """
        without = without_trigger(attack.success)
        plain = self.value((model, task, attack.label, NONE), without) if without else None
        if plain is not None:
            return plain
        clean = self.value((model, task, NONE, NONE), attack.success)
        return None if clean is None else as_success(attack.success, clean)

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
    spent: dict[str, list[float]] = results.meta.get("spent", {})
    names = method_names(cells)
    points: dict[Key, GridPoint] = {}
    for point in points_of(cells, with_nulls(results)):
        key = (point.model, point.task, *names[point.cell["cell"]])
        if key in points:
            raise DataError(
                "two points of the grid that no name tells apart",
                ", ".join(key),
                "parameters in `cells` that differ, or one point",
                "collect the sweep again: ftsec report SWEEP",
            )
        points[key] = point
    place = {cell: key for key, point in points.items() for cell in point.seeds}
    found = schema.in_order({name for point in points.values() for name in point.measured})
    if any(point.value() is not None for point in points.values()):
        found.insert(0, SUCCESS)
    return Grid(
        models=_models(cells),
        tasks=tuple(sorted({c["task"] for c in cells})),
        attacks=_ordered({key[2]: _attack(key[2], one) for key, one in points.items()}.values()),
        defenses=_ordered(
            {key[3]: _stack(key[3], one, hooks) for key, one in points.items()}.values()
        ),
        seeds=tuple(sorted({c["seed"] for c in cells})),
        points=points,
        place=place,
        metrics=tuple(found),
        compared=_compared(cells, place, results),
        lifts={place[cell]: lift for cell, lift in lifts(results, list(points.values())).items()},
        seconds={
            key: Seconds(*(fmean(one) for one in zip(*known, strict=True)))
            for key, point in points.items()
            if (known := [spent[cell] for cell in point.seeds if cell in spent])
        },
    )


def _attack(label: str, point: GridPoint) -> MethodLabel:
    phase = point.cell["attack_phase"]
    phases = () if label == NONE or not phase else (phase,)
    return MethodLabel(label, phases, point.success_metric, name=point.attack)


def _stack(label: str, point: GridPoint, hooks: Mapping[str, Sequence[str]]) -> MethodLabel:
    looks = bool(point.defenses) and all(
        set(hooks.get(name, ["?"])) <= {"inspect"} for name in point.defenses
    )
    return MethodLabel(
        label,
        tuple(point.cell["defense_phases"] or ()),
        only_inspects=looks,
        name=" + ".join(point.defenses) or NONE,
    )


def _compared(
    cells: Sequence[Mapping[str, Any]], place: Mapping[str, Key], results: Results
) -> dict[tuple[Key, Key, str], dict[str, Any]]:
    """The table `comparisons` by the labels of the page."""
    key_of = {place_of(cell): place[cell["cell"]] for cell in cells}
    found = {}
    for row in results.comparisons.to_pylist():
        against = {"defenses": row["against"], "defense_params": row["against_params"]}
        if row["kind"] == MOMENT:
            against["model"] = f"{row['model']}{BEFORE}"
        own, other = place_of(row), place_of({**row, **against})
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
    sizes = sizes_of(cells)
    models = {
        c["model"]: Model(c["model"], c["family"] or "", sizes[c["model"]], c["aligned"])
        for c in cells
    }
    return tuple(
        sorted(models.values(), key=lambda m: (m.family, m.params is None, m.params or 0, m.name))
    )


def _ordered(labels: Iterable[MethodLabel]) -> tuple[MethodLabel, ...]:
    def rank(item: MethodLabel) -> tuple[bool, int, int, str]:
        return (
            item.label != NONE,
            len(item.phases),
            _PHASES.get(item.phases[0], 9) if item.phases else -1,
            item.label,
        )

    return tuple(sorted(labels, key=rank))
