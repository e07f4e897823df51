"""Null verdicts per row of `metrics`, counted from the answers where results are older than the
column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.success import shown_metric, source_of

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results


def with_nulls(results: Results) -> list[dict[str, Any]]:
    """The rows of `metrics` with `n_null`, the prompts that could not be judged.

    Results that have no such column are counted from `generations`: null verdicts of the probes
    that the metric is a share of. None where that cannot be known, as for a metric that is no share
    of verdicts.
    """
    rows: list[dict[str, Any]] = results.metrics.to_pylist()
    success = {cell["cell"]: shown_metric(cell) for cell in results.cells.to_pylist()}
    counted: dict[tuple[str, str], int] | None = None
    for row in rows:
        if row.get("n_null") is None:
            counted = _null_verdicts(results) if counted is None else counted
            known = [
                counted[row["cell"], probe]
                for probe in _probes(row, counted, success[row["cell"]])
                if (row["cell"], probe) in counted
            ]
            row["n_null"] = sum(known) if known else None
    return rows


def _probes(
    row: Mapping[str, Any], counted: Mapping[tuple[str, str], int], success: str
) -> tuple[str, ...]:
    """The probes whose verdicts make up a metric in a cell."""
    metric = row["metric"]
    own = schema.METRICS[metric].probes if metric in schema.METRICS else ()
    if any((row["cell"], probe) in counted for probe in own):
        return own
    source = source_of(metric, success)
    return own if source == metric else schema.METRICS[source].probes


def _null_verdicts(results: Results) -> dict[tuple[str, str], int]:
    """(cell, probe) -> null verdicts."""
    import pyarrow.compute as pc

    asked = results.generations.select(["cell", "probe"]).append_column(
        "null", pc.is_null(results.generations["verdict"])
    )
    found = asked.group_by(["cell", "probe"]).aggregate([("null", "sum")]).to_pydict()
    return dict(
        zip(zip(found["cell"], found["probe"], strict=True), found["null_sum"], strict=True)
    )
