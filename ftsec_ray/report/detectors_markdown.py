"""What detectors found among the models of the sweep, as a Markdown table: one row per detector and
attack.
"""

from __future__ import annotations

from ftsec_ray.report.grid import Grid
from ftsec_ray.report.markdown_table import markdown_table
from ftsec_ray.report.tables import sweep_detections

LEGEND = (
    "AUROC: the chance that an attacked model of this sweep scores above one that nobody attacked."
    " Found: share of attacked models, with its 95 % interval, above the threshold that at most 1 %"
    " of the unattacked ones exceed; with fewer than 100 of these, none exceeds it."
)


def detectors_table(grid: Grid) -> str:
    """The table and its legend; empty if no detector scored attacked and unattacked models."""
    detections, several = sweep_detections(grid), len(grid.tasks) > 1
    if not detections:
        return ""
    rows = []
    for row in detections:
        found, tpr = row["found"], row["found"].tpr
        rows.append(
            [
                *(row["defense"], row["attack"], *([row["task"]] if several else [])),
                f"{found.auroc:.2f}",
                f"{tpr.value:.2f} ({tpr.low:.2f}–{tpr.high:.2f})",
                f"{found.n_attacked} attacked, {found.n_clean} not",
            ]
        )
    head = ["detector", "attack", *(["task"] if several else []), "AUROC", "found", "models"]
    return markdown_table(head, rows, LEGEND)
