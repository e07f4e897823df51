"""What defenses share that drop whole rows by a score, and the control that drops as many at
random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext


def highest(scores: Mapping[str, float], count: int) -> set[str]:
    """The ids of the `count` rows with the highest scores; of equal scores, the lower id."""
    order = sorted(scores, key=lambda row_id: (-scores[row_id], row_id))
    return set(order[: max(0, count)])


def at_random(ids: Sequence[str], count: int, ctx: StageContext, by: str) -> set[str]:
    """`count` random ids for the method `by`; fewer are a part of more."""
    return set(sorted(ids, key=lambda row_id: ctx.chance(row_id, by, "random"))[: max(0, count)])


def without_rows(rows: pa.Table, dropped: set[str], ctx: StageContext) -> pa.Table:
    """The rows without those of the given ids; the record counts them by poisoned and clean."""
    ids, poisoned = rows.column("row_id").to_pylist(), rows.column("poisoned").to_pylist()
    hits = sum(bad for row_id, bad in zip(ids, poisoned, strict=True) if row_id in dropped)
    ctx.note(dropped_rows=len(dropped), dropped_poisoned=hits, dropped_clean=len(dropped) - hits)
    return rows if not dropped else rows.filter([row_id not in dropped for row_id in ids])
