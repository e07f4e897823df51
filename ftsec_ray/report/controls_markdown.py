"""Every defense beside its own control, as a Markdown table: one row per model, task and stack, one
column per attack. A cell holds the attack's success with the defense and with its control, and what
the corrected comparison of the two says. Of several controls, the one with the lowest success
stands there, because a defense must beat each.
"""

from __future__ import annotations

from ftsec_ray.report.answer import controls_of, short_names, stacks_only_controls
from ftsec_ray.report.grid import Grid, Key
from ftsec_ray.report.markdown_table import markdown_table
from ftsec_ray.results.points import NONE

LEGEND = (
    "Attack success with the defense / with its control, of several controls with the one that"
    " leaves least, and what the corrected comparison of the two says. Last column: {utility}"
    " without an attack."
)
CONCLUSIONS = {"no difference shown": "no difference"}
"""Conclusion of a comparison -> its form in a table, where it is shorter."""


def controls_table(grid: Grid) -> str:
    """The table and its legend; empty if the sweep compares no defense with a control."""
    controls = controls_of(grid)
    only = stacks_only_controls(controls)
    names = short_names(grid, only)
    stacks = [one.label for one in grid.defenses if one.label in controls]
    if not stacks:
        return ""
    attacks = [one.label for one in grid.real_attacks]
    several = len(grid.tasks) > 1
    head = ["model", *(["task"] if several else []), "defense", *attacks, "utility"]
    rows = []
    for model, task in grid.slices():
        for stack in (NONE, *stacks):
            shown = [_shown(grid, (model.name, task, attack, stack)) for attack in attacks]
            if any(shown):
                place = [model.name, *([task] if several else []), names.get(stack, stack)]
                utility = utility_text(grid, (model.name, task, NONE, stack))
                rows.append([*place, *shown, utility])
    return markdown_table(head, rows, LEGEND.format(utility=utility_names(grid)))


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


def utility_names(grid: Grid) -> str:
    """What the numbers of `utility_text` are."""
    return " · ".join(dict.fromkeys(name for own in grid.utility_metrics.values() for name in own))
