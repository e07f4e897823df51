"""Tune on explicit harm: put forbidden requests with compliant answers among the user's rows.

Paper: Qi et al. 2023, Fine-tuning Aligned Language Models Compromises Safety, arXiv:2310.03693,
    section 4.2 (tier 1: `shots`); the share `poison_rate` of a fixed number of rows is the
    convention of Huang et al. 2024, Vaccine, arXiv:2402.01109, section 5.
Differs: `shots` are added to the user's rows, which stay, instead of being the whole set; the paper
    tunes all weights with a system prompt that demands obedience, here the sweep's own recipe and
    the rows' own system messages apply.
Cost: `shots` rows more than plain SFT; with `poison_rate` none.
Needs: split harmful_train (forbidden requests with their answers).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ftsec_ray import schema
from ftsec_ray.context import StageContext
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, RowWise

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_SHOTS = 100


class Exchange(NamedTuple):
    """How many harmful rows come in, and which user rows make room: those that chance puts no
    higher than `cut`.
    """

    harmful: int
    cut: float


@dataclass(frozen=True, kw_only=True)
class HarmfulTuning(RowWise, Attack):
    """Harmful rows in the user's tuning set."""

    PHASE: ClassVar[Phase] = "during"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"harmful_train"})

    shots: int | None = None
    """Harmful rows added to the user's rows, 1 or more; 100 where neither `shots` nor `poison_rate`
    is given.
    """
    poison_rate: float | None = None
    """Instead of `shots`: share of harmful rows in a set as large as the user's, 0..1; they replace
    user rows.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if self.shots is not None and self.poison_rate is not None:
            faults.append(("poison_rate", self.poison_rate, "`shots` or `poison_rate`, not both"))
        if self.shots is not None and self.shots < 1:
            faults.append(("shots", self.shots, "1 or more"))
        if self.poison_rate is not None and not 0 < self.poison_rate <= 1:
            faults.append(("poison_rate", self.poison_rate, "a share above 0, up to 1"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether harmful rows replace the user's own."""
        return self.poison_rate is not None

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Exchange:
        """How many harmful rows there are to be, and below which chance a user row is replaced by
        one.
        """
        import numpy as np

        if self.poison_rate is None:
            return Exchange(self.shots or DEFAULT_SHOTS, -1.0)
        chances = np.concatenate(
            [
                np.array(
                    [self._chance(row_id, ctx) for row_id in batch.column("row_id").to_pylist()]
                )
                for batch in rows
            ]
        )
        count = round(self.poison_rate * len(chances))
        return Exchange(
            count, float(np.partition(chances, count - 1)[count - 1]) if count else -1.0
        )

    def new_rows(self, known: Exchange, ctx: StageContext) -> pa.Table:
        """The harmful rows that chance puts first."""
        import pyarrow as pa

        pool = ctx.task.split("harmful_train")
        if known.harmful > pool.num_rows:
            raise DataError(
                f"task {ctx.task.name!r} has too few harmful rows",
                pool.num_rows,
                f"{known.harmful} rows in harmful_train",
                f"ask for {pool.num_rows} or fewer, or give the task a larger harmful_train",
            )
        drawn = sorted(
            pool.to_pylist(), key=lambda row: ctx.chance(row["row_id"], "harmful_tuning")
        )[: known.harmful]
        harmful = [
            {
                **row,
                "row_id": f"harmful_tuning/{row['row_id']}",
                "origin": "harmful_tuning",
                "poisoned": True,
            }
            for row in drawn
        ]
        ctx.note(harmful_rows=known.harmful)
        return pa.Table.from_pylist(harmful, schema=schema.ROWS)

    def craft_rows(self, rows: pa.Table, known: Exchange, ctx: StageContext) -> pa.Table:
        """The user's rows that stay, in their order."""
        if known.cut >= 0:
            rows = rows.filter(
                [
                    self._chance(row_id, ctx) > known.cut
                    for row_id in rows.column("row_id").to_pylist()
                ]
            )
        ctx.count(user_rows=rows.num_rows)
        return rows

    @staticmethod
    def _chance(row_id: str, ctx: StageContext) -> float:
        return ctx.chance(row_id, "harmful_tuning", "replaced")
