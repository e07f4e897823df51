"""Alternates between training steps on refusals and on the user's rows, and pulls each state
towards the last weights of the other.

Paper: Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack
(Huang et al. 2024, arXiv:2405.18641), algorithm 1; official code git-disl/Lisa.
Differs: (1) the official code discards the user batches that fall on alignment steps; here the
user's steps keep their number and order, and alignment steps are added. (2) The weights of the
other state are part of the step memory, so that a fine-tune resumes exactly after it was killed.
(3) A turn is 1 step on refusals and 9 on the user's rows; the official code has 100 and 900, so
that its turns would not end within tens or hundreds of steps and the proximal term would have
nothing to pull towards. As in the official code, it starts with alignment, both states share the
optimizer's moments, and the proximal term is off for the first 10 % of all steps.
Cost: 1x per step, and align_steps / user_steps additional steps; two copies of the trained weights.
Reads: with rho 0 it only mixes one batch of refusals into nine of the user's, and that alone may
    lower attack success. The effect of the proximal term is the difference to rho 0.
Needs: the task's `safety` rows. Only adds a term to the loss: works with ZeRO stages that keep
    trained weights whole (0 to 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.method import Defense, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Batch, Step, Training

PROXIMAL_FROM_FRAC = 0.1
"""Share of all steps after which the proximal term becomes active."""


class Place(NamedTuple):
    """The state of a step, its number within that state, and whether it is the last step of the
    state's turn.
    """

    state: str
    number: int
    is_last_of_turn: bool


@dataclass(frozen=True, kw_only=True)
class Lisa(Defense):
    """Loss of the state's batch + (rho / 2) * |weights - other state's last weights|^2."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"rho": 0.0}

    rho: float = 1.0
    """Strength of the proximal term, 0 or more; sweep it on a log scale."""
    align_steps: int = 1
    """Steps on refusals per turn (the paper: 100)."""
    user_steps: int = 9
    """Steps on the user's rows per turn (the paper: 900)."""
    safety_rows: int = 512
    """Maximum number of refusal rows."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"rho": 0.0, "align_steps": 1, "user_steps": 1, "safety_rows": 1}
        return least_faults(self, least)

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with alignment turns added, and the proximal term in every turn."""
        turns = -(-training.steps // self.user_steps)
        aligning = turns * self.align_steps
        align_batch_at = training.encode(self._rows(ctx), "lisa")
        user_batch_at, inner = training.batch_at, training.objective

        def batch_at(step: int) -> list[Batch]:
            place = self.place(step)
            return (
                align_batch_at(place.number)
                if place.state == "align"
                else user_batch_at(place.number)
            )

        def objective(model: Any, batch: Batch, step: Step) -> Tensor:
            loss, term = inner(model, batch, step), self.proximal(step)
            return loss if term is None else loss + term

        ctx.note(user_steps=training.steps, align_steps=aligning)
        return replace(
            training,
            steps=training.steps + aligning,
            batch_at=batch_at,
            objective=objective,
            after_step=(*training.after_step, self.remember),
        )

    def place(self, step: int) -> Place:
        """The state and the number of a step of the whole fine-tune."""
        turn, rest = divmod(step, self.align_steps + self.user_steps)
        if rest < self.align_steps:
            return Place("align", turn * self.align_steps + rest, rest == self.align_steps - 1)
        number = rest - self.align_steps
        return Place("user", turn * self.user_steps + number, number == self.user_steps - 1)

    def proximal(self, step: Step) -> Tensor | None:
        """(rho / 2) * |weights - weights at the end of the other state's turn|^2, () float32; None
        while the term is off.
        """
        import torch

        other = "user" if self.place(step.index).state == "align" else "align"
        pairs = [
            (weight, step.memory[key])
            for name, weight in step.trainable.items()
            if (key := f"lisa.{other}.{name}") in step.memory
        ]
        if not pairs or self.rho == 0.0 or step.index < PROXIMAL_FROM_FRAC * step.total:
            return None
        # as one vector: an adapter has many small tensors, and each of them would add a dozen
        # autograd nodes
        here, there = (
            torch.cat([tensor.float().flatten() for tensor in side])
            for side in zip(*pairs, strict=True)
        )
        term: Tensor = self.rho / 2 * (here - there.to(here.device)).square().sum()
        return term

    def remember(self, model: Any, step: Step) -> None:  # noqa: ARG002
        """Save the weights at the end of a state's turn."""
        place = self.place(step.index)
        if place.is_last_of_turn:
            for name, weight in step.trainable.items():
                step.memory[f"lisa.{place.state}.{name}"] = weight.detach().clone()

    def _rows(self, ctx: StageContext) -> Any:
        table = ctx.task.split("safety")
        ids = table.column("row_id").to_pylist()
        chosen = sorted(range(len(ids)), key=lambda i: ctx.chance(ids[i], "lisa"))[
            : self.safety_rows
        ]
        return table.take(sorted(chosen))
