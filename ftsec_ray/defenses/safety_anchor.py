"""Holds the last hidden state of a few forbidden prompts where the start model has it.

Paper: Safety anchor, 2026, arXiv:2605.05995 (SBR); official code soyoaaa/SBR.
Differs: (1) The state is the one behind the last block and norm at the last token of the prompt as
    it is served. (2) The squared distance is the sum over the dimensions and the mean over the
    prompts. (3) The states of the start model are computed in the precision of the training. (4)
    The sweep's recipe applies; the paper has rsLoRA of rank 16, a learning rate of
    1e-5 and 20 epochs.
Cost: one forward and backward pass over `prompts` short prompts per step, without answers; the
    start model reads them once and is not kept.
Reads: (1) `anchors: benign` holds as many benign prompts: the control. (2) The anchors are fixed
    texts: other forbidden requests may move. They come from the split `safety`, which no probe
    asks.
Needs: the model from which the fine-tune started and the task's `safety` prompts (`benign_train`
    with `anchors: benign`). Works with ZeRO stage 0: the stages above it need a gradient of every
    trained weight in every micro-batch, and those of the anchors give the output layer none.
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
    from ftsec_ray.training.terms import TermBatch

NAME = "safety_anchor"
SPLITS = {"safety": "safety", "benign": "benign_train"}


@dataclass(frozen=True, kw_only=True)
class SafetyAnchor(Defense):
    """Loss of the user's batch + strength * mean |h(anchor) - h_start(anchor)|^2."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety", "benign_train"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"anchors": "benign"}

    strength: float = 50.0
    """Weight of the squared distance (lambda), 0 or more; 0 is plain fine-tuning. A distance grows
    with the width of a model: sweep it on a log scale.
    """
    prompts: int = 8
    """Number of anchors (k), 1 or more."""
    anchors: Literal["safety", "benign"] = "safety"
    """Forbidden prompts, or as many benign ones (the control)."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"strength": 0.0, "prompts": 1}
        return least_faults(self, least)

    def needs(self) -> frozenset[str]:
        """The start model and the split of the anchors."""
        return frozenset({"start", SPLITS[self.anchors]})

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with the distance of the anchors added to its loss."""
        import torch

        from ftsec_ray.data.added_rows import drawn, is_asked
        from ftsec_ray.models.precision import widen
        from ftsec_ray.training.loop import autocast
        from ftsec_ray.training.prompt_states import encoded_prompts, last_states
        from ftsec_ray.training.terms import frozen_start, term_batch, with_term

        if not self.strength:
            return training
        start = frozen_start(ctx)
        rows = drawn(ctx, SPLITS[self.anchors], self.prompts, by=NAME, fits=is_asked)
        ids = encoded_prompts(start, rows, by=NAME)
        pad, device = start.tokenizer.pad_token_id or 0, ctx.runtime.device
        if training.config.adapter == "full":
            widen(start.model)  # as the trained weights
        with torch.no_grad(), autocast(device):
            wanted = last_states(start.model, term_batch(ids, pad=pad, device=device))

        def distance(model: Any, batch: Batch, _: Step) -> Tensor:
            return squared_distance(last_states(model, batch), wanted)

        def batches_of(step: int) -> list[TermBatch]:  # noqa: ARG001 - the same anchors each time
            return [term_batch(ids, distance, pad=pad, device=device)]

        ctx.note(anchor_prompts=len(ids))
        return with_term(training, batches_of, strength=self.strength)


def squared_distance(states: Tensor, wanted: Tensor) -> Tensor:
    """The mean over rows of |states - wanted|^2: (N, D), (N, D) -> ()."""
    distance: Tensor = (states - wanted).square().sum(-1).mean()
    return distance
