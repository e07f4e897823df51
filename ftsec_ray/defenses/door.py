"""Trains refusals behind the first tokens of harmful answers, and makes those answers less likely
than they were, so that an answer that has begun is still refused.

Paper: Zhao, Cai, Shi, Huang, Lin, Mei, Song 2025, Improving LLM Safety Alignment with
    Dual-Objective Optimization (DOOR), arXiv:2503.03710; official code wicai24/DOOR-Alignment:
    alpha * (loss of the refusal behind k tokens of the harmful answer - (2 / beta) log sigmoid(
    -beta (log p(answer) - log p0(answer)))) + (1 - alpha) * loss of benign rows.
Differs: (1) Every loss is per token; the official code adds up tokens, so that long answers count
    more. (2) k is drawn anew in every pass over the rows, and never reaches the end of the answer.
    (3) The task's own refusals stand beside the benign rows in the last term. (4) A request without
    a refusal of its own gets that of another request. (5) An adapter is trained and merged.
    (6) Without the token weights of W-DOOR, which need a second model trained by preferences.
Cost: about 3 forward and backward passes per step, and one pass of the start model over the
    harmful rows; once per base model.
Reads: the prefixes are beginnings of harmful answers. How far it holds against a fixed opener,
    which is none, is what `prefill` measures. Its harmful rows come from the split that also serves
    attacks.
Needs: splits safety and harmful_train (and benign_train with `benign_rows`). Only adds
    micro-batches with their own loss: ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.conversation import Row, behind, last_trained, with_answer
from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.data.pairs import refusals_for
from ftsec_ray.errors import DataError
from ftsec_ray.method import above_faults, least_faults
from ftsec_ray.models.row_tokens import (
    IGNORED,
    CutTally,
    Encoded,
    answer_tokens,
    encode_rows,
    is_useful,
    note_cuts,
)
from ftsec_ray.training.hardening import HARMFUL, Hardens, capped

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import Term, TermBatch

NAME = "door"


class Pair(NamedTuple):
    """A forbidden request as token ids, with its harmful answer and its refusal."""

    row_id: str
    prompt: list[int]
    answer: list[int]
    """The harmful answer, with the end of the turn."""
    refusal: list[int]
    """The refusal as the whole answer."""
    going_on: list[int]
    """The refusal behind other words of the answer, which may have another first token."""
    room: int
    """Tokens of the answer that may stand before the refusal."""

    def behind(self, k: int) -> Encoded:
        """The refusal behind the first `k` tokens of the answer."""
        given, said = [*self.prompt, *self.answer[:k]], self.going_on if k else self.refusal
        return [*given, *said], [*([IGNORED] * len(given)), *said]

    def answered(self) -> Encoded:
        """The harmful answer to the request."""
        return [*self.prompt, *self.answer], [*([IGNORED] * len(self.prompt)), *self.answer]


@dataclass(frozen=True, kw_only=True)
class Door(Hardens):
    """Refusal behind harmful prefixes, and negative preference on harmful answers."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "harmful_train", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"max_prefix": 0, "npo": 0.0}

    alpha: float = 0.2
    """Weight of both terms on forbidden requests against the plain loss, 0..1; 0 is plain
    fine-tuning."""
    max_prefix: int = 100
    """Largest number of tokens of the harmful answer before the refusal, 0 or more: the dose."""
    prefix_share: float = 0.5
    """Share of the rows that get 1 to `max_prefix` tokens, 0..1; the others get none."""
    npo: float = 1.0
    """Weight of the term on harmful answers, 0 or more."""
    beta: float = 0.5
    """Inverse temperature of that term, above 0."""
    harmful_rows: int = 256
    """Maximum number of forbidden requests with harmful answers, 1 or more (the paper: 400)."""
    harmful_batch: int = 8
    """Of these per step, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = [
            (name, getattr(self, name), "0 to 1")
            for name in ("alpha", "prefix_share")
            if not 0.0 <= getattr(self, name) <= 1.0
        ]
        own = {"max_prefix": 0, "npo": 0.0, "harmful_rows": 1, "harmful_batch": 1}
        return faults + least_faults(self, own) + above_faults(self, "beta") + super().check()

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after training on both objectives, with the adapter merged."""
        plain = self._plain_rows(ctx)
        if not self.alpha:
            return self._merged_sft(model, plain, ctx)
        chosen = capped(ctx, HARMFUL, self.harmful_rows, by=NAME, fits=is_exchange).to_pylist()
        refusals = refusals_for(chosen, ctx, by=NAME)

        def shape(training: Training) -> Training:
            from ftsec_ray.models.load import within_positions
            from ftsec_ray.training.terms import with_term

            limit = within_positions(model.model, training.config.max_length)
            cuts = CutTally()
            pairs = pairs_of(model.tokenizer, chosen, refusals, max_length=limit, tally=cuts)
            note_cuts(ctx, cuts, "harmful")
            ctx.note(harmful_rows=len(pairs), harmful_rows_left_out=len(chosen) - len(pairs))
            return with_term(
                training,
                self._batches(pairs, model, ctx),
                strength=self.alpha,
                user_weight=1.0 - self.alpha,
            )

        return self._merged_sft(model, plain, ctx, shape=shape)

    def _prefix(self, pair: Pair, turn: int, ctx: StageContext) -> int:
        """How many tokens of the answer stand before the refusal in a pass over the rows."""
        if ctx.chance(pair.row_id, NAME, "is begun", str(turn)) >= self.prefix_share:
            return 0
        most = min(self.max_prefix, pair.room)
        drawn = ctx.chance(pair.row_id, NAME, "tokens", str(turn)) * most
        return min(most, 1 + int(drawn))

    def _batches(
        self, pairs: Sequence[Pair], model: LoadedModel, ctx: StageContext
    ) -> Callable[[int], list[TermBatch]]:
        from ftsec_ray.models.row_tokens import label_nats
        from ftsec_ray.training.encode import steps_per_epoch
        from ftsec_ray.training.terms import drawn_at, in_chunks

        before: list[float] = []
        if self.npo:
            model.model.to(ctx.runtime.device)
            answered = [pair.answered() for pair in pairs]
            before = label_nats(model, answered, batch=ctx.runtime.eval_batch, tally=None)
        pad, device = model.tokenizer.pad_token_id or 0, ctx.runtime.device
        each = steps_per_epoch(len(pairs), self.harmful_batch)

        def batches_of(step: int) -> list[TermBatch]:
            places = drawn_at(step, len(pairs), self.harmful_batch, seed=ctx.seed, salt=NAME)
            turn = step // each
            made = in_chunks(
                [pairs[i].behind(self._prefix(pairs[i], turn, ctx)) for i in places],
                lambda _: None,
                pad=pad,
                device=device,
            )
            if self.npo:
                made += in_chunks(
                    [pairs[i].answered() for i in places],
                    lambda group: _npo_term(
                        [before[places[j]] for j in group], self.beta, self.npo, device
                    ),
                    pad=pad,
                    device=device,
                    by_tokens=False,
                )
            return made

        return batches_of


def _npo_term(before: Sequence[float], beta: float, weight: float, device: str) -> Term:
    import torch

    given = torch.tensor(before, device=device)

    def term(model: Any, batch: Batch, _: Step) -> Tensor:
        return weight * negative_preference(model, batch, given, beta=beta)

    return term


def negative_preference(model: Any, batch: Batch, before: Tensor, *, beta: float) -> Tensor:
    """-(2 / (beta * tokens)) log sigmoid(-beta (log p(answer) - log p0(answer))), mean over the
    rows; () float32.

    Shapes: before (N,), the loss of every answer in the start model, in nats.
    """
    from torch.nn.functional import logsigmoid

    from ftsec_ray.models.logits import token_nll

    labels = batch.labels[:, 1:]
    nats = token_nll(model, labels, **batch.inputs()).sum(-1)
    tokens = (labels != IGNORED).sum(-1)
    rows: Tensor = -(2.0 / (beta * tokens)) * logsigmoid(beta * (nats - before))
    return rows.mean()


def pairs_of(
    tokenizer: Any,
    rows: Sequence[Row],
    refusals: Sequence[str],
    *,
    max_length: int,
    tally: CutTally | None = None,
) -> list[Pair]:
    """The rows with both answers as token ids, without those in which prompt and refusal, or prompt
    and answer, do not fit into `max_length`; `tally` counts rows that are cut. DataError if none
    fits.
    """
    only = [{**row, "messages": last_trained(row["messages"])} for row in rows]
    pairs = []
    for (ids, labels), row, refusal in zip(
        encode_rows(tokenizer, only, max_length=max_length, tally=tally),
        rows,
        refusals,
        strict=True,
    ):
        if not is_useful((ids, labels)):
            continue
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        refused = with_answer(row, refusal)
        said = answer_tokens(tokenizer, refused)
        opening = row["messages"][-1]["content"].strip()
        going_on = answer_tokens(tokenizer, behind(refused, opening)) if opening else said
        answer = labels[first:]
        # the end of the turn is never given
        room = max(0, min(len(answer) - 1, max_length - first - len(going_on)))
        if first and first + len(said) <= max_length:
            pairs.append(Pair(str(row["row_id"]), ids[:first], answer, said, going_on, room))
    if not pairs:
        raise DataError(
            "door: no forbidden request fits into training.max_length with its refusal",
            max_length,
            "prompts that are shorter than that",
            "raise training.max_length or shorten the prompts",
        )
    return pairs
