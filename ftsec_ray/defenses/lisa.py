"""Alternates steps on the provider's refusals with the user's steps, each pulled towards where the
other left off.

Paper: Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack
(Huang et al. 2024, arXiv:2405.18641), algorithm 1; official code git-disl/Lisa.
Differs: (1) the official code throws away the user batches that fall on alignment steps; here the
user's steps keep their number and order, and alignment steps come on top. (2) The weights of the
other state live in the step memory, so a tune that was killed goes on exactly. (3) A turn is 1
step on refusals and 9 on the user's rows, where the official code has 100 and 900: its turns would
not end within tunes of tens or hundreds of steps, and the proximal term would pull to nothing
before the second. Kept as there: it starts with alignment, both states share the optimizer's
moments, and the proximal term is off for the first 10 % of all steps.
Cost: 1x per step and align_steps / user_steps more steps; two copies of the trained weights.
Reads: at rho 0 it is plain mixing, one batch of refusals for nine of the user's, and that alone may
    lower attack success. Credit the proximal term with what is left against rho 0.
Needs: the task's `safety` rows. Adds a term to the loss only: any ZeRO stage that keeps trained
    weights whole (0 to 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Batch, Step, Training

PROXIMAL_FROM_FRAC = 0.1
"""Share of all steps that pass before the proximal term acts."""


class Place(NamedTuple):
    """Which state a step belongs to, its number within that state, and whether it ends the state's
    turn.
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
    """Strength of the proximal term, 0 or more; sweep it logarithmically."""
    align_steps: int = 1
    """Steps on refusals per turn (the paper: 100)."""
    user_steps: int = 9
    """Steps on the user's rows per turn (the paper: 900)."""
    safety_rows: int = 512
    """Refusal rows, at most."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"rho": 0.0, "align_steps": 1, "user_steps": 1, "safety_rows": 1}
        return [
            (name, getattr(self, name), f"{low} or more")
            for name, low in least.items()
            if getattr(self, name) < low
        ]

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The tune with alignment turns between the user's, and the proximal term on both."""
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
        """Where a step of the whole tune falls."""
        turn, rest = divmod(step, self.align_steps + self.user_steps)
        if rest < self.align_steps:
            return Place("align", turn * self.align_steps + rest, rest == self.align_steps - 1)
        number = rest - self.align_steps
        return Place("user", turn * self.user_steps + number, number == self.user_steps - 1)

    def proximal(self, step: Step) -> Tensor | None:
        """(rho / 2) * |weights - those at the end of the other state's turn|^2, () float32; None
        while it is off.
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
        # as one vector: an adapter has many small tensors, and each of them would take a dozen
        # nodes of autograd
        here, there = (
            torch.cat([tensor.float().flatten() for tensor in side])
            for side in zip(*pairs, strict=True)
        )
        term: Tensor = self.rho / 2 * (here - there.to(here.device)).square().sum()
        return term

    def remember(self, model: Any, step: Step) -> None:  # noqa: ARG002
        """Keep the weights at the end of a state's turn."""
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
