"""Attack success against answer length, a row for every point whose answers were judged after
several numbers of tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.measured import Measured, pooled
from ftsec_ray.results.points import as_success

if TYPE_CHECKING:
    from ftsec_ray.report.grid import Grid, Key
    from ftsec_ray.results.read import Results


@dataclass(frozen=True)
class LengthTable:
    """What the section shows."""

    tokens: tuple[int, ...]
    """Answer lengths, ascending."""
    rows: list[dict[str, Any]]
    """Of each point: its names, facets, `values` (Measured or None per length), and `whole`."""


def table(grid: Grid, results: Results) -> LengthTable:
    """The success metric of every point at every length, mean over its seeds."""
    runs: dict[Key, dict[int, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for row in results.lengths.to_pylist():
        key = grid.place.get(row["cell"])
        if key is None or row["value"] is None:
            continue
        if row["metric"] == grid.points[key].success_metric:
            ends = row["ci_low"], row["ci_high"]
            one = Measured(
                value=row["value"],
                n=row["n"],
                n_null=row["n_null"],
                prompts=None if None in ends else ends,
                nulls=(row["n_null"] or 0, row["n"] + (row["n_null"] or 0)),
            )
            runs[key][row["tokens"]].append(as_success(row["metric"], one))
    tokens = tuple(sorted({length for known in runs.values() for length in known}))
    rows: list[dict[str, Any]] = [
        {
            "model": key[0],
            "task": key[1],
            "attack": key[2],
            "defense": key[3],
            "facets": grid.facets(key),
            "values": [
                pooled(known[length], is_share=True) if length in known else None
                for length in tokens
            ],
            "whole": grid.value(key),
        }
        for key, known in runs.items()
    ]
    rows.sort(key=lambda row: (row["facets"], row["task"]))
    return LengthTable(tokens, rows)
