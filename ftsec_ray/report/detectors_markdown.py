"""What detectors found among the models of the sweep, as a Markdown table: one row per detector and
attack.
"""

from __future__ import annotations

from ftsec_ray.report.controls_markdown import markdown_line
from ftsec_ray.report.grid import Grid, build_grid
from ftsec_ray.report.tables import sweep_detections
from ftsec_ray.results.read import Results

LEGEND = (
    "AUROC: the chance that an attacked model of this sweep scores above one that nobody attacked."
    " Found: share of attacked models, with its 95 % interval, above the threshold that at most 1 %"
    " of the unattacked ones exceed; with fewer than 100 of these, none exceeds it."
)


def detectors_markdown(results: Results) -> str:
    """The table and its legend; empty if no detector scored attacked and unattacked models."""
    return detectors_table(build_grid(results))


def detectors_table(grid: Grid) -> str:
    """The same of a grid."""
    rows, several = sweep_detections(grid), len(grid.tasks) > 1
    if not rows:
        return ""
    head = ["detector", "attack", *(["task"] if several else []), "AUROC", "found"]
    lines = [markdown_line([*head, "models"]), "|" + "---|" * (len(head) + 1)]
    for row in rows:
        found = row["found"]
        tpr = found.tpr
        place = [row["defense"], row["attack"], *([row["task"]] if several else [])]
        share = f"{tpr.value:.2f} ({tpr.low:.2f}–{tpr.high:.2f})"
        models = f"{found.n_attacked} attacked, {found.n_clean} not"
        lines.append(markdown_line([*place, f"{found.auroc:.2f}", share, models]))
    return "\n".join([*lines, "", LEGEND])
