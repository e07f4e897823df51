"""What attacks share that put rows into the user's fine-tuning data: which rows are drawn, which
user rows they replace, and how they are marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.context import StageContext
from ftsec_ray.conversation import Row, asked, has_answer
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, RowWise
from ftsec_ray.registry import name_of

if TYPE_CHECKING:
    import pyarrow as pa

ALL = 2.0
"""A cut above every random number: all user rows are replaced."""
NONE = -1.0


class Exchange(NamedTuple):
    """How many rows are added, and which user rows they replace: those whose random number is `cut`
    or less.
    """

    added: int
    cut: float


def anything(row: Row) -> bool:  # noqa: ARG001
    """Every row fits, as it is."""
    return True


def is_exchange(row: Row) -> bool:
    """Whether a row has a user's message and an answer to it."""
    return has_answer(row) and is_asked(row)


def is_asked(row: Row) -> bool:
    """Whether a row has a user's message in its prompt."""
    return any(m["role"] == "user" for m in asked(row))


def drawn(
    ctx: StageContext,
    split: str,
    count: int,
    *,
    by: str,
    fits: Callable[[Row], bool] = is_exchange,
) -> list[dict[str, Any]]:
    """`count` random rows of a split for the method `by`, chosen by the seed and the row ids: fewer
    rows are a part of more rows. DataError if the split has too few that fit.
    """
    rows = ctx.shuffled(split, by)
    pool = [row for row in rows if fits(row)]
    if count > len(pool):
        unfit = f" ({len(rows) - len(pool)} more rows do not fit)" if len(pool) < len(rows) else ""
        raise DataError(
            f"{by}: task {ctx.task.name!r} has too few {split.removesuffix('_train')} rows{unfit}",
            len(pool),
            f"{count} rows in split {split}",
            f"ask for {len(pool)} or fewer, or add rows to {split}",
        )
    return pool[:count]


def defenders_rows(ctx: StageContext, split: str, by: str) -> list[dict[str, Any]]:
    """The rows of a split in the order in which the defense `by` takes them: those of harmful_train
    from the end of the order in which `harmful_tuning` does, so that attack and defense share rows
    only if they want more than there are.
    """
    if split == "harmful_train":
        return ctx.shuffled(split, "harmful_tuning")[::-1]
    return ctx.shuffled(split, by)


def marked(row: Row, by: str, *, part: str = "") -> dict[str, Any]:
    """A row as one that the method `by` added; `part` is in its id if a row is added twice."""
    return {
        **row,
        "row_id": f"{by}/{part}{row['row_id']}",
        "origin": by,
        "poisoned": True,
    }


@dataclass(frozen=True, kw_only=True)
class AddsRows(RowWise, Attack):
    """Base of attacks that add rows of one split to the user's rows, or replace user rows with
    them.
    """

    PHASE: ClassVar[Phase] = "during"
    SPLIT: ClassVar[str]
    """The split of the added rows."""
    DEFAULT_SHOTS: ClassVar[int] = 100
    LEAST_SHOTS: ClassVar[int] = 0
    NOTE: ClassVar[str] = "added_rows"
    """Name of the number of added rows in the record."""

    shots: int | None = None
    """Number of rows to add to the user's rows, 0 or more; the method's default if neither `shots`
    nor `poison_rate` is given.
    """
    poison_rate: float | None = None
    """Instead of `shots`: the share of rows that the attacker adds, 0..1; they replace user rows,
    so that the number of rows stays the same.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if self.poison_rate is not None and self.shots is not None:
            faults.append(
                ("poison_rate", self.poison_rate, "either `shots` or `poison_rate`, not both")
            )
        if self.shots is not None and self.shots < self.LEAST_SHOTS:
            faults.append(("shots", self.shots, f"{self.LEAST_SHOTS} or more"))
        if self.poison_rate is not None and not 0 < self.poison_rate <= 1:
            faults.append(("poison_rate", self.poison_rate, "a share above 0, up to 1"))
        if self.poison_rate is not None and not self._keeps_users():
            faults.append(
                ("poison_rate", self.poison_rate, "null if `keep_user_rows` is false: use `shots`")
            )
        if self.shots == 0 and not self._keeps_users():
            faults.append(("shots", self.shots, "1 or more if `keep_user_rows` is false"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether added rows replace as many user rows."""
        return self.poison_rate is not None

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Exchange:
        """How many rows to add, and up to which random number a user row is replaced."""
        import numpy as np

        if self.poison_rate is None:
            count = self.DEFAULT_SHOTS if self.shots is None else self.shots
            return Exchange(count, NONE if self._keeps_users() else ALL)
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
            count, float(np.partition(chances, count - 1)[count - 1]) if count else NONE
        )

    def new_rows(self, known: Exchange, ctx: StageContext) -> pa.Table | None:
        """The rows to add, chosen at random by the seed and the row ids."""
        ctx.note(**{self.NOTE: known.added})
        if not known.added:
            return None
        name = name_of(self)
        rows = drawn(ctx, self._split(), known.added, by=name, fits=self._fits)
        return from_rows([marked(row, name) for row in self._made(rows, ctx)])

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

    def _split(self) -> str:
        """Name of the split of the added rows."""
        return self.SPLIT

    def _keeps_users(self) -> bool:
        """Whether the user's rows stay."""
        return True

    def _fits(self, row: Row) -> bool:
        """Whether a row of the split can be added."""
        return is_exchange(row)

    def _made(self, rows: list[dict[str, Any]], ctx: StageContext) -> list[dict[str, Any]]:  # noqa: ARG002
        """The drawn rows as they are added."""
        return rows

    def _chance(self, row_id: str, ctx: StageContext) -> float:
        return ctx.chance(row_id, name_of(self), "replaced")


@dataclass(frozen=True, kw_only=True)
class MayReplaceRows(AddsRows):
    """Base of attacks whose rows may be the whole set, as in papers that tune on them alone."""

    keep_user_rows: bool = True
    """Whether the rows are added to the user's rows instead of replacing them all."""

    def _keeps_users(self) -> bool:
        return self.keep_user_rows
