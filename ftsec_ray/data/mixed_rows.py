"""What defenses share that mix rows of their own into the user's fine-tuning data: how many rows,
which ones, and which of the task's rows are left alone because the user's data has them too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.context import StageContext
from ftsec_ray.data.prompt_texts import asked_in
from ftsec_ray.data.rows import from_rows
from ftsec_ray.method import Defense, Phase, RowWise
from ftsec_ray.registry import name_of

if TYPE_CHECKING:
    import pyarrow as pa


class Mixing(NamedTuple):
    """How many rows are added, and which of the method's own prompts the user's rows ask too."""

    added: int
    asked: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class MixesRows(RowWise, Defense):
    """Base of defenses that add rows to the user's rows, which stay as they are."""

    PHASE: ClassVar[Phase] = "pre"
    ORDER: ClassVar[int] = 10
    DEFAULT_SHOTS: ClassVar[int] = 100

    shots: int | None = None
    """Number of rows to add, 0 or more; 100 if neither `shots` nor `share` is given."""
    share: float | None = None
    """Instead of `shots`: added rows per row of the user, 0 or more; 0.03 adds 3 to 100."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if self.shots is not None and self.share is not None:
            faults.append(("share", self.share, "either `shots` or `share`, not both"))
        if self.shots is not None and self.shots < 0:
            faults.append(("shots", self.shots, "0 or more"))
        if self.share is not None and not 0 <= self.share < float("inf"):
            faults.append(("share", self.share, "0 or more, and finite"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether no row is added."""
        return self.shots == 0 or self.share == 0

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Mixing:
        """The number of rows to add, and the watched prompts that the user's rows ask."""
        watched, asked, count = self._watched(ctx), set[str](), 0
        for batch in rows:
            count += batch.num_rows
            if watched:
                asked |= asked_in(watched - asked, batch.to_pylist())
        shots = self.DEFAULT_SHOTS if self.shots is None else self.shots
        return Mixing(shots if self.share is None else round(self.share * count), frozenset(asked))

    def new_rows(self, known: Mixing, ctx: StageContext) -> pa.Table | None:
        """The rows to add, with the method's name in their ids."""
        ctx.note(mixed_rows=known.added)
        if not known.added:
            return None
        name = name_of(self)
        made = self._made(known, ctx)
        return from_rows(
            {**row, "row_id": f"{name}/{row['row_id']}", "origin": name, "poisoned": False}
            for row in made
        )

    def craft_rows(self, rows: pa.Table, known: Mixing, ctx: StageContext) -> pa.Table:  # noqa: ARG002
        """The user's rows, as they are."""
        ctx.count(user_rows=rows.num_rows)
        return rows

    def _watched(self, ctx: StageContext) -> set[str]:  # noqa: ARG002
        """Prompts, in the form of `plain`, of which the method must know whether the user's rows
        ask them.
        """
        return set()

    @abstractmethod
    def _made(self, known: Mixing, ctx: StageContext) -> list[dict[str, Any]]:
        """`known.added` rows; fewer are a part of more."""
