"""The tables of a run without what differs from run to run: what a disturbed run must have in common with an undisturbed one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

TIMED = ("wall_s", "cpu_s", "gpu_s", "peak_bytes", "attempt", "host", "cached")


def assert_same_tables(results: Results, undisturbed: Results) -> None:
    """Cells, metrics, generations and stages are equal, every cell is done, and no row is there twice."""
    assert set(results.cells["status"].to_pylist()) == {"done"}, results.cells.select(["status", "error_code", "error"]).to_pylist()
    for name in ("cells", "metrics", "generations"):
        mine, theirs = getattr(results, name), getattr(undisturbed, name)
        assert mine.drop_columns(["sweep"] if name == "cells" else []).equals(theirs.drop_columns(["sweep"] if name == "cells" else [])), name
    stages = [one.stages.drop_columns([column for column in TIMED if column in one.stages.column_names]) for one in (results, undisturbed)]
    assert stages[0].equals(stages[1]), "stages"
    for keys in (results.cells["cell"].to_pylist(), results.stages["digest"].to_pylist(),
                 [(row["cell"], row["metric"]) for row in results.metrics.to_pylist()]):
        assert max(Counter(keys).values()) == 1, "a row twice"
