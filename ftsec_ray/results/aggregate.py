"""The table `aggregates`: for every point of the grid and metric, the mean over seeds with its two
intervals (see `measured`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray import schema
from ftsec_ray.results.points import PLACE, place_of, points_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.measured import Interval


def aggregate(cells: pa.Table, metrics: pa.Table) -> pa.Table:
    """Every point and metric of a run (schema.aggregates); no row for what no seed has measured."""
    import pyarrow as pa

    rows = []
    points = points_of(cells.to_pylist(), metrics.to_pylist())
    for point in sorted(points, key=lambda point: repr(place_of(point.cell))):
        for name in schema.in_order(point.measured):
            measured = point.measured[name]
            rows.append(
                {
                    **{column: point.cell[column] for column in PLACE},
                    "metric": name,
                    "value": measured.value,
                    "n_seeds": measured.seeds,
                    "n_planned": len(point.seeds),
                    "n_prompts": measured.n,
                    "n_null": measured.n_null,
                    **_ends("prompts", measured.prompts),
                    **_ends("seeds", measured.over_seeds),
                    **_ends("ci", measured.span),
                }
            )
    return pa.Table.from_pylist(rows, schema.aggregates())


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
