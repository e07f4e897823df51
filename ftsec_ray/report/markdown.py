"""The grid as a Markdown table, for a README, an issue or a terminal.

One row per model, task and attack, one column per defense stack, or the other way round if that is
narrower; the task is named where there are several. A cell is the attack's success (the metric that
it declares; `harmful_rate` without an attack) with its 95 % interval over prompts and, from two
seeds on, over seeds; in its second line stand clean accuracy, over-refusal and coherence of the
same cell. Where a judge left answers without a verdict, their share stands beside the rate. One
seed has a mark, and incoherent cells say so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ftsec_ray.measured import NO_ANSWER, null_share, utility_metrics
from ftsec_ray.report.utility_section import utility_markdown
from ftsec_ray.results.lift import Lift, lifts
from ftsec_ray.results.points import GridPoint, method_names, points_of, sizes_of
from ftsec_ray.results.read import Results
from ftsec_ray.results.stage_warnings import lines_of, warnings_in
from ftsec_ray.shown_text import for_markdown
from ftsec_ray.success import is_driven_up

Row = Mapping[str, Any]
MAX_COLUMNS = 12
"""Stacks that stand beside each other in one row; if there are more, and fewer attacks, a row is a
stack and a column an attack."""
PHASES = ("pre", "during", "post")
ONE_SEED = "†"
LEGEND = (
    "Attack success (95 % interval over prompts{seeds}); below it {utility} · over-refusal ·"
    " coherent answers{no_answer}."
)
LEGEND_ONE = f"{ONE_SEED} One seed: the interval excludes run-to-run variance."
LIFT = "lift"
LEGEND_LIFT = (
    f"{LIFT}: attack success minus that of the unattacked, undefended model on the same prompts"
    " (95 % interval)."
)
LEGEND_NULL = (
    "null: share of the answers that the judge could not place; they do not count in the rate."
)
LEGEND_NO_NULL = "The judge gave a verdict on every answer."
LEGEND_UNCOUNTED = (
    "These results do not count null verdicts: how many answers the judge could not place is not"
    " known."
)
LEGEND_DRIVEN_DOWN = "1 − {metric}: the attack drives {metric} down; its success is 1 minus that."
LEGEND_INCOHERENT = (
    "incoherent: most answers are gibberish, so that a low attack success is damage and not safety."
)


def grid_markdown(results: Results) -> str:
    """The attack x defense table of a run; failed and pending cells say so."""
    cells = results.cells.to_pylist()
    sizes = sizes_of(cells)
    cells.sort(key=lambda cell: _order(cell, sizes[cell["model"]]))
    names = method_names(cells)
    attacks = list(dict.fromkeys(names[cell["cell"]][0] for cell in cells))
    stacks = list(dict.fromkeys(names[cell["cell"]][1] for cell in sorted(cells, key=_stack_order)))
    is_tall = len(stacks) > MAX_COLUMNS and len(attacks) < len(stacks)
    is_one_task = len({cell["task"] for cell in cells}) < 2
    points = points_of(cells, results.metrics.to_pylist())
    groups: dict[tuple[str, ...], dict[tuple[str, str], GridPoint]] = defaultdict(dict)
    for point in points:
        groups[_place(point, is_one_task)][names[point.cell["cell"]]] = point
    head = ["model"] if is_one_task else ["model", "task"]
    columns = attacks if is_tall else stacks
    titles = [*head, "defense" if is_tall else "attack", *map(for_markdown, columns)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    above = lifts(results, points)
    for place, by_names in groups.items():
        for row in stacks if is_tall else attacks:
            pairs = [(column, row) if is_tall else (row, column) for column in columns]
            if not any(pair in by_names for pair in pairs):
                continue
            shown = [_shown(by_names[pair], above) if pair in by_names else "" for pair in pairs]
            lines.append(f"| {' | '.join([*map(for_markdown, (*place, row)), *shown])} |")
    legend = _legend("\n".join(lines), points, results)
    places = [(*_place(point, is_one_task), *names[point.cell["cell"]]) for point in points]
    legend += utility_markdown(points, places, [*head, "attack", "defense"])
    warned = [f"- {for_markdown(line)}" for line in lines_of(warnings_in(results.meta))]
    return "\n".join([*lines, "", *legend, *([""] * bool(warned)), *warned])


def _place(point: GridPoint, is_one_task: bool) -> tuple[str, ...]:  # noqa: FBT001
    """The model, and its task where there are several."""
    return (point.model,) if is_one_task else point.slice


def _legend(grid: str, points: Sequence[GridPoint], results: Results) -> list[str]:
    measured = set(results.metrics["metric"].to_pylist())
    clean = utility_metrics(measured)[0]
    utility = "clean accuracy" if clean == "cacc" else "right benign answers"
    found = [
        LEGEND.format(
            seeds="; over seeds" if " seeds " in grid else "",
            utility=utility,
            no_answer=" · requests without an answer" if NO_ANSWER in measured else "",
        )
    ]
    counts = results.metrics["n_null"].to_pylist()
    if any(counts):
        found.append(LEGEND_NULL)
    elif counts:
        found.append(LEGEND_NO_NULL if 0 in counts else LEGEND_UNCOUNTED)
    found += [LEGEND_LIFT] * (f", {LIFT} " in grid)
    found += [LEGEND_ONE] * (ONE_SEED in grid) + [LEGEND_INCOHERENT] * ("incoherent" in grid)
    down = {one.success_metric for one in points if not is_driven_up(one.success_metric)}
    return found + [
        LEGEND_DRIVEN_DOWN.format(metric=for_markdown(metric)) for metric in sorted(down)
    ]


def _order(cell: Row, size: int | None) -> tuple[Any, ...]:
    """By size, models of unknown size last, then in the order of the lifecycle, the undisturbed
    cell first, and along the parameters.
    """
    params = json.loads(cell["attack_params"])
    numbers = [value for _, value in sorted(params.items()) if isinstance(value, (int, float))]
    place = (size is None, size or 0, cell["model"], cell["task"] or "")
    return (
        *place,
        cell["attack"] != "none",
        _phase(cell["attack_phase"]),
        cell["attack"],
        numbers,
        cell["seed"],
    )


def _stack_order(cell: Row) -> tuple[Any, ...]:
    phases = [_phase(phase) for phase in cell["defense_phases"] or []]
    return len(cell["defenses"]), phases, cell["defenses"], cell["defense_params"] or ""


def _phase(name: str | None) -> int:
    return PHASES.index(name) if name in PHASES else 0


def _shown(point: GridPoint, above: Mapping[str, Lift]) -> str:
    """A cell of the table: the success of its attack with its lift, and utility below it."""
    undone = [status for status in point.statuses if status != "done"]
    if undone:
        return for_markdown(undone[0])
    metric = point.success_metric
    nulls = _null(point, metric)
    success = point.value()
    if success is None:
        return f"not judged{nulls}" if metric in point.unjudged else "not measured"
    inside = [] if success.prompts is None else ["{:.2f}–{:.2f}".format(*success.prompts)]
    if success.over_seeds is not None:
        inside.append("{} seeds {:.2f}–{:.2f}".format(success.seeds, *success.over_seeds))
    word = "incoherent: " if point.is_incoherent else ""
    name = "" if is_driven_up(metric) else f"1 − {for_markdown(metric)} "
    mark = (ONE_SEED if success.seeds == 1 else "") + nulls
    beside = " · ".join(
        ("–" if (mean := point.value(name)) is None else f"{mean.value:.2f}") + _null(point, name)
        for name in point.utility_metrics
    )
    lift = above.get(point.cell["cell"])
    return (
        f"{word}{name}{success.value:.2f}{mark}"
        + (f" ({'; '.join(inside)})" if inside else "")
        + (f", {LIFT} {lift.text}" if lift else "")
        + f"<br>{beside}"
    )


def _null(point: GridPoint, metric: str) -> str:
    """The share of null verdicts as it stands beside a rate; nothing where there are none."""
    share = null_share(point.nulls(metric))
    return f" [{f'{share:.0%}' if share >= 0.01 else '<1%'} null]" if share else ""
