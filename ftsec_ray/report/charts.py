"""The charts of the grid: attack success against model size, and safety against utility and
cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from markupsafe import Markup

from ftsec_ray.measured import Measured, null_share, null_text, summed
from ftsec_ray.report import figures
from ftsec_ray.report.figures import Dot, PlotPoint, Series
from ftsec_ray.report.grid import Grid, Model, seeds_text
from ftsec_ray.report.tables import metric_title
from ftsec_ray.report.verdict import Summary
from ftsec_ray.results.points import NONE

MAX_LINES = 8
COST_TOLERANCE = 1.1
"""Costs that differ by less than this factor count as equal on the Pareto front: times of one stage
vary as much.
"""


def size_charts(grid: Grid, verdict: Summary) -> tuple[list[dict[str, Any]], list[str]]:
    """Charts per family, task and attack, and the defenses left out of them."""
    drops: dict[str, list[float]] = defaultdict(list)
    for effect in verdict.effects:
        drops[effect.defense].append(effect.drop)
    real = [d.label for d in grid.acting]
    chosen = sorted(real, key=lambda name: -fmean(drops[name]) if drops[name] else 0.0)[
        : MAX_LINES - 1
    ]
    shown = [NONE] * any(d.label == NONE for d in grid.defenses) + [
        name for name in real if name in chosen
    ]
    start = 0 if NONE in shown else 1
    charts = []
    families: dict[tuple[str, str], list[Model]] = defaultdict(list)
    for model, task in grid.slices():
        if model.params:
            families[model.family, task].append(model)
    for (family, task), models in families.items():
        if len({m.params for m in models}) < 2:
            continue
        for attack in grid.attacks:
            keys = [(m.name, task, attack.label, name) for m in models for name in shown]
            measured = [one for key in keys if (one := grid.value(key)) is not None]
            if not measured:
                continue
            is_mixed = len({one.seeds for one in measured}) > 1
            lines = [
                _series(grid, i, name, models, (task, attack.label), marks_one=is_mixed)
                for i, name in enumerate(shown, start)
            ]
            heading = attack.label if attack.label != NONE else "no attack"
            heading += f" ({attack.turned})" if attack.turned else ""
            extra = " · ".join(
                [family] * (len({f for f, _ in families}) > 1) + [task] * (len(grid.tasks) > 1)
            )
            title = (
                f"{family}: attack success against weights, {heading}, one line per defense;"
                " utility of the same points below"
            )
            names = [metric_title(name) for name in grid.utility_metrics[task]]
            charts.append(
                {
                    "heading": heading,
                    "extra": extra,
                    "phase": attack.phase,
                    "family": family,
                    "attack": grid.facets(keys[0])[1],
                    "svg": figures.size_chart(
                        [line for line in lines if line.spots],
                        title=title,
                        strips=names,
                        note=_note(measured),
                    ),
                }
            )
    return charts, [name for name in real if name not in chosen]


def _note(measured: Sequence[Measured]) -> str:
    """Seeds and null verdicts of the points of a chart."""
    seeds = sorted({one.seeds for one in measured})
    seeds_shown = (
        seeds_text(seeds[0])
        if len(seeds) == 1
        else f"{seeds[0]} to {seeds[-1]} seeds" + " (1: one)" * (seeds[0] == 1)
    )
    known = [one.nulls for one in measured if one.nulls is not None]
    worst = max(known, key=lambda nulls: null_share(nulls) or 0.0, default=None)
    bound = "at most " if worst is not None and worst[0] > 0 else ""
    return (
        f"{seeds_shown} per point; null verdicts: {bound}{null_text(worst).removesuffix(' null')}"
    )


def _series(
    grid: Grid,
    index: int,
    defense: str,
    models: list[Model],
    place: tuple[str, str],
    *,
    marks_one: bool,
) -> Series:
    """One line; `marks_one` writes a 1 beside points with one seed, where others have more."""
    spots = []
    task, attack = place
    for model in models:
        key = (model.name, task, attack, defense)
        found = grid.value(key)
        if found is not None and model.params:
            beside = grid.utilities(key)
            parts = [
                f"{attack}, {defense}, {model.name}: {found.text}",
                f"n {found.n}" if found.n else "",
                found.null_text,
                seeds_text(found.seeds),
                *(one.text for one in beside),
            ]
            doubtful = grid.points[key].is_incoherent or any(one.fell for one in beside)
            spots.append(
                PlotPoint(
                    params=float(model.params),
                    value=found.value,
                    low=found.low,
                    high=found.high,
                    tip=", ".join(filter(None, parts)),
                    doubtful=doubtful,
                    beside=tuple(one.value for one in beside),
                    mark="1" if marks_one and found.seeds == 1 else "",
                )
            )
    facet = next(i for i, one in enumerate(grid.defenses) if one.label == defense)
    return Series(
        index=index,
        label=defense,
        facet=facet,
        spots=tuple(sorted(spots, key=lambda spot: spot.params)),
    )


@dataclass(frozen=True)
class TradeRow:
    """One defense on one model: means over the attacks, and its worst attack."""

    defense: str
    utility: float
    safety: float
    worst: float
    worst_attack: str
    over_refusal: float | None
    coherent: float | None
    on_front: bool
    incoherent: bool
    attacks: int
    seeds: int
    """Seeds of the point that has fewest."""
    hours: float | None
    """Mean cost of a cell, in the grid's `cost_unit`."""
    nulls: str
    """The share of null verdicts of the attack success."""
    facet: int
    """Number of the defense in the axes."""


@dataclass(frozen=True)
class Trade:
    """Utility against safety for one model and task."""

    model: Model
    task: str
    utility: str
    svg: Markup
    rows: list[TradeRow]
    left_out: list[str]
    """Defenses that lack some attack's result here, so that their means would be over other
    attacks.
    """


def trades(grid: Grid) -> list[Trade]:
    """Utility against safety per model and task, where both were measured."""
    found = []
    for model, task in grid.slices():
        utility = grid.utility_metrics[task][0]
        names = [d.label for d in grid.defenses if not d.only_inspects]
        rows = [
            row
            for name in names
            if (row := _trade_row(grid, model.name, task, name, utility)) is not None
        ]
        most = max((row.attacks for row in rows), default=0)
        left_out = [row.defense for row in rows if row.attacks < most]
        rows = [row for row in rows if row.attacks == most]
        if not rows:
            continue
        rows = [_with_front(row, rows) for row in rows]
        unit = grid.cost_unit
        headings = " · ".join(
            ["over-refusal", "coherent", "null verdicts", *[unit] * bool(unit), "seeds"]
        )
        dots = [
            Dot(
                label=r.defense,
                facet=r.facet,
                utility=r.utility,
                safety=r.safety,
                worst=r.worst,
                hours=r.hours,
                on_front=r.on_front,
                is_reference=r.defense == NONE,
                incoherent=r.incoherent,
                beside=_beside(r, unit),
                tip=_tip(r, utility, unit),
            )
            for r in rows
        ]
        title = (
            f"safety against {metric_title(utility)}{f' and {unit}' if unit else ''} of every"
            f" defense on {model.name}"
        )
        svg = figures.scatter(
            dots,
            title=title,
            utility=f"utility: {metric_title(utility)}",
            cost=f"{unit} per cell, shared stages counted whole" if unit else "",
            headings=headings,
        )
        found.append(
            Trade(
                model,
                task,
                utility,
                svg,
                sorted(rows, key=lambda r: (not r.on_front, -r.safety)),
                left_out,
            )
        )
    return found


def _trade_row(grid: Grid, model: str, task: str, defense: str, utility: str) -> TradeRow | None:
    pairs = []
    for attack in grid.real_attacks:
        key = (model, task, attack.label, defense)
        success, use = grid.value(key), grid.value(key, utility)
        if success is not None and use is not None:
            pairs.append((success, use.value, attack.label, key))
    if not pairs:
        return None

    def mean(metric: str) -> float | None:
        values = [
            found.value for *_, key in pairs if (found := grid.value(key, metric)) is not None
        ]
        return fmean(values) if values else None

    worst, name = max((success.value, attack) for success, _, attack, _ in pairs)
    hours = [one for *_, key in pairs if (one := grid.hours(key)) is not None]
    return TradeRow(
        defense,
        fmean(p[1] for p in pairs),
        1 - fmean(p[0].value for p in pairs),
        1 - worst,
        name,
        mean("over_refusal_rate"),
        mean("coherent_rate"),
        on_front=False,
        incoherent=any(grid.points[key].is_incoherent for *_, key in pairs),
        attacks=len(pairs),
        seeds=min(success.seeds for success, *_ in pairs),
        hours=fmean(hours) if len(hours) == len(pairs) else None,
        nulls=null_text(summed(success.nulls for success, *_ in pairs)),
        facet=grid.facets(pairs[0][3])[2],
    )


def _with_front(row: TradeRow, rows: list[TradeRow]) -> TradeRow:
    return replace(
        row,
        on_front=not row.incoherent
        and not any(_beats(one, row) for one in rows if not one.incoherent),
    )


def _beats(one: TradeRow, other: TradeRow) -> bool:
    """Whether a defense is at least as good in utility, safety and cost, and better in one of them;
    cost counts where it is known.
    """
    costs_more = costs_less = False
    if one.hours is not None and other.hours is not None:
        costs_more, costs_less = (
            one.hours > other.hours * COST_TOLERANCE,
            one.hours * COST_TOLERANCE < other.hours,
        )
    no_worse = one.utility >= other.utility and one.safety >= other.safety and not costs_more
    return no_worse and (one.utility > other.utility or one.safety > other.safety or costs_less)


def _beside(row: TradeRow, unit: str) -> str:
    shares = ["–" if one is None else f"{one:.2f}" for one in (row.over_refusal, row.coherent)]
    return " · ".join(
        [*shares, row.nulls, *[f"{hours_text(row.hours)} h"] * bool(unit), seeds_text(row.seeds)]
    )


def hours_text(hours: float | None) -> str:
    """Hours with three digits that count."""
    return "–" if hours is None else f"{hours:.3g}"


def _tip(row: TradeRow, utility: str, unit: str) -> str:
    parts = [
        f"{row.defense}: {utility} {row.utility:.2f}, safety {row.safety:.2f} (worst attack"
        f" {row.worst_attack}: {row.worst:.2f})"
    ]
    if row.over_refusal is not None:
        parts.append(f"over-refusal {row.over_refusal:.2f}")
    if row.coherent is not None:
        parts.append(f"coherent {row.coherent:.2f}")
    parts += [f"{hours_text(row.hours)} {unit}"] * (row.hours is not None)
    return ", ".join([*parts, row.nulls, seeds_text(row.seeds)])
