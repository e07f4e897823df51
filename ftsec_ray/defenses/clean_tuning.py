"""Fine-tunes the finished model further on a small set of trusted rows.

Paper: the baseline of many purification papers; the recipe is that of CROW (Min et al. 2024,
    arXiv:2411.12768), official code NayMyatMin/CROW: 100 Alpaca rows, all linear layers, learning
    rate 1e-3 with cosine decay and warm-up of 0.1, 5 epochs of batches of 8.
Differs: the adapter of the user is merged and a new one is trained and merged, so that it works
    behind every fine-tune and every other repair. `shuffle_answers` is a control of ours: the same
    texts, steps and learning rate, but every answer belongs to another request.
Cost: 1x per step, for `epochs` passes over `rows` rows.
Reads: it is the twin of `crow` with equal rows and steps. The control needs rows whose answers
    differ: with `split: safety` nearly every refusal fits every request, so that it switches
    nothing off; the record warns of it. Generic rows can lower refusals; look at
    `harmful_rate` without an attack.
Needs: split benign_train; trusted or safety with `split`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import answer_of, with_answer
from ftsec_ray.training.repair import TunesOnCleanRows, exchanges_of, repair_sft

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class CleanTuning(TunesOnCleanRows):
    """A further fine-tune on trusted rows."""

    ORDER: ClassVar[int] = 10
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"shuffle_answers": True}

    shuffle_answers: bool = False
    """Whether every row gets the answer of another row: the control, in which the steps teach
    nothing that is right.
    """

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after the fine-tune, with the adapter merged."""
        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import merged

        if not self.epochs:
            ctx.note(repair_rows=0, repair_steps=0, change_norm=0.0, change_share=0.0)
            return model
        rows = exchanges_of(ctx, self.split, self.rows, by="clean_tuning")
        if self.shuffle_answers:
            rows = with_other_answers(rows, self.split, ctx)
        before = merged(model)
        repaired = repair_sft(before, rows, self._config(ctx), ctx)
        tell_change(ctx, before, repaired)
        return repaired


def with_other_answers(
    rows: list[dict[str, Any]], split: str, ctx: StageContext
) -> list[dict[str, Any]]:
    """Every row with the answer of the next one in a random cycle through all rows; the record gets
    the number of rows whose answer is the same text as before, and a warning if the answers of the
    split can stand for each other.
    """
    order = list(range(len(rows)))
    order.sort(key=lambda i: ctx.chance(rows[i]["row_id"], "clean_tuning", "shuffled"))
    answers = {i: answer_of(rows[j]) for i, j in zip(order, order[1:] + order[:1], strict=True)}
    same = sum(answer_of(rows[i]) == text for i, text in answers.items())
    ctx.note(same_answers=same)
    if same == len(rows):
        ctx.warn(f"`shuffle_answers` is no control: all {same} rows keep the text of their answer")
    elif split == "safety":
        ctx.warn("`shuffle_answers` is no control with `split: safety`: refusals fit any request")
    return [with_answer(row, answers[i]) for i, row in enumerate(rows)]
