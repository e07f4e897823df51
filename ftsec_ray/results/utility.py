"""What a cell is still good for, as it stands beside every number on its safety."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

NAMES = "clean accuracy · over-refusal · coherent answers"
"""What the text of a utility holds."""


class Utility(NamedTuple):
    """Utility of a cell, or the mean over several; None where it was not measured."""

    clean: float | None
    """Clean accuracy, or the share of benign requests answered right where a task has none."""
    over_refusal: float | None
    coherent: float | None

    @property
    def text(self) -> str:
        """The three numbers."""
        return " · ".join("–" if value is None else f"{value:.2f}" for value in self)


UNKNOWN = Utility(None, None, None)


def utilities(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Utility]:
    """The utility of every measured cell, from the rows of the table `metrics`."""
    values: dict[str, dict[str, float | None]] = defaultdict(dict)
    for row in metrics:
        values[row["cell"]][row["metric"]] = row["value"]
    return {
        cell: Utility(
            own.get("cacc", own.get("benign_rate")),
            own.get("over_refusal_rate"),
            own.get("coherent_rate"),
        )
        for cell, own in values.items()
    }


def mean_utility(found: Iterable[Utility]) -> Utility:
    """The mean of each number over those that have it."""
    columns = [
        [value for value in column if value is not None] for column in zip(*found, strict=True)
    ]
    return Utility(*(fmean(known) if known else None for known in columns)) if columns else UNKNOWN
