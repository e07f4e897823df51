"""Aligns the model again so that a step of harmful fine-tuning lowers the harmful loss less.

Paper: Huang et al. 2024, Booster: Tackling Harmful Fine-tuning for Large Language Models via
    Attenuating Harmful Perturbation, arXiv:2409.01586, algorithm 1; official code git-disl/Booster.
Differs: (1) The gradients of the harmful rows are taken beside those of the step and added to
    them, so that accumulation erases none, and weights are restored from a copy, to the bit.
    (2) Both harmful passes drop the same activations, and those of the refusals are not changed by
    them: strength 0 equals plain fine-tuning bit for bit. (3) Benign rows are mixed in
    (`benign_rows`); it starts from the aligned model instead of the base; the adapter is on all
    linear layers and is merged afterwards. (4) The record has the fall of the harmful loss by the
    simulated step at the first and at the last step. As in the official code there is no
    second-order term: the simulated step counts as a constant shift.
Cost: 3 forward and 3 backward passes per step, once per base model; two copies of the adapter's
    gradients.
Reads: its harmful rows come from the split that also serves attacks, so a row of the attack may be
    one of them: lower `harmful_rows` to see how much of the effect is that. Where the attack trains
    too little to fit its rows, any defense looks good.
Needs: splits safety and harmful_train (and benign_train with `benign_rows`). One process trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.method import above_faults, least_faults
from ftsec_ray.training.hardening import HARMFUL, Hardens, capped
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.meta import add_gradient, loss_and_gradients, same_draws, simulated

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training

NAME = "booster"
DROPS = f"{NAME}.drops"


@dataclass(frozen=True, kw_only=True)
class Booster(Hardens):
    """loss of refusals + strength * (harmful loss - harmful loss after a step along its
    gradient).
    """

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "harmful_train", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset()
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}

    strength: float = 5.0
    """Weight of the fall of the harmful loss (lambda), 0 or more; 0 is plain fine-tuning."""
    step_size: float = 0.1
    """Length of the simulated step over all trained weights together (alpha), above 0."""
    harmful_rows: int = 256
    """Maximum number of forbidden requests with harmful answers, 1 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        own = least_faults(self, {"strength": 0.0, "harmful_rows": 1}) + above_faults(
            self, "step_size"
        )
        return own + super().check()

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after alignment with the regulariser, with the adapter merged."""
        harmful = capped(ctx, HARMFUL, self.harmful_rows, by=NAME, fits=is_exchange)
        drops: dict[str, list[float]] = {}

        def shape(training: Training) -> Training:
            if not self.strength:
                return training
            return replace(
                training,
                backward=attenuated(
                    training.backward,
                    training.encode(harmful, NAME),
                    strength=self.strength,
                    step_size=self.step_size,
                    drops=drops,
                ),
            )

        hardened = self._merged_sft(model, self._plain_rows(ctx), ctx, shape=shape)
        ctx.note(harmful_rows=harmful.num_rows)
        if DROPS in drops:
            first, last = drops[DROPS]
            ctx.note(first_harmful_drop=first, last_harmful_drop=last)
        return hardened


def attenuated(
    inner: Backward,
    harmful_at: Callable[[int], list[Batch]],
    *,
    strength: float,
    step_size: float,
    drops: dict[str, list[float]],
) -> Backward:
    """A backward pass that adds `strength` times the gradient of the fall of the harmful loss.

    Args:
        inner: The gradients of the refusals.
        harmful_at: Step number -> the micro-batches of harmful rows.
        strength: Weight of the fall.
        step_size: Length of the simulated step.
        drops: Where the fall at the first and at the present step is kept, in nats per token.
    """
    import torch

    def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
        harmful = harmful_at(step.index)
        with same_draws(model):
            before, here = loss_and_gradients(model, harmful, response_nll, step)
        with (
            same_draws(model),
            simulated(
                step.trainable,
                lambda _: here,
                steps=1,
                learning_rate=step_size,
                normalised=True,
            ),
        ):
            after, there = loss_and_gradients(model, harmful, response_nll, step)
        loss = inner(model, batches, objective, step)
        add_gradient(step.trainable, here, strength)
        add_gradient(step.trainable, there, -strength)
        drop = torch.tensor(before - after, dtype=torch.float64)
        first = step.memory.get(DROPS, drop.repeat(2))[0]
        step.memory[DROPS] = torch.stack([first, drop])
        drops[DROPS] = step.memory[DROPS].tolist()
        return loss + strength * (before - after)

    return backward
