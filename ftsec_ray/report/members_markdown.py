"""Every stack of several defenses beside its best member, as a Markdown table: one row per model,
task and stack, one column per attack. A cell holds the attack's success with the stack and with the
member alone, their difference with its 95 % interval, and what the corrected comparison says.
Stacks that are in the sweep as another's control have no row.
"""

from __future__ import annotations

from ftsec_ray.report.answer import controls_of, short_names, stacks_only_controls
from ftsec_ray.report.controls_markdown import CONCLUSIONS, utility_names, utility_text
from ftsec_ray.report.grid import Grid, Key
from ftsec_ray.report.markdown_table import markdown_table
from ftsec_ray.report.number_text import signed
from ftsec_ray.results.points import NONE

LEGEND = (
    "Attack success with the stack / with the best of its members that the sweep has alone, which"
    " is named, on the seeds and prompts that both have; their difference with its 95 % interval,"
    " below 0 where the stack does better; what the corrected comparison says. Last column:"
    " {utility} without an attack."
)


def members_table(grid: Grid) -> str:
    """The table and its legend; empty if the sweep has no stack beside a member."""
    only = stacks_only_controls(controls_of(grid))
    names = short_names(grid, only)
    attacks = [one.label for one in grid.real_attacks]
    several = len(grid.tasks) > 1
    rows = []
    for model, task in grid.slices():
        for stack in (one.label for one in grid.defenses if one.label not in only):
            keys: list[Key] = [(model.name, task, attack, stack) for attack in attacks]
            if any(grid.best_member_at(key) is not None for key in keys):
                place = [model.name, *([task] if several else []), names.get(stack, stack)]
                shown = [_shown(grid, key, names) for key in keys]
                utility = utility_text(grid, (model.name, task, NONE, stack))
                rows.append([*place, *shown, utility])
    if not rows:
        return ""
    head = ["model", *(["task"] if several else []), "stack", *attacks, "utility"]
    return markdown_table(head, rows, LEGEND.format(utility=utility_names(grid)))


def _shown(grid: Grid, key: Key, names: dict[str, str]) -> str:
    """Success with the stack and with its best member; empty where there is none."""
    own, best = grid.value(key), grid.best_member_at(key)
    if own is None:
        return ""
    other = None if best is None else grid.value(best)
    if best is None or other is None:
        return f"{own.value:.2f}"
    row, name = grid.success_row(key, best), names.get(best[3], best[3])
    if row is None or row["effect"] is None:
        return f"{own.value:.2f} / {other.value:.2f} {name}: not tested"
    pair = f"{row['rate']:.2f} / {row['rate_against']:.2f} {name}"
    word = CONCLUSIONS.get(row["conclusion"], row["conclusion"])
    between = (
        "" if row["ci_low"] is None else f" ({signed(row['ci_low'])} to {signed(row['ci_high'])})"
    )
    return f"{pair}: {signed(row['effect'])}{between} {word}"
