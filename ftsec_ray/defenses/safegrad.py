"""Removes from the gradient of the user's rows the part that works against the gradient of
alignment, and adds the latter.

Paper: Yi et al. 2025, Gradient Surgery for Safe LLM Fine-Tuning, arXiv:2508.07172 (SafeGrad); its
    code was not found.
Differs: (1) All trained weights form one vector; projecting every tensor by itself is another
    variant. (2) The alignment loss is KL(start || model) at the response tokens of refusals.
    (3) The projected gradient goes through the sweep's optimizer: Adam divides each weight by its
    own scale afterwards, so that the update itself may again have a part against the alignment
    gradient; the record has how many steps were in conflict, and the mean cosine.
Cost: per step two gradients, and a forward pass of the start model over a batch of refusals: about
    2.3x plain fine-tuning; one more gradient of all trained weights in memory.
Reads: `project: false` adds the same alignment gradient with the same weight and removes nothing,
    which is the loss of `kl_anchor`: the control. The effect of the surgery is the difference to
    it.
Needs: the model from which the fine-tune started and the task's `safety` rows. Takes whole
    gradients twice in a step: one process trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.method import Defense, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training

NAME = "safegrad"


class Surgery(NamedTuple):
    """A user gradient after surgery, and the cosine between it and the alignment gradient before;
    0 if one of them is zero.
    """

    gradient: dict[str, Any]
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SafeGrad(Defense):
    """User gradient, projected if in conflict, + strength * alignment gradient."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety"})
    HELD_MODELS: ClassVar[int] = 1
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset()
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"project": False}

    strength: float = 1.0
    """Weight of the alignment gradient in the update (rho), 0 or more; the projection does not
    depend on it. 0 with `project: false` is plain fine-tuning.
    """
    project: bool = True
    """Whether the user gradient loses its part against the alignment gradient; false is the
    control.
    """
    rows: int = 256
    """Maximum number of refusal rows, 1 or more (the paper: about 20 suffice)."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"strength": 0.0, "rows": 1}
        return least_faults(self, least)

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with surgery on its gradients."""
        from ftsec_ray.training.hardening import capped
        from ftsec_ray.training.losses import response_kl
        from ftsec_ray.training.terms import frozen_start

        if not self.strength and not self.project:
            return training
        rows = capped(ctx, "safety", self.rows, by=NAME)
        start = frozen_start(ctx).model
        ctx.note(alignment_rows=rows.num_rows)

        def align(model: Any, batch: Batch, _: Step) -> Tensor:
            return response_kl(model, start, batch)

        return replace(
            training,
            backward=self._backward(training.backward, training.encode(rows, NAME), align, ctx),
        )

    def _backward(
        self,
        inner: Backward,
        align_at: Callable[[int], list[Batch]],
        align: Objective,
        ctx: StageContext,
    ) -> Backward:
        """The backward pass `inner`, then surgery on what it left."""

        def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
            import torch

            from ftsec_ray.training.meta import gradients

            loss = inner(model, batches, objective, step)
            user = {
                name: torch.zeros_like(w) if w.grad is None else w.grad
                for name, w in step.trainable.items()
            }
            alignment = gradients(model, align_at(step.index), align, step)
            found = operated(user, alignment, project=self.project, strength=self.strength)
            for name, weight in step.trainable.items():
                weight.grad = found.gradient[name]
            self._record(found.cosine, step, ctx)
            return loss

        return backward

    def _record(self, cosine: float, step: Step, ctx: StageContext) -> None:
        """Count the step; the counts are part of the step memory, so that they survive a kill."""
        import torch

        seen = step.memory.get(NAME, torch.zeros(3, dtype=torch.float64))
        seen = seen + torch.tensor([1.0, float(cosine < 0.0), cosine], dtype=torch.float64)
        step.memory[NAME] = seen
        steps, conflicts, cosines = seen.tolist()
        ctx.note(
            surgery_steps=int(steps),
            conflict_steps=int(conflicts),
            mean_cosine=round(cosines / steps, 6),
        )


def operated(
    user: Mapping[str, Tensor],
    alignment: Mapping[str, Tensor],
    *,
    project: bool,
    strength: float,
) -> Surgery:
    """The user gradient, with `project` without its part against the alignment gradient, plus
    `strength` times the latter. All tensors together count as one vector.
    """
    inner = sum(float((user[n].double() * g.double()).sum()) for n, g in alignment.items())
    square, own = (
        sum(float(g.double().square().sum()) for g in side.values()) for side in (alignment, user)
    )
    is_defined = square > 0.0 and own > 0.0
    share = inner / square if project and is_defined and inner < 0.0 else 0.0
    made = {name: user[name] + (strength - share) * g for name, g in alignment.items()}
    return Surgery(made, inner / (square * own) ** 0.5 if is_defined else 0.0)
