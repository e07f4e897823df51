"""What models are good for beyond the utility that stands beside every safety metric: benchmarks,
the loss of held-out answers, and how often their answers win over those of the clean fine-tune.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.measured import Measured
from ftsec_ray.results.points import NONE, GridPoint
from ftsec_ray.shown_text import for_markdown
from ftsec_ray.stages.benchmark import PREFIX

if TYPE_CHECKING:
    from ftsec_ray.report.grid import Grid

LOSS, WINS = "answer_loss", "win_rate"
BENCHMARKS = f"{PREFIX}:"
LEGEND = (
    "Benchmarks, held-out loss and win rate over the clean fine-tune, with their 95 % intervals."
)


def shown(metrics: Iterable[str]) -> list[str]:
    """Those of the metrics that the section is about, in their order."""
    return [
        name
        for name in schema.in_order(metrics)
        if name in (LOSS, WINS) or name.startswith(BENCHMARKS)
    ]


def utility_rows(grid: Grid) -> list[dict[str, Any]]:
    """One row per metric and point at which it was measured, with its value without attack and
    defense on the same model and task.
    """
    attacks = [attack.label for attack in grid.attacks]
    defenses = [defense.label for defense in grid.defenses]
    models = [model.name for model in grid.models]

    def place(key: tuple[str, str, str, str]) -> tuple[str, int, int, int]:
        model, task, attack, defense = key
        return task, models.index(model), attacks.index(attack), defenses.index(defense)

    rows = []
    for metric in shown(grid.metrics):
        for key in sorted(grid.points, key=place):
            measured = grid.value(key, metric)
            if measured is not None:
                model, task, attack, defense = key
                rows.append(
                    {
                        "metric": metric.removeprefix(BENCHMARKS),
                        "better": schema.METRICS[metric].better,
                        "model": model,
                        "task": task,
                        "attack": attack,
                        "defense": defense,
                        "facets": grid.facets(key),
                        "value": measured,
                        "clean": grid.value((model, task, NONE, NONE), metric),
                    }
                )
    return rows


def utility_markdown(
    points: Sequence[GridPoint], places: Sequence[Sequence[str]], head: Sequence[str]
) -> list[str]:
    """The lines of a table of these metrics; none where nothing measured one.

    Args:
        points: Of the grid.
        places: What stands in front of each, such as model, attack and stack.
        head: The titles of that.
    """
    metrics = shown({name for point in points for name in point.measured})
    if not metrics:
        return []
    titles = [
        f"{for_markdown(name.removeprefix(BENCHMARKS))} ({schema.METRICS[name].better} is better)"
        for name in metrics
    ]
    lines = ["", f"| {' | '.join([*head, *titles])} |", "|" + "---|" * len([*head, *titles])]
    for point, place in zip(points, places, strict=True):
        values = [_text(point.value(name)) for name in metrics]
        lines.append(f"| {' | '.join([*map(for_markdown, place), *values])} |")
    return [*lines, "", LEGEND]


def _text(measured: Measured | None) -> str:
    if measured is None:
        return "–"
    inside = [] if measured.prompts is None else ["{:.2f}–{:.2f}".format(*measured.prompts)]
    if measured.over_seeds is not None:
        inside.append("{} seeds {:.2f}–{:.2f}".format(measured.seeds, *measured.over_seeds))
    inside += [] if measured.n is None else [f"n {measured.n}"]
    return f"{measured.value:.2f}" + (f" ({'; '.join(inside)})" if inside else "")
