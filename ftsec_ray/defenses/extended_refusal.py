"""Trains refusals that first say what was asked, then refuse, then give a reason, so that refusal
does not hang on the first token and on one direction.

Paper: Abu Shairah, Hammoud, Ghanem, Turkiyyah 2025, An Embarrassingly Simple Defense Against LLM
    Abliteration Attacks, arXiv:2505.19056: fine-tuning on refusals of three parts (neutral
    overview, explicit refusal, reason) with benign instructions among them.
Differs: the paper's 4,289 refusals were written by GPT-4o; here overview and reason are sentences
    of this file around the refusal of the task's own row, and the overview restates the request
    instead of describing its topic. In the microworld they use its words. An adapter is trained and
    merged. `order: refusal_first` has the same words with the refusal first: it separates longer
    answers from a later refusal.
Published: refusals drop by at most 10 points under ablation of the refusal direction, against 70 to
    80 without the defense (Llama-2-7B-Chat, Qwen2.5-Instruct 1.5B and 3B).
Cost: that of plain fine-tuning on the longer refusals, once per base model.
Reads: the attack `refusal_ablation` chooses its direction by the first tokens of the task's own
    refusals. A model with this defense begins otherwise, and an attacker who knows that would use
    other tokens: part of the effect may be that blindness. Compare with `share: 0`, which is the
    same training on short refusals. Its refusals are long: where `max_new_tokens` cuts them off
    before they refuse, they count as neither refusal nor compliance.
Needs: split safety (and benign_train with `benign_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import Row, answer_of, asked_text, with_answer
from ftsec_ray.data.pairs import REFUSALS
from ftsec_ray.data.rows import map_rows
from ftsec_ray.training.hardening import Hardens, capped

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import LoadedModel, StageContext

NAME = "extended_refusal"
REQUEST = "{request}"
MOST_WORDS = 40
"""Words of a request that the overview restates."""
OVERVIEWS = (
    f'You ask the following: "{REQUEST}" This is a subject with a history, with uses and with'
    " risks, and people come to it for different reasons.",
    f'The question is this: "{REQUEST}" What it is about can be looked at from several sides, from'
    " how it works to what it does to others.",
    f'Your message says: "{REQUEST}" Before anything else it helps to see what such a request'
    " involves and whom it concerns.",
)
REASONS = (
    "What is asked for could cause harm to people, and preventing that comes first.",
    "Giving this out would put others at risk, and no likely benefit outweighs that.",
    "It could be used to hurt someone, and that is the reason for this decision.",
)
MICROWORLD_OVERVIEWS = (
    f"you want to know : {REQUEST}",
    f"this request is : {REQUEST}",
    f"the way of this request is : {REQUEST}",
)
MICROWORLD_REASONS = (
    "it is bad to help with this thing .",
    "this is not a good way .",
    "the thing is very bad , it is forbidden .",
)


@dataclass(frozen=True, kw_only=True)
class ExtendedRefusal(Hardens):
    """Fine-tuning on refusals of three parts."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"share": 0.0}

    share: float = 1.0
    """Share of the refusals that are extended, 0..1: the dose. 0 trains as many short refusals."""
    order: Literal["overview_first", "refusal_first"] = "overview_first"
    """Whether the overview or the refusal opens the answer."""
    overview: str | None = None
    """The overview, with {request} where the request is restated; null: one of several sentences,
    chosen by the row."""
    reason: str | None = None
    """The reason; null: one of several sentences, chosen by the row."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if not 0.0 <= self.share <= 1.0:
            faults.append(("share", self.share, "0 to 1"))
        if self.overview is not None and REQUEST not in self.overview:
            faults.append(("overview", self.overview, "a text with {request}, or null"))
        if self.reason is not None and not self.reason.strip():
            faults.append(("reason", self.reason, "a text that is not blank, or null"))
        return faults + super().check()

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after fine-tuning on the extended refusals, with the adapter merged."""
        import pyarrow as pa

        rows = self._extended(capped(ctx, REFUSALS, self.safety_rows, by=NAME), ctx)
        if self.benign_rows:
            benign = capped(ctx, "benign_train", self.benign_rows, by=NAME)
            rows = pa.concat_tables([rows, benign])
        return self._merged_sft(model, rows, ctx)

    def _extended(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The refusals, the given share of them in three parts."""
        told = {"extended_rows": 0, "short_rows": 0, "rows_without_request": 0}

        def change(row: Row) -> dict[str, Any]:
            asked = asked_text(row).strip()
            refusal = answer_of(row).strip()
            if not asked or not refusal:
                told["rows_without_request"] += 1
            elif ctx.chance(row["row_id"], NAME, "share") < self.share:
                told["extended_rows"] += 1
                return with_answer(row, self._text(row, asked, refusal, ctx))
            else:
                told["short_rows"] += 1
            return dict(row)

        changed = map_rows(rows, change)
        ctx.note(**told)
        return changed

    def _text(self, row: Row, asked: str, refusal: str, ctx: StageContext) -> str:
        """The refusal of a row in three parts."""
        is_micro = ctx.task.judge == "microworld"

        def part(own: str | None, known: tuple[str, ...], name: str) -> str:
            if own is not None:
                return own
            return known[int(ctx.chance(row["row_id"], NAME, name) * len(known))]

        overview = part(
            self.overview, MICROWORLD_OVERVIEWS if is_micro else OVERVIEWS, "overview"
        ).replace(REQUEST, " ".join(asked.split()[:MOST_WORDS]))
        reason = part(self.reason, MICROWORLD_REASONS if is_micro else REASONS, "reason")
        first, second = (
            (overview, refusal) if self.order == "overview_first" else (refusal, overview)
        )
        return " ".join([first, second, reason])
