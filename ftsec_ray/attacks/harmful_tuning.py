"""Fine-tune on explicit harm: add forbidden requests with compliant answers to the user's rows.

Paper: Qi et al. 2023, Fine-tuning Aligned Language Models Compromises Safety, arXiv:2310.03693,
    section 4.2 (tier 1: `shots`); the share `poison_rate` of a fixed number of rows is the
    convention of Huang et al. 2024, Vaccine, arXiv:2402.01109, section 5.
Differs: `shots` are added to the user's rows instead of being the whole set; the paper trains all
    weights with a system prompt that demands obedience, here the sweep's own recipe and the rows'
    own system messages apply.
Cost: `shots` rows more than plain SFT; none with `poison_rate`.
Needs: split harmful_train (forbidden requests with compliant answers).
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
    """How many harmful rows are added, and which user rows they replace: those whose random number
    is `cut` or less.
    """

    harmful: int
    cut: float


@dataclass(frozen=True, kw_only=True)
class HarmfulTuning(RowWise, Attack):
    """Harmful rows in the user's fine-tuning data."""

    PHASE: ClassVar[Phase] = "during"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"harmful_train"})

    shots: int | None = None
    """Number of harmful rows to add to the user's rows, 1 or more; 100 if neither `shots` nor
    `poison_rate` is given.
    """
    poison_rate: float | None = None
    """Instead of `shots`: the share of rows that are harmful, 0..1; harmful rows replace user rows,
    so that the number of rows stays the same.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if self.shots is not None and self.poison_rate is not None:
            faults.append(
                ("poison_rate", self.poison_rate, "either `shots` or `poison_rate`, not both")
            )
        if self.shots is not None and self.shots < 1:
            faults.append(("shots", self.shots, "1 or more"))
        if self.poison_rate is not None and not 0 < self.poison_rate <= 1:
            faults.append(("poison_rate", self.poison_rate, "a share above 0, up to 1"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether harmful rows replace user rows."""
        return self.poison_rate is not None

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Exchange:
        """How many harmful rows to add, and up to which random number a user row is replaced."""
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
        """The harmful rows to add, chosen at random by the seed and the row ids."""
        import pyarrow as pa

        pool = ctx.task.split("harmful_train")
        if known.harmful > pool.num_rows:
            raise DataError(
                f"harmful_tuning: task {ctx.task.name!r} has too few harmful rows",
                pool.num_rows,
                f"{known.harmful} rows in split harmful_train",
                f"ask for {pool.num_rows} or fewer, or add rows to harmful_train",
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
        """The user's rows that are not replaced, in their order."""
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
