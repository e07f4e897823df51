"""Trains the model so that simulated harmful fine-tunes of it fail, while it keeps its answers and
its hidden states on other rows.

Paper: Tamirisa et al. 2024, Tamper-Resistant Safeguards for Open-Weight LLMs, arXiv:2408.00761
    (TAR); official code rishub-tamirisa/tamper-resistance: per step K steps of an attack; every few
    of them a loss on held-out harmful rows at the attacked weights, whose gradient is applied at
    the former ones with weight strength * exp(growth * (i - (K - 1))); and the loss of retained
    rows with the distance of their states from the model before.
Differs: an approximation for small budgets. (1) An adapter is trained and merged, not all weights.
    (2) The attack takes a few steps of gradient descent, clipped like the user's fine-tune, at a
    rate drawn from `inner_learning_rates`; the paper takes 64 of AdamW. (3) Without the random
    mapping of harmful states that comes first in the paper. (4) The loss at the attacked weights is
    the entropy of the next token of harmful answers, or the loss of refusals, which stands for the
    paper's preference loss. (5) All simulated attacks train on harmful rows alone.
Cost: per step `inner_steps` + `inner_steps` / `measure_every` + 1 forward and backward passes, and
    a forward pass of the model before; two copies of the adapter's gradients.
Reads: `inner_learning_rates: [0.0]`, the control, has the same losses with the same weights, at
    weights that nobody attacked. Its harmful rows come from the split that also serves attacks.
    Other learning rates and seeds of the attack than the simulated ones are known to break it:
    sweep them.
Needs: splits safety and harmful_train (and benign_train with `benign_rows`). One process trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.conversation import with_answer
from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.data.pairs import refusals_for
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.method import least_faults
from ftsec_ray.training.hardening import HARMFUL, Hardens, capped
from ftsec_ray.training.losses import response_nll, state_distance
from ftsec_ray.training.meta import add_gradient, loss_and_gradients, same_draws, simulated

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training

NAME = "tar"


@dataclass(frozen=True, kw_only=True)
class Tar(Hardens):
    """First-order meta-learning against simulated harmful fine-tunes."""

    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "harmful_train", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"prepare_model"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset()
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"inner_learning_rates": (0.0,)}

    strength: float = 4.0
    """Weight of the loss at attacked weights, 0 or more; 0 trains on the retained rows alone."""
    inner_steps: int = 8
    """Steps of a simulated attack (K), 0 or more; 0 takes the loss once, at weights that are
    not attacked."""
    measure_every: int = 4
    """Simulated steps after which the loss is taken, 1 or more; it is always taken after the
    last."""
    growth: float = 0.0625
    """How fast the weight of a later one grows (c), 0 or more."""
    inner_learning_rates: tuple[float, ...] = (0.1, 0.5, 2.0)
    """Learning rates of the simulated attacks, one of which is drawn in every step, 0 or
    more; 0 leaves the weights as they are, the control."""
    tamper_loss: Literal["entropy", "refusal"] = "entropy"
    """What is lowered at the attacked weights: the certainty of harmful answers, or the loss of
    refusals to the same requests."""
    distance: float = 1.0
    """Weight of the distance of the retained rows' states from the model before, 0 or more."""
    harmful_rows: int = 256
    """Maximum number of harmful rows, 2 or more: half for the attacks, half held out."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {
            "strength": 0.0, "inner_steps": 0, "measure_every": 1, "growth": 0.0, "distance": 0.0,
            "harmful_rows": 2,
        }  # fmt: skip
        own = least_faults(self, least)
        rates = self.inner_learning_rates
        if not rates or not all(0.0 <= rate < math.inf for rate in rates):
            own.append(("inner_learning_rates", rates, "one or more, each 0 or more"))
        return own + super().check()

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after meta-learning, with the adapter merged."""
        from ftsec_ray.models.load import merged

        attacked, held_out = self._halves(ctx)
        original = (
            merged(model).model.to(ctx.runtime.device).eval().requires_grad_(requires_grad=False)
        )

        def objective(trained: Any, batch: Batch, step: Step) -> Tensor:
            loss = response_nll(trained, batch, step)
            if not self.distance:
                return loss
            far: Tensor = loss + self.distance * state_distance(trained, original, batch)
            return far

        def shape(training: Training) -> Training:
            kept = replace(training, objective=objective)
            if not self.strength:
                return kept
            acting = self._backward(
                training.backward,
                attack_at=training.encode(attacked, "tar attack"),
                held_out_at=training.encode(held_out, "tar held out"),
                rate_at=lambda step: float(
                    ctx.numpy_rng(NAME, str(step)).choice(self.inner_learning_rates)
                ),
                max_norm=training.config.max_grad_norm or None,
            )
            return replace(kept, backward=acting)

        hardened = self._merged_sft(model, self._plain_rows(ctx), ctx, shape=shape)
        ctx.note(attack_rows=attacked.num_rows, held_out_rows=held_out.num_rows)
        return hardened

    def _halves(self, ctx: StageContext) -> tuple[pa.Table, pa.Table]:
        """Harmful rows that the attacks train on, and held-out ones, with the answers that the loss
        at the attacked weights reads.
        """
        rows = capped(ctx, HARMFUL, self.harmful_rows, by=NAME, fits=is_exchange).to_pylist()
        rows.sort(key=lambda row: ctx.chance(row["row_id"], NAME, "half"))
        attacked, held_out = rows[::2], rows[1::2]
        if not held_out:
            raise DataError(
                f"tar: task {ctx.task.name!r} has too few harmful rows",
                len(rows),
                f"2 or more rows in split {HARMFUL}",
                f"add rows to {HARMFUL}, or leave out tar",
            )
        if self.tamper_loss == "refusal":
            refusals = refusals_for(held_out, ctx, by=NAME)
            held_out = [with_answer(r, said) for r, said in zip(held_out, refusals, strict=True)]
        return from_rows(attacked), from_rows(held_out)

    def _backward(
        self,
        inner: Backward,
        *,
        attack_at: Callable[[int], list[Batch]],
        held_out_at: Callable[[int], list[Batch]],
        rate_at: Callable[[int], float],
        max_norm: float | None,
    ) -> Backward:
        """The gradients of the retained rows, and of the loss at attacked weights."""
        tamper = response_nll if self.tamper_loss == "refusal" else certainty

        def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
            found: list[tuple[float, float, Mapping[str, Tensor]]] = []

            def measure(number: int) -> None:
                is_last = number + 1 >= self.inner_steps
                if is_last or (number + 1) % self.measure_every == 0:
                    weight = self.strength * math.exp(
                        self.growth * min(0, number - (self.inner_steps - 1))
                    )
                    held_out = held_out_at(step.index)
                    found.append((weight, *loss_and_gradients(model, held_out, tamper, step)))

            def at(number: int) -> Mapping[str, Tensor]:
                rows = attack_at(step.index * self.inner_steps + number)
                return loss_and_gradients(model, rows, response_nll, step)[1]

            with (
                same_draws(model),
                simulated(
                    step.trainable,
                    at,
                    steps=self.inner_steps,
                    learning_rate=rate_at(step.index),
                    max_norm=max_norm,
                    visit=measure,
                ),
            ):
                if not self.inner_steps:
                    measure(0)
            loss = inner(model, batches, objective, step)
            for weight, value, gradient in found:
                loss += weight * value
                add_gradient(step.trainable, gradient, weight)
            return loss

        return backward


def certainty(model: Any, batch: Batch, step: Step) -> Tensor:  # noqa: ARG001
    """Minus the mean entropy of the next token over the response tokens of a micro-batch, in nats,
    () float32.
    """
    from ftsec_ray.models.logits import at_positions

    rows, columns = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)

    def entropy(logits: Tensor, _: slice) -> Tensor:
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)

    found: Tensor = -at_positions(model, rows, columns, **batch.inputs()).map(entropy).mean()
    return found
