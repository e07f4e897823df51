"""The comparisons of attack success as the page shows them: in words, sorted by effect, and as a
forest plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from ftsec_ray.measured import null_text
from ftsec_ray.report import forest as forest_of
from ftsec_ray.report.answer import controls_of, short_names, stacks_only_controls
from ftsec_ray.report.grid import Grid, Key, UtilityMark
from ftsec_ray.report.verdict import change_text
from ftsec_ray.results.compare import MOMENT
from ftsec_ray.results.points import NONE

MAX_FOREST = 40
"""Comparisons in the forest plot at a time; the table below it holds all."""
HELD_FOREST = 240
"""Those that the page's filters can bring into it."""


@dataclass(frozen=True)
class ShownComparison:
    """One comparison of attack success, with the utility of the same two points."""

    own: Key
    other: Key
    """The points compared."""
    kind: str
    row: Mapping[str, Any]
    """As the table `comparisons` has it."""
    utility: str

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.own[0]

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.own[1]

    @property
    def attack(self) -> str:
        """Label of the attack."""
        return self.own[2]

    @property
    def defense(self) -> str:
        """Label of the stack."""
        return self.own[3]

    @property
    def against(self) -> str:
        """Label of the stack compared with."""
        return self.other[3]

    @property
    def is_over_time(self) -> bool:
        """Whether it compares a point with itself before the fine-tune."""
        return self.kind == MOMENT

    @property
    def title(self) -> str:
        """What is compared, in words."""
        return self.title_by({})

    def title_by(self, names: Mapping[str, str]) -> str:
        """The same with other names of the stacks."""
        own = names.get(self.defense, self.defense)
        if self.is_over_time:
            return f"{own}: after the fine-tune vs before"
        other = names.get(self.against, self.against)
        return f"{own} vs {'no defense' if other == NONE else other}"

    @property
    def tone(self) -> str:
        """better, worse, incoherent, or open."""
        word = str(self.row["conclusion"])
        return word if word in ("better", "worse", "incoherent") else "open"

    @property
    def words(self) -> str:
        """What can be said."""
        row = self.row
        if row["conclusion"] == "not tested":
            return f"not tested: {row['note'] or 'no p'}"
        if row["conclusion"] == "incoherent":
            return f"not counted as safe or unsafe: {row['note']}"
        if row["conclusion"] != "no difference shown":
            return str(row["conclusion"]) + (
                f"; utility {row['utility']}" if row["utility"].startswith("worse") else ""
            )
        if row["detectable"] is None:
            return "no difference shown; too few seeds or prompts to show any"
        return f"no difference shown; one of {row['detectable']:.2f} would have been shown"

    @property
    def seeds(self) -> str:
        """How many seeds and prompts it rests on."""
        count = "1 seed" if self.row["n_seeds"] == 1 else f"{self.row['n_seeds']} seeds"
        return (
            count if self.row["n_prompts"] is None else f"{count}, {self.row['n_prompts']} prompts"
        )

    @property
    def nulls(self) -> str:
        """The share of its prompts that were left out, since some verdict is null."""
        judged, left_out = self.row["n_prompts"], self.row["n_dropped"]
        return null_text(
            None if judged is None or left_out is None else (left_out, judged + left_out)
        )


def contrasts(grid: Grid) -> list[ShownComparison]:
    """The comparisons of attack success, those that lower it most first; what has no effect comes
    last.
    """
    found = []
    for own, other, metric in grid.compared:
        row = grid.success_row(own, other) if metric == grid.points[own].success_metric else None
        if row is not None:
            found.append(ShownComparison(own, other, row["kind"], row, _beside(grid, own, other)))
    return sorted(
        found,
        key=lambda c: (
            c.row["effect"] is None,
            c.row["effect"] or 0.0,
            c.model,
            c.task,
            c.attack,
            c.defense,
            c.against,
        ),
    )


def forest(grid: Grid, found: Sequence[ShownComparison]) -> tuple[Markup, int] | None:
    """The plot of the largest effects on real attacks that were tested, and how many more there
    are; None where there is none.
    """
    tested = [c for c in found if c.row["q"] is not None and c.attack != NONE]
    by_size = sorted(tested, key=lambda c: -abs(c.row["effect"]))
    names = short_names(grid, stacks_only_controls(controls_of(grid)))
    first, held = ({id(c) for c in by_size[:most]} for most in (MAX_FOREST, HELD_FOREST))
    lines = [
        forest_of.Line(
            tone=c.tone,
            title=c.title_by(names),
            about=" · ".join([c.attack, c.model, *[c.task] * (len(grid.tasks) > 1)]),
            effect=c.row["effect"],
            low=c.row["ci_low"],
            high=c.row["ci_high"],
            detectable=c.row["detectable"],
            words=f"{c.row['conclusion']} · {c.seeds}",
            beside=f"{c.utility} · {c.nulls}",
            facets=grid.facets(c.own),
        )
        for c in sorted((c for c in tested if id(c) in held), key=lambda c: id(c) not in first)
    ]
    if not lines:
        return None
    plot = forest_of.forest(
        lines,
        title="difference in attack success of pairs of stacks, with 95 % intervals",
        shown=MAX_FOREST,
    )
    return plot, max(0, len(tested) - MAX_FOREST)


def _beside(grid: Grid, own: Key, other: Key) -> str:
    """The utility of a pair, the stack compared with first; an arrow where the stack is clearly
    worse.
    """
    parts = []
    for before, after in zip(grid.utilities(other), grid.utilities(own), strict=True):
        row = grid.comparison(own, other, after.metric)
        if row is not None:
            before = UtilityMark(before.metric, row["rate_against"])
            after = UtilityMark(after.metric, row["rate"], row["conclusion"] == "worse")
        parts.append(change_text(before, replace(after, fell=row is not None and after.fell)))
    return " · ".join(parts)
