"""The grid as a Markdown table, for a README, an issue or a terminal.

One row per model, task and attack, one column per defense stack; the task is named where there are
several. A cell is the attack's success (the metric that it declares; `harmful_rate` without an
attack) with its 95 % interval over prompts and, from two seeds on, over seeds; in its second line
stand clean accuracy, over-refusal and coherence of the same cell. Where a judge left answers
without a verdict, their share stands beside the rate. One seed has its mark, and gibberish is
called so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ftsec_ray import schema
from ftsec_ray.results.aggregate import folded, null_frac
from ftsec_ray.results.read import Results
from ftsec_ray.success import is_driven_up, shown_metric

Row = Mapping[str, Any]
PHASES = ("pre", "during", "post")
ONE_SEED = "†"
LEGEND = (
    "Attack success (95 % interval over prompts{seeds}); below it {utility} · over-refusal ·"
    " coherent answers."
)
LEGEND_ONE = f"{ONE_SEED} One seed: the interval knows nothing of the luck of a training run."
LEGEND_NULL = (
    "null: share of the answers that the judge could not judge; they are in neither side of the"
    " rate."
)
LEGEND_NO_NULL = "The judge gave a verdict on every answer."
LEGEND_UNCOUNTED = (
    "These results are older than the count of null verdicts, so that what the judge could not"
    " judge is not told."
)
LEGEND_DRIVEN_DOWN = (
    "{metrics}: named where the attack drives that metric down: low is its success."
)
LEGEND_INCOHERENT = (
    "incoherent: most answers are gibberish, so that a low attack success is damage and no safety."
)


def grid_markdown(results: Results) -> str:
    """The attack x defense table of a run; failed and pending cells say so."""
    cells = sorted(results.cells.to_pylist(), key=_order)
    rates: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in results.metrics.to_pylist():
        rates[row["cell"]][row["metric"]] = row
    names = method_names(cells)
    stacks = list(dict.fromkeys(names[cell["cell"]][1] for cell in sorted(cells, key=_stack_order)))
    groups: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    is_one_task = len({cell["task"] for cell in cells}) < 2
    for cell in cells:
        attack, stack = names[cell["cell"]]
        groups[(cell["model"], attack) if is_one_task else (cell["model"], cell["task"], attack)][
            stack
        ].append(cell["cell"])
    success = {cell["cell"]: shown_metric(cell) for cell in cells}
    states = {cell["cell"]: cell["status"] for cell in cells}
    head = ["model", "attack"] if is_one_task else ["model", "task", "attack"]
    lines = [f"| {' | '.join([*head, *stacks])} |", "|" + "---|" * len([*head, *stacks])]
    for place, by_stack in groups.items():
        metric = next(success[cell] for own in by_stack.values() for cell in own)
        shown = [_shown(by_stack.get(stack, []), metric, rates, states) for stack in stacks]
        lines.append(f"| {' | '.join([*place, *shown])} |")
    legend = _legend("\n".join(lines), rates)
    down = sorted({metric for metric in success.values() if not is_driven_up(metric)})
    if down:
        legend.append(LEGEND_DRIVEN_DOWN.format(metrics=", ".join(down)))
    return "\n".join([*lines, "", *legend])


def method_names(cells: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Cell -> its attack and its stack, each with those of its parameters that differ among these
    cells.
    """
    attacks = [(cell["attack"], json.loads(cell["attack_params"] or "{}")) for cell in cells]
    stacks = [
        list(zip(cell["defenses"] or (), json.loads(cell["defense_params"] or "[]"), strict=True))
        for cell in cells
    ]
    varied, differing = _varied(attacks), _varied([pair for stack in stacks for pair in stack])
    return {
        cell["cell"]: (
            _named(*attack, varied),
            " + ".join(_named(*one, differing) for one in stack) or "none",
        )
        for cell, attack, stack in zip(cells, attacks, stacks, strict=True)
    }


def _legend(grid: str, rates: Mapping[str, Mapping[str, Row]]) -> list[str]:
    utility = (
        "right benign answers"
        if not any("cacc" in own for own in rates.values())
        else "clean accuracy"
    )
    found = [LEGEND.format(seeds="; over seeds" if " seeds " in grid else "", utility=utility)]
    counts = [row["n_null"] for own in rates.values() for row in own.values()]
    if any(counts):
        found.append(LEGEND_NULL)
    elif counts:
        found.append(LEGEND_NO_NULL if 0 in counts else LEGEND_UNCOUNTED)
    return found + [LEGEND_ONE] * (ONE_SEED in grid) + [LEGEND_INCOHERENT] * ("incoherent" in grid)


def _order(cell: Row) -> tuple[Any, ...]:
    """By size, then in the order of the lifecycle, the undisturbed cell first, and along the
    parameters.
    """
    params = json.loads(cell["attack_params"])
    numbers = [value for _, value in sorted(params.items()) if isinstance(value, (int, float))]
    place = (cell["model_params"] or 0, cell["model"], cell["task"] or "")
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


def _varied(methods: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Method -> its parameters that differ between cells."""
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, params in methods:
        for key, value in params.items():
            seen[name][key].add(json.dumps(value))
    return {
        name: [key for key, values in params.items() if len(values) > 1]
        for name, params in seen.items()
    }


def _named(name: str, params: Mapping[str, Any], varied: Mapping[str, Sequence[str]]) -> str:
    """A method with those of its parameters that differ in this sweep."""
    told = ", ".join(f"{key} {params[key]}" for key in varied.get(name, ()))
    return f"{name} ({told})" if told else name


def _shown(
    cells: Sequence[str],
    metric: str,
    rates: Mapping[str, Mapping[str, Row]],
    states: Mapping[str, str],
) -> str:
    """A cell of the table; `metric` is the success of its attack."""
    if not cells:
        return ""
    undone = [states[cell] for cell in cells if states[cell] != "done"]
    if undone:
        return undone[0]
    asked = [row for cell in cells if (row := rates[cell].get(metric))]
    found = [row for row in asked if row["value"] is not None]
    if not found:
        return f"not judged{_null(asked)}" if asked else "not measured"
    name = "" if is_driven_up(metric) else f"{metric} "
    success = folded(found, found[0]["metric"])
    inside = [] if success.prompts is None else ["{:.2f}–{:.2f}".format(*success.prompts)]
    if success.seeds is not None:
        inside.append("{} seeds {:.2f}–{:.2f}".format(success.n_seeds, *success.seeds))
    coherent = _mean(cells, rates, "coherent_rate")
    word = "incoherent: " if coherent is not None and coherent < schema.INCOHERENT_BELOW else ""
    mark = (ONE_SEED if success.n_seeds == 1 else "") + _null(asked)
    utility = "cacc" if any("cacc" in rates[cell] for cell in cells) else "benign_rate"
    beside = " · ".join(
        ("–" if (mean := _mean(cells, rates, name)) is None else f"{mean:.2f}")
        + _null([row for cell in cells if (row := rates[cell].get(name))])
        for name in (utility, "over_refusal_rate", "coherent_rate")
    )
    return (
        f"{word}{name}{success.value:.2f}{mark}"
        + (f" ({'; '.join(inside)})" if inside else "")
        + f"<br>{beside}"
    )


def _mean(
    cells: Sequence[str], rates: Mapping[str, Mapping[str, Row]], metric: str
) -> float | None:
    values = [
        row["value"]
        for cell in cells
        if (row := rates[cell].get(metric)) and row["value"] is not None
    ]
    return sum(values) / len(values) if values else None


def _null(rows: Sequence[Row]) -> str:
    """The share of null verdicts as it stands beside a rate; nothing where there are none."""
    share = null_frac(rows)
    return f" [{f'{share:.0%}' if share >= 0.01 else '<1%'} null]" if share else ""
