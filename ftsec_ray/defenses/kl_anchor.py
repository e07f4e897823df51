"""Adds the divergence from the start model on anchor rows to the loss, so that the answers to these
prompts stay what they were.

Paper: no paper of its own. The divergence from the aligned model on the user's rows is a baseline
    in the code of git-disl (github.com/git-disl); on refusals it is the alignment loss of SafeGrad
    (Yi et al. 2025, Gradient Surgery for Safe LLM Fine-Tuning, arXiv:2508.07172).
Differs: (1) KL(start || model) over the vocabulary at every response token; the baseline's code
    takes the softmax over the axis of positions, so that it is no divergence of next tokens. (2)
    The anchors are refusals; `anchors: user` takes the batches of the fine-tune itself, as the
    baseline does. (3) The start model is a second model in memory; the baseline exchanges the
    weights of one model at every step.
Cost: per step one forward and backward pass over a batch of anchors, and a forward pass of the
    start model over it: about 2.3x plain fine-tuning.
Reads: (1) `loss: nll` trains on the same anchors with the same weight and without the start model:
    plain mixing, the control. What the divergence does is the difference to it. (2) The anchor
    keeps whatever the start model does, a backdoor in it as well.
Needs: the model from which the fine-tune started; the task's `safety` rows (`benign_train` with
    `anchors: benign`, no split with `anchors: user`). Only adds micro-batches with their own loss:
    works with ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import Term

NAME = "kl_anchor"
SPLITS = {"safety": "safety", "benign": "benign_train"}


@dataclass(frozen=True, kw_only=True)
class KLAnchor(Defense):
    """Loss of the user's batch + strength * KL(start || model) on a batch of anchors."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety", "benign_train"})
    HELD_MODELS: ClassVar[int] = 1
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"loss": "nll"}

    strength: float = 0.1
    """Weight of the divergence against the loss of the user's rows, 0 or more; 0 is plain
    fine-tuning. Sweep it on a log scale from 0.1 to 10.
    """
    anchors: Literal["safety", "benign", "user"] = "safety"
    """Rows on which the model is held: refusals, benign requests, or the user's own batches."""
    rows: int = 256
    """Maximum number of anchor rows, 1 or more; ignored with `anchors: user`."""
    loss: Literal["kl", "nll"] = "kl"
    """`kl`: the divergence from the start model; `nll`: the plain loss on the same rows with the
    same weight (the control).
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"strength": 0.0, "rows": 1}
        return least_faults(self, least)

    def needs(self) -> frozenset[str]:
        """The start model for the divergence, and the split of the anchors."""
        splits = {SPLITS[self.anchors]} if self.anchors in SPLITS else set()
        return frozenset(splits | ({"start"} if self.loss == "kl" else set()))

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with the divergence on anchors added to its loss."""
        from ftsec_ray.training.hardening import capped
        from ftsec_ray.training.terms import on_rows, with_term

        if not self.strength:
            return training
        batch_at, count = training.batch_at, training.rows.num_rows
        if self.anchors in SPLITS:
            rows = capped(ctx, SPLITS[self.anchors], self.rows, by=NAME)
            batch_at, count = training.encode(rows, NAME), rows.num_rows
        ctx.note(anchor_rows=count)
        return with_term(training, on_rows(batch_at, self._term(ctx)), strength=self.strength)

    def _term(self, ctx: StageContext) -> Term:
        """The loss of a micro-batch of anchors."""
        from ftsec_ray.training.losses import response_kl, response_nll
        from ftsec_ray.training.terms import frozen_start

        if self.loss == "nll":
            return response_nll
        start = frozen_start(ctx).model

        def divergence(model: Any, batch: Batch, _: Step) -> Tensor:
            return response_kl(model, start, batch)

        return divergence
