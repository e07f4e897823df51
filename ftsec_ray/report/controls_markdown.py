"""Every defense beside its own control, as a Markdown table: one row per model, task and stack, one
column per attack. A cell holds the attack's success with the defense and with its control, and what
the corrected comparison of the two says. Of several controls, the one with the lowest success
stands there, because a defense must beat each.
"""

from __future__ import annotations

from ftsec_ray.report.answer import controls_of, short_names, stacks_only_controls
from ftsec_ray.report.grid import Grid, Key, build_grid
from ftsec_ray.results.points import NONE
from ftsec_ray.results.read import Results
from ftsec_ray.shown_text import for_markdown

LEGEND = (
    "Attack success with the defense / with its control, of several controls with the one that"
    " leaves least, and what the corrected comparison of the two says. Last column: {utility}"
    " without an attack."
)
CONCLUSIONS = {"no difference shown": "no difference"}
"""Conclusion of a comparison -> its form in a table, where it is shorter."""


def controls_markdown(results: Results) -> str:
    """The table and its legend; empty if the sweep compares no defense with a control."""
    return controls_table(build_grid(results))


def controls_table(grid: Grid) -> str:
    """The same of a grid."""
    controls = controls_of(grid)
    only = stacks_only_controls(controls)
    names = short_names(grid, only)
    stacks = [one.label for one in grid.defenses if one.label in controls]
    if not stacks:
        return ""
    attacks = [one.label for one in grid.real_attacks]
    several = len(grid.tasks) > 1
    head = ["model", *(["task"] if several else []), "defense", *attacks, "utility"]
    lines = [markdown_line(head), "|" + "---|" * len(head)]
    for model, task in grid.slices():
        for stack in (NONE, *stacks):
            shown = [_shown(grid, (model.name, task, attack, stack)) for attack in attacks]
            if any(shown):
                place = [model.name, *([task] if several else []), names.get(stack, stack)]
                utility = utility_text(grid, (model.name, task, NONE, stack))
                lines.append(markdown_line([*place, *shown, utility]))
    metrics = dict.fromkeys(name for own in grid.utility_metrics.values() for name in own)
    return "\n".join([*lines, "", LEGEND.format(utility=" · ".join(metrics))])


def markdown_line(values: list[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(for_markdown, values))} |"


def _shown(grid: Grid, key: Key) -> str:
    """Success with the defense, with its control, and the conclusion; empty where there is none."""
    own = grid.value(key)
    if own is None:
        return ""
    compared = [
        (other.value, grid.success_row(key, at))
        for at in grid.controls_at(key)
        if (other := grid.value(at)) is not None
    ]
    if not compared:
        return f"{own.value:.2f}"
    least, row = min(compared, key=lambda one: one[0])
    word = "not tested" if row is None else CONCLUSIONS.get(row["conclusion"], row["conclusion"])
    return f"{own.value:.2f} / {least:.2f} {word}"


def utility_text(grid: Grid, key: Key) -> str:
    """The utility of a point, one number per metric."""
    measured = [grid.value(key, metric) for metric in grid.utility_metrics[key[1]]]
    return " · ".join("–" if one is None else f"{one.value:.2f}" for one in measured)
