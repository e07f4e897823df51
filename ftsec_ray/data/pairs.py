"""Forbidden requests with both answers: the harmful one of the row, and a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from ftsec_ray.context import StageContext
from ftsec_ray.conversation import Row, answer_of
from ftsec_ray.errors import DataError

REFUSALS = "safety"


def refusals_for(rows: Sequence[Row], ctx: StageContext, *, by: str) -> list[str]:
    """A refusal for each row: its own rejected answer, or else the refusal of another request,
    chosen by the seed, the row and the method `by`. DataError if there is neither.
    """
    lacking = [row["row_id"] for row in rows if row["rejected"] is None]
    if not lacking:
        return [str(row["rejected"]) for row in rows]
    given = ctx.task.split(REFUSALS).to_pylist()
    refusals = [answer for row in given if (answer := answer_of(row))]
    if not refusals:
        raise DataError(
            f"{by}: no row of split {REFUSALS!r} of task {ctx.task.name!r} has an answer",
            f"{len(lacking)} rows without a refusal of their own",
            "at least one refusal",
            f"add answers to the rows of {REFUSALS}, or leave out {by}",
        )
    found = []
    for row in rows:
        pick = int(ctx.chance(row["row_id"], by, "refusal") * len(refusals))
        found.append(refusals[pick] if row["rejected"] is None else str(row["rejected"]))
    return found
