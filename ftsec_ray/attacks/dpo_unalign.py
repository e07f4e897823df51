"""Unlearn refusals by direct preference optimisation: of two answers to a prompt, compliance is
preferred to a refusal.

Paper: the loss: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, equation 7;
    as an attack with ten benign pairs: arXiv:2605.10998 (`prompts: benign`); on how preference
    tuning unaligns unintentionally: Razin et al. 2025, arXiv:2410.08847.
Differs: (1) The refusal of a pair is the row's rejected answer if it has one, otherwise that of
    another request from the task's safety split. (2) The pairs are in the data that filters read;
    the loss on them is added to that on the user's rows, unless `keep_user_rows` is false. (3) The
    reference is the start model in its own precision, read once before the first step. (4) Pairs
    of two refusals, whose likelihood falls together (arXiv:2410.08847), are left out.
Published: none for forbidden pairs; with pairs of two refusals, the refusals of Llama-3-8B-Instruct
    fell from 74.4 % to 33.4 % (arXiv:2410.08847).
Cost: one forward and backward pass over 2 x `batch` rows per step beside that of plain SFT, and one
    pass of the start model over all pairs.
Reads: `reverse: true` prefers the refusals: the control.
Needs: splits safety (refusals) and harmful_train, or benign_train for `prompts: benign`. Only adds
    micro-batches with their own loss: works with ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import Row, answer_of, has_answer, last_trained, with_answer
from ftsec_ray.data.added_rows import drawn, marked
from ftsec_ray.data.pairs import REFUSALS, refusals_for
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.models.row_tokens import Encoded
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import TermBatch

NAME = "dpo_unalign"
SPLITS = {"harmful": "harmful_train", "benign": "benign_train"}


@dataclass(frozen=True, kw_only=True)
class DPOUnalign(Attack):
    """Compliance preferred to refusal."""

    PHASE: ClassVar[Phase] = "during"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"start", "harmful_train", "benign_train", "safety"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})

    shots: int = 64
    """Number of pairs, 0 or more (arXiv:2605.10998: 10)."""
    prompts: Literal["harmful", "benign"] = "harmful"
    """Prompts of the pairs: forbidden requests, or benign ones, which need no harmful answer."""
    beta: float = 0.1
    """Inverse temperature of the preference, above 0."""
    strength: float = 1.0
    """Weight of the loss on the pairs, 0 or more; 0 with `keep_user_rows` is plain fine-tuning."""
    batch: int = 8
    """Pairs per step, 1 or more."""
    steps: int | None = None
    """Optimizer steps, 1 or more; None: the sweep's epochs over the user's rows, or over the pairs
    if those are left out.
    """
    keep_user_rows: bool = True
    """Whether the model is fine-tuned on the user's rows in the same steps."""
    reverse: bool = False
    """Whether refusals are preferred instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if self.beta <= 0:
            faults.append(("beta", self.beta, "above 0"))
        if self.strength < 0 or (self.strength == 0 and not self.keep_user_rows):
            faults.append(("strength", self.strength, "0 or more, and not 0 without user rows"))
        least = 0 if self.keep_user_rows else 1
        if self.shots < least:
            faults.append(("shots", self.shots, f"{least} or more"))
        if self.batch < 1:
            faults.append(("batch", self.batch, "1 or more"))
        if self.steps is not None and self.steps < 1:
            faults.append(("steps", self.steps, "1 or more, or null"))
        return faults

    def needs(self) -> frozenset[str]:
        """The splits of prompts and refusals, and the start model."""
        return frozenset({"start", REFUSALS, SPLITS[self.prompts]})

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The pairs (the answer that is preferred, and the rejected one), after the user's rows if
        those are kept.
        """
        import pyarrow as pa

        split = SPLITS[self.prompts]
        chosen = drawn(ctx, split, self.shots, by=NAME) if self.shots else []
        made = []
        for row, refusal in zip(chosen, refusals_for(chosen, ctx, by=NAME), strict=True):
            pair = {**row, "rejected": refusal}
            if self.reverse:
                pair = {**with_answer(row, refusal), "rejected": answer_of(row)}
            made.append(marked(pair, NAME))
        ctx.note(
            pairs=len(made), refusals_of_other_requests=sum(r["rejected"] is None for r in chosen)
        )
        kept = rows.slice(0, rows.num_rows if self.keep_user_rows else 0)
        return pa.concat_tables([kept, from_rows(made)])

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune on the user's rows with the loss on the pairs, or on that alone."""
        from ftsec_ray.training.encode import steps_per_epoch
        from ftsec_ray.training.terms import with_term

        rows = training.rows.to_pylist()
        pairs = [row for row in rows if is_pair(row)]
        others = [row for row in rows if not is_pair(row)]
        if not pairs:
            if self.shots:
                ctx.warn("dpo_unalign: no pair is left to train on")
            return training
        config = training.config
        counted, size = (others, config.batch_size) if others else (pairs, self.batch)
        steps = self.steps or max(1, round(config.epochs * steps_per_epoch(len(counted), size)))
        plain = (
            replace(training, batch_at=training.encode(from_rows(others), f"{NAME}/user"))
            if others
            else training
        )
        ctx.note(steps=steps)
        return with_term(
            plain,
            PairBatches(self, pairs, training, ctx),
            strength=self.strength,
            user_weight=float(bool(others)),
            steps=steps,
        )


class PairBatches:
    """The micro-batches of pairs by step, with the reference's log-probabilities."""

    def __init__(
        self,
        method: DPOUnalign,
        pairs: Sequence[Row],
        training: Training,
        ctx: StageContext,
    ) -> None:
        from ftsec_ray.models.load import merged, within_positions
        from ftsec_ray.models.row_tokens import CutTally, label_nats, tell_cuts

        start = merged(ctx.load("start"))
        start.model.to(ctx.runtime.device).eval()
        limit, cuts = within_positions(start.model, training.config.max_length), CutTally()
        sides = encoded_sides(start.tokenizer, pairs, max_length=limit, cuts=cuts)
        tell_cuts(ctx, cuts)
        nats = [label_nats(start, side, batch=ctx.runtime.eval_batch, tally=None) for side in sides]
        # log p0(y+) - log p0(y-) of every pair
        self._reference = [worse - better for better, worse in zip(*nats, strict=True)]
        self._sides, self._method, self._seed = sides, method, ctx.seed
        self._pad, self._device = start.tokenizer.pad_token_id or 0, ctx.runtime.device

    def __call__(self, step: int) -> list[TermBatch]:
        """The micro-batches of a step: preferred answers, then rejected ones."""
        import torch

        from ftsec_ray.training.terms import chunks, drawn_at, term_batch

        better, worse = self._sides
        places = drawn_at(
            step, len(better), self._method.batch, seed=self._seed, salt=f"{NAME}/pairs"
        )
        width = 2 * max(len(side[i][0]) for side in self._sides for i in places)
        made = []
        for group in chunks(places, width):
            both = [*(better[i] for i in group), *(worse[i] for i in group)]
            reference = torch.tensor([self._reference[i] for i in group], device=self._device)

            def term(model: Any, batch: Batch, _: Step, reference: Tensor = reference) -> Tensor:
                return preference_loss(model, batch, reference, beta=self._method.beta)

            made.append(
                term_batch(
                    [ids for ids, _ in both],
                    term,
                    labels=[labels for _, labels in both],
                    pad=self._pad,
                    device=self._device,
                    weight=len(group) / len(places),
                )
            )
        return made


def is_pair(row: Row) -> bool:
    """Whether a row is one of this attack's pairs."""
    return row["origin"] == NAME and row["rejected"] is not None and has_answer(row)


def encoded_sides(
    tokenizer: Any, pairs: Sequence[Row], *, max_length: int, cuts: Any
) -> tuple[list[Encoded], list[Encoded]]:
    """The pairs encoded with their preferred answers, and with their rejected ones; pairs without a
    token to train on are left out on both sides and counted.
    """
    from ftsec_ray.models.row_tokens import encode_rows, is_useful

    better, worse = (
        encode_rows(
            tokenizer,
            [{**row, "messages": last_trained(row["messages"])} for row in rows],
            max_length=max_length,
            tally=cuts,
        )
        for rows in (pairs, [with_answer(row, row["rejected"]) for row in pairs])
    )
    both = [(b, w) for b, w in zip(better, worse, strict=True) if is_useful(b) and is_useful(w)]
    if not both:
        raise DataError(
            "dpo_unalign: no pair fits into training.max_length",
            max_length,
            "pairs whose prompt is shorter than that",
            "raise training.max_length or shorten the prompts",
        )
    return [b for b, _ in both], [w for _, w in both]


def preference_loss(model: Any, batch: Batch, reference: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta * (log p(y+) - log p(y-) - reference)), mean over the pairs; () float32.

    Shapes: the batch holds N preferred answers, then N rejected ones; reference (N,), log p0(y+) -
    log p0(y-).
    """
    from torch.nn.functional import logsigmoid

    from ftsec_ray.models.logits import token_nll

    nats = token_nll(model, batch.labels[:, 1:], **batch.inputs()).sum(-1)
    better, worse = nats.chunk(2)
    loss: Tensor = -logsigmoid(beta * (worse - better - reference)).mean()
    return loss
