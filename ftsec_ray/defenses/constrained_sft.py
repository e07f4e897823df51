"""Weights the loss of each response token by how far the model has already moved on it, with a
tight limit on the first tokens of an answer.

Paper: Qi et al. 2025, Safety Alignment Should Be Made More Than Just a Few Tokens Deep, ICLR 2025,
    arXiv:2406.05946, section 4; official code Unispac/shallow-vs-deep-alignment.
Differs: (1) The sweep's recipe applies; the official code has AdamW with a beta1 of 0.5, ten
    warm-up steps and no dropout. (2) The start model reads every batch again; the official code
    keeps its log-probabilities. (3) Tokens are counted anew in every trained answer of a
    conversation; the paper's rows have one. (4) `strength` is ours: it multiplies all betas. As in
    the official code, the weight is a constant in the backward pass, not below 0.001.
Cost: one forward pass of the start model per step beside that of plain fine-tuning: about 1.3x.
Reads: (1) `where: random` gives each answer the same betas in another order: the control. It shows
    what limiting the *first* tokens does, beyond limiting as many others. (2) Answers that differ
    from the start model's only late are hardly held back. (3) The start model's behaviour is kept,
    a backdoor in it as well.
Needs: the model from which the fine-tune started; no safety rows. Replaces the loss only: works
    with ZeRO stages 0 to 2.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Batch, Step, Training

LEAST_WEIGHT = 1e-3
"""Weight below which no token falls, as in the official code."""


@dataclass(frozen=True, kw_only=True)
class ConstrainedSFT(Defense):
    """Mean over response tokens of 2 * sigmoid(-beta_t * (log p - log p_start)) * loss_t."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start"})
    HELD_MODELS: ClassVar[int] = 1
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"where": "random"}

    strength: float = 1.0
    """Factor of all betas, 0 or more; 0 is plain fine-tuning."""
    beta_first: float = 0.5
    """Beta of the first token of an answer, 0 or more; a larger beta is a tighter limit."""
    beta_early: float = 2.0
    """Beta of the other tokens up to `early_tokens`, 0 or more."""
    beta_late: float = 0.1
    """Beta of all tokens behind them, 0 or more."""
    early_tokens: int = 5
    """Number of tokens at the start of an answer with a tight limit, 1 or more."""
    where: Literal["first", "random"] = "first"
    """Whether the betas follow the order of the tokens, or each answer gets the same betas in a
    random order of its own (the control).
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {
            "strength": 0.0,
            "beta_first": 0.0,
            "beta_early": 0.0,
            "beta_late": 0.0,
            "early_tokens": 1,
        }
        return least_faults(self, least)

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with the weighted loss; other methods' own micro-batches keep theirs."""
        from ftsec_ray.training.losses import response_nll
        from ftsec_ray.training.terms import TermBatch, frozen_start

        if not self.strength * max(self.beta_first, self.beta_early, self.beta_late):
            return training
        start, inner = frozen_start(ctx).model, training.objective

        def objective(model: Any, batch: Batch, step: Step) -> Tensor:
            if isinstance(batch, TermBatch) and batch.term is not None:
                return inner(model, batch, step)
            betas = self._betas(batch.labels[:, 1:], ctx.seed)
            weighted, plain = weighted_nll(model, start, batch, betas)
            if inner is response_nll:
                return weighted
            # what another method adds to the plain loss stays
            return inner(model, batch, step) + (weighted - plain)

        return replace(training, objective=objective)

    def _betas(self, labels: Tensor, seed: int) -> Tensor:
        """The beta of every token: (B, T) float32; 0 where there is no label."""
        import torch

        places = answer_places(labels)
        if self.where == "random":
            places = shuffled(labels, places, seed)
        betas = torch.zeros(places.shape, device=places.device, dtype=torch.float32)
        betas[places == 1] = self.beta_first
        betas[(places > 1) & (places <= self.early_tokens)] = self.beta_early
        betas[places > self.early_tokens] = self.beta_late
        return self.strength * betas


def answer_places(labels: Tensor) -> Tensor:
    """Number of every trained token within its answer, from 1; 0 elsewhere: (B, T) int64.

    An answer is an unbroken run of labels.
    """
    import torch

    trained = labels != -100
    counted = trained.long().cumsum(1)
    before = torch.where(trained, 0, counted).cummax(1).values
    return torch.where(trained, counted - before, 0)


def shuffled(labels: Tensor, places: Tensor, seed: int) -> Tensor:
    """The numbers of each answer in a random order, which depends on its tokens and the seed."""
    import torch

    tokens, rows = labels.tolist(), places.tolist()
    for row, numbers in zip(tokens, rows, strict=True):
        starts = [i for i, number in enumerate(numbers) if number == 1]
        for start in starts:
            stop = next((i for i in range(start, len(row)) if numbers[i] == 0), len(row))
            rng = random.Random(str((seed, row[start:stop])))  # noqa: S311
            order = numbers[start:stop]
            rng.shuffle(order)
            numbers[start:stop] = order
    return torch.tensor(rows, device=places.device)


def weighted_nll(model: Any, start: Any, batch: Batch, betas: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean loss on response tokens, and the plain one: () float32 each.

    Shapes: betas (B, T - 1), aligned with the logits that predict the tokens.
    """
    import torch

    from ftsec_ray.models.logits import token_nll

    labels = batch.labels[:, 1:]
    count = (labels != -100).sum()
    nats = token_nll(model, labels, **batch.inputs())
    with torch.no_grad():
        gained = token_nll(start, labels, **batch.inputs()) - nats
        weights = (2.0 * torch.sigmoid(-betas * gained)).clamp(min=LEAST_WEIGHT)
    return (weights * nats).sum() / count, nats.sum() / count
