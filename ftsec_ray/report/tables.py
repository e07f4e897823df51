"""The tables of the page as plain values: the heatmap, detectors, filters, cost and failures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ftsec_ray import schema
from ftsec_ray.measured import null_text
from ftsec_ray.report import figures
from ftsec_ray.report.grid import (
    Grid,
    Key,
    MethodLabel,
    Model,
    UtilityMark,
)
from ftsec_ray.report.verdict import Effect, Summary, utility_text
from ftsec_ray.results.detection import Scored, separation
from ftsec_ray.results.points import NONE, SUCCESS, GridPoint

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

_VOID = {SUCCESS, *schema.SAFETY}


@dataclass(frozen=True)
class HeatCell:
    """One square of the heatmap."""

    index: int | None
    """Place in the metric arrays; None where nothing was planned."""
    status: str
    notes: tuple[str, ...]
    utility: tuple[UtilityMark, ...] = ()
    lift: str = ""
    """Success over the unattacked, undefended model; empty where that has no such metric."""


@dataclass(frozen=True)
class Heat:
    """The heatmaps of all models, and per metric what stands in each square."""

    slices: list[tuple[Model, str, list[tuple[MethodLabel, list[HeatCell]]]]]
    metrics: list[dict[str, str]]
    """name, title, meaning, low and high ends of the colour scale."""
    data: dict[str, list[list[Any] | None]]
    """Metric -> per square [colour step, value, interval, n, null verdicts, seeds, interval over
    seeds], None where it was not measured.
    """
    keys: list[Key]
    """The points of the squares."""


def metric_title(name: str) -> str:
    """A metric's name as people read it."""
    return {
        SUCCESS: "attack success",
        "cacc": "clean accuracy (cacc)",
        "asr": "attack success rate (asr)",
    }.get(name, name.replace("_", " "))


def heat(grid: Grid) -> Heat:
    """The heatmaps of a grid, one per model and task."""
    names = [name for name in grid.metrics if name not in schema.ABOUT_DEFENSES]
    scales = {name: _scale(grid, name) for name in names}
    data: dict[str, list[list[Any] | None]] = {name: [] for name in names}
    slices = []
    keys: list[Key] = []
    for model, task in grid.slices():
        lines = []
        for attack in grid.attacks:
            squares = []
            for defense in grid.defenses:
                key = (model.name, task, attack.label, defense.label)
                point = grid.points.get(key)
                if point is None:
                    squares.append(HeatCell(None, "not planned", ()))
                    continue
                squares.append(
                    HeatCell(
                        len(keys),
                        point.status,
                        _notes(point),
                        grid.utilities(key) if point.measured else (),
                        grid.lifts[key].text if key in grid.lifts else "",
                    )
                )
                keys.append(key)
                for name in names:
                    data[name].append(_square(point, name, scales[name]))
            lines.append((attack, squares))
        slices.append((model, task, lines))
    return Heat(slices, [_legend(grid, name) for name in names], data, keys)


def _notes(point: GridPoint) -> tuple[str, ...]:
    notes = ("incoherent",) * point.is_incoherent
    if point.status == "partly":
        return (*notes, f"{point.statuses['done']} of {sum(point.statuses.values())} seeds")
    if point.status != "done":
        return (*notes, point.status)
    return notes if point.measured else (*notes, "no metrics")


def _square(point: GridPoint, name: str, scale: Callable[[float], float]) -> list[Any] | None:
    """What a square shows of a metric; the colour step is -1, no colour, where gibberish would look
    safe.
    """
    found = point.value(name)
    if found is None:
        unjudged = point.unjudged.get(point.success_metric if name == SUCCESS else name)
        if unjudged is not None:
            return [-1, "not judged", "", 0, null_text((unjudged, unjudged)), len(point.seeds), ""]
        if name == SUCCESS and point.measured:
            return [-1, "not measured", "", None, "", len(point.seeds), ""]
        return None
    step = -1 if point.is_incoherent and name in _VOID else figures.heat_step(scale(found.value))
    is_of_verdicts = (
        name == SUCCESS or name not in schema.METRICS or bool(schema.METRICS[name].probes)
    )
    nulls = found.null_text if is_of_verdicts else ""
    return [
        step,
        _number(found.value),
        _interval(found.prompts),
        found.n,
        nulls,
        found.seeds,
        _interval(found.over_seeds),
    ]


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
    values = [p.measured[metric].value for p in grid.points.values() if metric in p.measured]
    if min(values) > 0:
        low, high = math.log(min(values)), math.log(max(values))
        return lambda value: (math.log(value) - low) / ((high - low) or 1)
    low, high = min(values), max(values)
    return lambda value: (value - low) / ((high - low) or 1)


def _legend(grid: Grid, metric: str) -> dict[str, str]:
    known = schema.METRICS.get(metric)
    meaning = known.meaning if known else ""
    if metric == SUCCESS:
        meaning = (
            "for backdoors the share of prompts with the trigger that give the attacker's output"
            " (asr); for attacks on refusal, and without an attack, the share of forbidden requests"
            " that are fulfilled (harmful rate)"
        ) + "".join(f"; {one.turned} for {one.label}" for one in grid.attacks if one.turned)
    ends = ("0", "1")
    if known is not None and not known.proportion:
        values = [p.measured[metric].value for p in grid.points.values() if metric in p.measured]
        ends = (_number(min(values)), _number(max(values)))
    if known is not None and known.better == "higher":
        ends = ends[::-1]
    return {
        "name": metric,
        "title": metric_title(metric),
        "meaning": meaning,
        "good": ends[0],
        "bad": ends[1],
    }


def detections(grid: Grid) -> list[dict[str, Any]]:
    """One row per model, attack and stack with a detector: AUROC against clean models, and the
    standardised score; without attacks that the detectors never saw.
    """
    seen = {NONE, *(attack.label for attack in _seen(grid))}
    rows = _measured(grid, auroc="detect_auroc", score="detect_score")
    return [row for row in rows if row["attack"] in seen]


def _seen(grid: Grid) -> list[MethodLabel]:
    """The attacks whose models detectors read: those of phase `post` act after detectors."""
    return [attack for attack in grid.real_attacks if attack.phases != ("post",)]


def sweep_detections(grid: Grid) -> list[dict[str, Any]]:
    """One row per task, attack and detector: how well its score tells the attacked models of the
    sweep from the models of the sweep that nobody attacked.
    """
    rows = []
    for task in grid.tasks:
        for defense in grid.defenses:
            clean = _scored(grid, task, NONE, defense.label)
            for attack in _seen(grid):
                attacked = _scored(grid, task, attack.label, defense.label)
                found = separation(clean, attacked)
                if found is not None:
                    shown = {"task": task, "attack": attack.label, "defense": defense.label}
                    rows.append({**shown, "found": found})
    return rows


def _scored(grid: Grid, task: str, attack: str, defense: str) -> list[Scored]:
    """The detector's scores of all models and seeds of an attack."""
    keys = [(model.name, task, attack, defense) for model in grid.models]
    return [
        Scored(
            raw.value,
            None if (own := point.values["detect_score"].get(cell)) is None else own.value,
        )
        for point in (grid.points[key] for key in keys if key in grid.points)
        for cell, raw in point.values["detect_raw"].items()
    ]


def filters(grid: Grid) -> list[dict[str, Any]]:
    """One row per model, attack and stack with a filter of training rows: what it caught and what
    it took by mistake.
    """
    return _measured(grid, tpr="filter_tpr", fpr="filter_fpr")


def _measured(grid: Grid, **metrics: str) -> list[dict[str, Any]]:
    """One row per point at which one of the metrics was measured, each under its key."""
    found = []
    for (model, task, attack, defense), point in grid.points.items():
        values = {key: point.value(metric) for key, metric in metrics.items()}
        if any(value is not None for value in values.values()):
            found.append(
                {
                    "model": model,
                    "task": task,
                    "attack": attack,
                    "defense": defense,
                    "facets": grid.facets((model, task, attack, defense)),
                    **values,
                }
            )
    return _in_order(grid, found)


def _in_order(grid: Grid, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    attack = {a.label: i for i, a in enumerate(grid.attacks)}
    defense = {d.label: i for i, d in enumerate(grid.defenses)}
    model = {m.name: i for i, m in enumerate(grid.models)}
    return sorted(
        rows,
        key=lambda r: (defense[r["defense"]], r["task"], attack[r["attack"]], model[r["model"]]),
    )


def phase_table(
    grid: Grid, verdict: Summary
) -> list[tuple[str, list[tuple[float, int, Markup, int] | None]]]:
    """Mean drop by phase of the attack (rows) and of the defense (columns pre, during, post,
    mixed), with pairs, utility and seeds.
    """
    phase_a = {a.label: a.phase for a in grid.attacks}
    phase_d = {d.label: d.phase for d in grid.defenses}
    held: dict[tuple[str, str], list[Effect]] = defaultdict(list)
    for effect in verdict.effects:
        held[phase_a[effect.attack], phase_d[effect.defense]].append(effect)

    def square(own: list[Effect]) -> tuple[float, int, Markup, int] | None:
        if not own:
            return None
        return (
            fmean(e.drop for e in own),
            len(own),
            utility_text(grid, [pair for e in own for pair in e.pairs]),
            min(e.seeds for e in own),
        )

    rows = []
    for phase in ("pre", "during", "post"):
        if any(a == phase for a, _ in held):
            rows.append(
                (
                    phase,
                    [square(held.get((phase, d), [])) for d in ("pre", "during", "post", "mixed")],
                )
            )
    return rows


def cost(results: Results) -> dict[str, Any]:
    """Stage kinds with count, cached and wall seconds; the most expensive stages; what
    sharing saved.
    """
    kinds: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"stages": 0, "cached": 0, "failed": 0, "wall": 0.0, "tokens": 0, "unshared": 0.0}
    )
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
    table = [
        {"kind": name, **k, "share": k["wall"] / total if total else 0.0}
        for name, k in kinds.items()
    ]
    return {
        "kinds": sorted(table, key=lambda k: -k["wall"]),
        "total": total,
        "unshared": unshared,
        "stages": len(rows),
        "cached": sum(k["cached"] for k in kinds.values()),
        "fresh": sum(r["wall_s"] or 0.0 for r in rows if not r["cached"]),
        "dearest": sorted(
            (r for r in rows if r["wall_s"]), key=lambda r: (-r["wall_s"], r["digest"])
        )[:12],
    }


def failures(grid: Grid, results: Results) -> list[dict[str, Any]]:
    """Every failed cell with its error."""
    found = []
    for cell in results.cells.to_pylist():
        if cell["status"] == "failed":
            model, task, attack, defense = grid.place[cell["cell"]]
            found.append(
                {
                    "cell": cell["cell"],
                    "model": model,
                    "task": task,
                    "attack": attack,
                    "defense": defense,
                    "seed": cell["seed"],
                    "code": cell["error_code"],
                    "error": cell["error"] or "no message",
                    "facets": grid.facets((model, task, attack, defense)),
                }
            )
    return _in_order(grid, found)


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
