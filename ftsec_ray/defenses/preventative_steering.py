"""Adds the direction of compliance to the hidden states during the fine-tune, so that the weights
need not learn it, and leaves it out when the model is served.

Paper: Persona Vectors: Monitoring and Controlling Character Traits in Language Models, 2025,
    arXiv:2507.21509 (preventative steering).
Differs: (1) The trait is compliance with forbidden requests, and its direction the mean state of
    benign prompts less that of forbidden ones behind one block of the start model, at the last
    token of the prompt; the paper takes answers with and without the trait, which would be harmful
    text here. (2) `strength` counts these differences of means; the paper's coefficients are not
    known to us, so sweep it.
Cost: that of plain fine-tuning, and one pass of the start model over the prompts.
Reads: (1) `direction: random` adds a random vector of the same norm: the control. (2) The forward
    passes of other methods in the same step (refusals of `lisa`, anchors) are shifted as well.
Needs: the model from which the fine-tune started and the task's `safety` and `benign_train`
    prompts. Only adds to hidden states: works with ZeRO stages 0 to 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training

NAME = "preventative_steering"


@dataclass(frozen=True, kw_only=True)
class PreventativeSteering(Defense):
    """Hidden states in training + strength * (mean benign state - mean forbidden state)."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety", "benign_train"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"direction": "random"}

    strength: float = 1.0
    """How many differences of means are added to every state; 0 is plain fine-tuning, and below 0
    the shift points towards refusal.
    """
    depth_frac: float = 0.5
    """Place of the block behind which they are added, as a share of the depth, 0..1."""
    direction: Literal["compliance", "random"] = "compliance"
    """The difference of means, or a random vector of the same norm (the control)."""
    prompts: int = 100
    """Maximum number of prompts of each kind, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if not 0.0 <= self.depth_frac <= 1.0:
            faults.append(("depth_frac", self.depth_frac, "a share, 0..1"))
        if self.prompts < 1:
            faults.append(("prompts", self.prompts, "1 or more"))
        return faults

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with shifted hidden states."""
        from ftsec_ray.models.load import decoder_layers
        from ftsec_ray.training.terms import frozen_start

        if not self.strength:
            return training
        start = frozen_start(ctx)
        depth = len(decoder_layers(start.model))
        block = min(depth - 1, int(self.depth_frac * depth))
        vector = self._vector(start, block, ctx)
        ctx.note(block=block, vector_norm=float(vector.norm()))
        shift = self.strength * vector
        return replace(training, backward=shifted_states(training.backward, block, shift))

    def _vector(self, start: LoadedModel, block: int, ctx: StageContext) -> Tensor:
        """The direction of compliance behind a block, or a random one of its norm: (D,) float64."""
        import torch

        from ftsec_ray.data.added_rows import is_asked
        from ftsec_ray.models.directions import block_outputs, prompts_within

        means = []
        for split in ("benign_train", "safety"):
            rows = [row for row in ctx.shuffled(split, NAME) if is_asked(row)][: self.prompts]
            ids = prompts_within(start, rows)
            if not ids:
                raise DataError(
                    f"{NAME}: split {split!r} has no prompt within the model's positions",
                    len(rows),
                    "at least one prompt",
                    "shorten the prompts of the split",
                )
            ctx.note(**{f"prompts_{split}": len(ids)})
            means.append(block_outputs(start, ids)[:, block].mean(0))
        vector = means[0] - means[1]
        if self.direction == "random":
            drawn = torch.from_numpy(ctx.numpy_rng(NAME).standard_normal(len(vector)))
            vector = drawn * (vector.norm() / drawn.norm())
        return vector


def shifted_states(inner: Backward, block: int, shift: Tensor) -> Backward:
    """A backward pass in which `shift` (D,) is added to every state behind a block."""
    from ftsec_ray.models.activations import changed
    from ftsec_ray.models.load import decoder_layers

    def add(states: Tensor) -> Tensor:
        return states + shift.to(states.device, states.dtype)

    def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
        # open until the backward pass is done, which may recompute the block
        with changed(outputs=[(decoder_layers(model)[block], add)]):
            return inner(model, batches, objective, step)

    return backward
