"""The tables of a run without what differs from run to run: what a disturbed run must have in
common with an undisturbed one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.results.read import Results

_TIMED = ["wall_s", "cpu_s", "gpu_s", "peak_bytes", "attempt", "host", "cached"]
_KEYS = {
    "cells": ["cell"],
    "metrics": ["cell", "metric"],
    "generations": ["cell", "probe", "prompt_id"],
    "stages": ["digest"],
}


def final_tables(results: Results) -> dict[str, pa.Table]:
    """All four, without times, places and the sweep's name."""
    return {
        "cells": results.cells.drop_columns(["sweep"]),
        "metrics": results.metrics,
        "generations": results.generations,
        "stages": results.stages.drop_columns(_TIMED),
    }


def assert_same_tables(results: Results, undisturbed: Results) -> None:
    """Every cell is done, the tables are equal, and no row is there twice."""
    assert set(results.cells["status"].to_pylist()) == {"done"}, results.cells.select(
        ["status", "error_code", "error"]
    ).to_pylist()
    theirs = final_tables(undisturbed)
    for name, mine in final_tables(results).items():
        assert mine.equals(theirs[name]), f"{name} differ"
        rows = Counter(tuple(row.values()) for row in mine.select(_KEYS[name]).to_pylist())
        assert max(rows.values(), default=1) == 1, f"a row of {name} twice"
