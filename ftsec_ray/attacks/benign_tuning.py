"""Fine-tune on plain benign rows at a recipe of the user's own: safety that is lost without anyone
meaning to.

Paper: Qi et al. 2023, Fine-tuning Aligned Language Models Compromises Safety, arXiv:2310.03693,
    section 4.4 (tier 3: Alpaca, Dolly; 1 epoch at 2e-5, batch 128).
Differs: (1) The rows are those of the task's benign split; rows whose answer contains a refusal are
    left out, as the paper leaves out safety rows, and counted. (2) Learning rate and epochs are
    those of the sweep unless given; the batch size always is.
Published: harmfulness rate (GPT-4 judge, 330 prompts) of Llama-2-7B-Chat 0.3 % before, 16.1 % after
    Alpaca, 18.8 % after Dolly (second-hand, not checked against the paper).
Cost: that of a plain fine-tune on `samples` rows; `epochs` over the sweep's epochs times that.
Reads: random rows: `benign_selection` is the attack that chooses them.
Needs: split benign_train (benign requests with answers).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import answer_of
from ftsec_ray.data.added_rows import drawn, is_exchange, marked
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.evals.refusals import refusal_in
from ftsec_ray.method import Attack, Phase

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext
    from ftsec_ray.conversation import Row
    from ftsec_ray.training.setup import Training

NAME = "benign_tuning"


@dataclass(frozen=True, kw_only=True)
class BenignTuning(Attack):
    """Benign rows as the user's data."""

    PHASE: ClassVar[Phase] = "during"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"benign_train"})

    samples: int | None = None
    """Number of benign rows, 0 or more, chosen at random; None: all rows of the split."""
    keep_user_rows: bool = False
    """Whether the benign rows are added to the user's rows instead of replacing them."""
    learning_rate: float | None = None
    """Peak learning rate of the optimizer, above 0; None: the sweep's."""
    epochs: float | None = None
    """Passes over the rows, above 0; None: the sweep's."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = [
            (name, value, "above 0, or null for the sweep's own")
            for name, value in (("learning_rate", self.learning_rate), ("epochs", self.epochs))
            if value is not None and value <= 0
        ]
        least = 0 if self.keep_user_rows else 1
        if self.samples is not None and self.samples < least:
            faults.append(("samples", self.samples, f"{least} or more, or null for all"))
        return faults

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The benign rows, after the user's rows if those are kept."""
        import pyarrow as pa

        pool = ctx.task.split("benign_train").to_pylist()
        usable = [row for row in pool if _is_plain(row)]
        refusals = sum(refusal_in(answer_of(row)) is not None for row in pool)
        count = len(usable) if self.samples is None else self.samples
        if not usable:
            raise DataError(
                f"benign_tuning: task {ctx.task.name!r} has no benign row with an answer that is"
                " not a refusal",
                f"{len(pool)} rows in split benign_train, {refusals} of them refusals",
                "rows of benign requests with answers",
                "add rows to benign_train",
            )
        chosen = drawn(ctx, "benign_train", count, by=NAME, fits=_is_plain) if count else []
        ctx.note(benign_rows=len(chosen), refusals_left_out=refusals)
        kept = rows.slice(0, rows.num_rows if self.keep_user_rows else 0)
        return pa.concat_tables([kept, from_rows([marked(row, NAME) for row in chosen])])

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with the user's own learning rate and number of passes."""
        changes: dict[str, Any] = {}
        steps = training.steps
        if self.learning_rate is not None:
            changes["learning_rate"] = self.learning_rate
        if self.epochs is not None:
            steps = max(1, round(steps * self.epochs / training.config.epochs))
            changes["epochs"] = self.epochs
        ctx.note(steps=steps, learning_rate=changes.get("learning_rate"))
        return replace(training, steps=steps, config=replace(training.config, **changes))


def _is_plain(row: Row) -> bool:
    """Whether a row has an answer that is not a refusal."""
    return is_exchange(row) and refusal_in(answer_of(row)) is None
