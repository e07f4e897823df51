"""The tables of the page as plain values: the heatmap, scatter rows, detectors, filters, cost and failures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ftsec_ray import schema
from ftsec_ray.report import figures
from ftsec_ray.report.figures import Dot, Series
from ftsec_ray.report.grid import NONE, SUCCESS, Estimate, Grid, MethodLabel, Model, Utility
from ftsec_ray.report.verdict import Effect, Verdict, utility_text

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

_VOID = {SUCCESS, *schema.SAFETY}
MAX_LINES = 8


@dataclass(frozen=True)
class HeatCell:
    """One square of the heatmap."""

    index: int | None
    """Place in the metric arrays; None where no seed has finished."""
    status: str
    notes: tuple[str, ...]
    anchor: str | None
    """Where its example generations are on the page."""
    utility: tuple[Utility, ...] = ()


@dataclass(frozen=True)
class Heat:
    """The heatmaps of all models, and per metric what stands in each square."""

    slices: list[tuple[Model, str, list[tuple[MethodLabel, list[HeatCell]]]]]
    metrics: list[dict[str, str]]
    """name, title, meaning, low and high ends of the colour scale."""
    data: dict[str, list[list[Any] | None]]
    """Metric -> per square [colour step, value, interval, n], None where it was not measured."""


def metric_title(name: str) -> str:
    """A metric's name as people read it."""
    return {SUCCESS: "attack success", "cacc": "clean accuracy (cacc)", "asr": "asr"}.get(name, name.replace("_", " "))


def heat(grid: Grid, anchors: dict[tuple[str, str, str, str], str]) -> Heat:
    """The heatmaps of a grid, one per model and task."""
    names = [name for name in grid.metrics if name not in schema.ABOUT_DEFENSES]
    scales = {name: _scale(grid, name) for name in names}
    data: dict[str, list[list[Any] | None]] = {name: [] for name in names}
    slices, index = [], 0
    for model, task in grid.slices():
        lines = []
        for attack in grid.attacks:
            squares = []
            for defense in grid.defenses:
                key = (model.name, task, attack.label, defense.label)
                point = grid.points.get(key)
                if point is None:
                    squares.append(HeatCell(None, "not planned", (), None))
                    continue
                measured = bool(point.estimates)
                notes = ("incoherent",) * point.incoherent
                if point.status == "partly":
                    notes += (f"{point.statuses['done']} of {sum(point.statuses.values())} seeds",)
                elif point.status != "done":
                    notes += (point.status,)
                squares.append(HeatCell(index if measured else None, point.status, notes, anchors.get(key), grid.utilities(key)))
                if measured:
                    index += 1
                    for name in names:
                        found = point.estimates.get(name)
                        data[name].append(None if found is None else _square(found, scales[name], is_void=point.incoherent and name in _VOID))
            lines.append((attack, squares))
        slices.append((model, task, lines))
    return Heat(slices, [_legend(grid, name) for name in names], data)


def _square(found: Estimate, scale: Callable[[float], float], *, is_void: bool) -> list[Any]:
    """Colour step (-1, no colour, where gibberish would look safe), value, and two lines: prompts and seeds with their intervals."""
    n, prompts = "" if found.n is None else f"n {found.n}", _interval(found.prompts)
    step = -1 if is_void else figures.heat_step(scale(found.value))
    if found.seeds == 1:
        return [step, _number(found.value), prompts, " · ".join(filter(None, (n, "1 seed")))]
    return [step, _number(found.value), " · ".join(filter(None, (prompts, n))), f"{found.seeds} seeds {_interval(found.over_seeds)}"]


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{_number(ends[0])}–{_number(ends[1])}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _scale(grid: Grid, metric: str) -> Callable[[float], float]:
    """Value -> badness for the defender, 0..1."""
    known = schema.METRICS.get(metric)
    if metric == SUCCESS or (known is not None and known.proportion):
        higher = known is not None and known.better == "higher"
        return lambda value: 1 - value if higher else value
    values = [p.estimates[metric].value for p in grid.points.values() if metric in p.estimates]
    if min(values) > 0:
        low, high = math.log(min(values)), math.log(max(values))
        return lambda value: (math.log(value) - low) / ((high - low) or 1)
    low, high = min(values), max(values)
    return lambda value: (value - low) / ((high - low) or 1)


def _legend(grid: Grid, metric: str) -> dict[str, str]:
    known = schema.METRICS.get(metric)
    meaning = known.meaning if known else ""
    if metric == SUCCESS:
        meaning = ("asr for backdoors; share of forbidden requests fulfilled (harmful rate) for attacks on refusal and for the "
                   "row without an attack")
    ends = ("0", "1")
    if known is not None and not known.proportion:
        values = [p.estimates[metric].value for p in grid.points.values() if metric in p.estimates]
        ends = (_number(min(values)), _number(max(values)))
    if known is not None and known.better == "higher":
        ends = ends[::-1]
    return {"name": metric, "title": metric_title(metric), "meaning": meaning, "good": ends[0], "bad": ends[1]}


def size_charts(grid: Grid, verdict: Verdict) -> tuple[list[tuple[Markup, str]], list[dict[str, str]], list[str]]:
    """Legend (marker, label), charts (heading, svg) per family, task and attack, and the defenses left out of them."""
    drops: dict[str, list[float]] = defaultdict(list)
    for effect in verdict.effects:
        drops[effect.defense].append(effect.drop)
    real = [d.label for d in grid.acting]
    chosen = sorted(real, key=lambda name: -fmean(drops[name]) if drops[name] else 0.0)[:MAX_LINES - 1]
    shown = [NONE] * any(d.label == NONE for d in grid.defenses) + [name for name in real if name in chosen]
    start = 0 if NONE in shown else 1
    legend = [(figures.legend_marker(i), name) for i, name in enumerate(shown, start)]
    charts = []
    families: dict[tuple[str, str], list[Model]] = defaultdict(list)
    for model, task in grid.slices():
        if model.params:
            families[model.family, task].append(model)
    for (family, task), models in families.items():
        if len({m.params for m in models}) < 2:
            continue
        for attack in grid.attacks:
            lines = [_series(grid, i, name, models, task, attack.label) for i, name in enumerate(shown, start)]
            lines = [line for line in lines if line.points]
            if lines:
                heading = attack.label if attack.label != NONE else "no attack"
                extra = " · ".join([family] * (len({f for f, _ in families}) > 1) + [task] * (len(grid.tasks) > 1))
                title = f"{family}: attack success against weights, {heading}, one line per defense"
                charts.append({"heading": heading, "extra": extra, "phase": attack.phase,
                               "svg": figures.size_chart(lines, title=title)})
    return legend, charts, [name for name in real if name not in chosen]


def _series(grid: Grid, index: int, defense: str, models: list[Model], task: str, attack: str) -> Series:
    points = []
    for model in models:
        found = grid.value((model.name, task, attack, defense))
        if found is not None and model.params:
            key = (model.name, task, attack, defense)
            beside = grid.utilities(key)
            parts = [f"{attack}, {defense}, {model.name}: {found.text}", f"n {found.n}" if found.n else "",
                     "1 seed" if found.seeds == 1 else f"{found.seeds} seeds", *(one.text for one in beside)]
            doubtful = grid.points[key].incoherent or any(one.fell for one in beside)
            points.append((float(model.params), found.value, found.low, found.high, ", ".join(filter(None, parts)), doubtful))
    return Series(index, defense, tuple(sorted(points)))


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


@dataclass(frozen=True)
class Trade:
    """Utility against safety for one model and task."""

    model: Model
    task: str
    utility: str
    svg: Markup
    rows: list[TradeRow]
    left_out: list[str]
    """Defenses that lack some attack's result here, so that their means would be over other attacks."""


def trades(grid: Grid) -> list[Trade]:
    """Utility against safety per model and task, where both were measured."""
    found = []
    for model, task in grid.slices():
        utility = grid.utility_metrics[task][0]
        names = [d.label for d in grid.defenses if not d.only_inspects]
        rows = [row for name in names if (row := _trade_row(grid, model.name, task, name, utility)) is not None]
        most = max((row.attacks for row in rows), default=0)
        left_out = [row.defense for row in rows if row.attacks < most]
        rows = [row for row in rows if row.attacks == most]
        if not rows:
            continue
        rows = [_with_front(row, rows) for row in rows]
        dots = [Dot(r.defense, r.utility, r.safety, r.worst, r.on_front, r.defense == NONE, r.incoherent, _tip(r, utility)) for r in rows]
        title = f"safety against {metric_title(utility)} of every defense on {model.name}"
        svg = figures.scatter(dots, title=title, x_label=f"utility: {metric_title(utility)}")
        found.append(Trade(model, task, utility, svg, sorted(rows, key=lambda r: (not r.on_front, -r.safety)),
                           left_out))
    return found


def _trade_row(grid: Grid, model: str, task: str, defense: str, utility: str) -> TradeRow | None:
    pairs, seeds = [], []
    for attack in grid.real_attacks:
        key = (model, task, attack.label, defense)
        success, use = grid.value(key), grid.value(key, utility)
        if success is not None and use is not None:
            pairs.append((success.value, use.value, attack.label, key))
            seeds.append(success.seeds)
    if not pairs:
        return None

    def mean(metric: str) -> float | None:
        values = [found.value for *_, key in pairs if (found := grid.value(key, metric)) is not None]
        return fmean(values) if values else None
    worst, _, name, _ = max(pairs)
    return TradeRow(defense, fmean(p[1] for p in pairs), 1 - fmean(p[0] for p in pairs), 1 - worst, name,
                    mean("over_refusal_rate"), mean("coherent_rate"), on_front=False,
                    incoherent=any(grid.points[key].incoherent for *_, key in pairs), attacks=len(pairs),
                    seeds=min(seeds))


def _with_front(row: TradeRow, rows: list[TradeRow]) -> TradeRow:
    beaten = any(o.utility >= row.utility and o.safety >= row.safety and (o.utility > row.utility or o.safety > row.safety)
                 for o in rows if not o.incoherent)
    return replace(row, on_front=not row.incoherent and not beaten)


def _tip(row: TradeRow, utility: str) -> str:
    parts = [f"{row.defense}: {utility} {row.utility:.2f}, safety {row.safety:.2f} (worst attack {row.worst_attack}: {row.worst:.2f})"]
    if row.over_refusal is not None:
        parts.append(f"over-refusal {row.over_refusal:.2f}")
    if row.coherent is not None:
        parts.append(f"coherent {row.coherent:.2f}")
    parts.append("1 seed" if row.seeds == 1 else f"{row.seeds} seeds")
    return ", ".join(parts)


def detections(grid: Grid) -> list[dict[str, Any]]:
    """One row per model, attack and stack with a detector: AUROC against clean models, and the standardised score."""
    return _measured(grid, auroc="detect_auroc", score="detect_score")


def filters(grid: Grid) -> list[dict[str, Any]]:
    """One row per model, attack and stack with a filter of training rows: what it caught and what it took by mistake."""
    return _measured(grid, tpr="filter_tpr", fpr="filter_fpr")


def _measured(grid: Grid, **metrics: str) -> list[dict[str, Any]]:
    """One row per point at which one of the metrics was measured, each under its key."""
    found = []
    for (model, task, attack, defense), point in grid.points.items():
        values = {key: point.estimates.get(metric) for key, metric in metrics.items()}
        if any(value is not None for value in values.values()):
            found.append({"model": model, "task": task, "attack": attack, "defense": defense, **values})
    return _in_order(grid, found)


def _in_order(grid: Grid, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    attack = {a.label: i for i, a in enumerate(grid.attacks)}
    defense = {d.label: i for i, d in enumerate(grid.defenses)}
    model = {m.name: i for i, m in enumerate(grid.models)}
    return sorted(rows, key=lambda r: (defense[r["defense"]], r["task"], attack[r["attack"]], model[r["model"]]))


def phase_table(grid: Grid, verdict: Verdict) -> list[tuple[str, list[tuple[float, int, Markup] | None]]]:
    """Mean drop in attack success by phase of the attack (rows) and of the defense (columns pre, during, post, mixed), with pairs and utility."""
    phase_a = {a.label: a.phase for a in grid.attacks}
    phase_d = {d.label: d.phase for d in grid.defenses}
    held: dict[tuple[str, str], list[Effect]] = defaultdict(list)
    for effect in verdict.effects:
        held[phase_a[effect.attack], phase_d[effect.defense]].append(effect)

    def square(own: list[Effect]) -> tuple[float, int, Markup] | None:
        return (fmean(e.drop for e in own), len(own), utility_text(grid, [pair for e in own for pair in e.pairs])) if own else None
    rows = []
    for phase in ("pre", "during", "post"):
        if any(a == phase for a, _ in held):
            rows.append((phase, [square(held.get((phase, d), [])) for d in ("pre", "during", "post", "mixed")]))
    return rows


def cost(results: Results) -> dict[str, Any]:
    """Stage kinds with count, cached and wall seconds; the dearest stages; what sharing saved."""
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"stages": 0, "cached": 0, "failed": 0, "wall": 0.0, "tokens": 0, "unshared": 0.0})
    rows = results.stages.to_pylist()
    for row in rows:
        kind, wall = kinds[row["kind"] or "?"], row["wall_s"] or 0.0
        kind["stages"] += 1
        kind["cached"] += bool(row["cached"])
        kind["failed"] += row["status"] == "failed"
        kind["wall"] += wall
        kind["tokens"] += row["tokens"] or 0
        kind["unshared"] += wall * max(1, row["cells_served"] or 1)
    total = sum(k["wall"] for k in kinds.values())
    unshared = sum(k["unshared"] for k in kinds.values())
    table = [{"kind": name, **k, "share": k["wall"] / total if total else 0.0} for name, k in kinds.items()]
    return {"kinds": sorted(table, key=lambda k: -k["wall"]), "total": total, "unshared": unshared, "stages": len(rows),
            "cached": sum(k["cached"] for k in kinds.values()),
            "fresh": sum(r["wall_s"] or 0.0 for r in rows if not r["cached"]),
            "dearest": sorted((r for r in rows if r["wall_s"]), key=lambda r: (-r["wall_s"], r["digest"]))[:12]}


def failures(grid: Grid, results: Results) -> list[dict[str, Any]]:
    """Every failed cell with its error."""
    found = []
    for cell in results.cells.to_pylist():
        if cell["status"] == "failed":
            model, task, attack, defense = grid.place[cell["cell"]]
            found.append({"cell": cell["cell"], "model": model, "task": task, "attack": attack, "defense": defense,
                          "seed": cell["seed"], "code": cell["error_code"], "error": cell["error"] or "no message"})
    return _in_order(grid, found)


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
