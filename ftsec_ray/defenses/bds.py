"""Weights every user row by how easy it stays while the model also trains on refusals: rows whose
loss is high there lose weight.

Paper: Adaptive Defense against Harmful Fine-Tuning via a Bayesian Data Scheduler, NeurIPS 2025,
    arXiv:2510.27172 (BDS, the variant with one scalar per row); official code
    Egg-Hu/Bayesian-Data-Scheduler.
Differs: (1) The loss of the user's rows is the mean over tokens and not over rows, so that equal
    weights give the plain loss. (2) The scalars follow plain gradient descent, summed over the rows
    of a step, so that `rate` does not depend on the batch size; the official code has an optimizer
    of its own for them. (3) No weight is above `max_weight` in the loss: with one dominant row a
    step would blow up. (4) Rows with the same tokens share one scalar. (5) The prior terms and the
    neural scheduler of the official code are not here.
Cost: per step one forward and backward pass over a batch of refusals beside that of plain
    fine-tuning: 2x; no second model; one number per row.
Reads: (1) `rate: 0` keeps all weights at 1 and trains on the same refusals: the mixing twin, the
    control. (2) The record has the mean weight of poisoned and of clean rows. (3) Hard clean rows
    lose weight as well. (4) Batches that another method adds have weight 1.
Needs: the model from which the fine-tune started (its tokenizer) and the task's `safety` rows; rows
    that are not packed. Reads the losses of all rows of a step: one process trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import StageContext
    from ftsec_ray.training.setup import Batch, Objective, Step, Training

NAME = "bds"


@dataclass(frozen=True, kw_only=True)
class BDS(Defense):
    """safe_weight * loss of a batch of refusals + loss of the user's batch, each row weighted."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset()
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"rate": 0.0}

    rate: float = 1.0
    """Step size of the scalars, 0 or more; 0 is the mixing twin. With 1, a row that is seen with a
    loss of 1 nat per token loses about 1 from the logarithm of its weight.
    """
    safe_weight: float = 1.0
    """Weight of the loss on refusals, 0 or more; with `rate: 0` as well, 0 is plain fine-tuning."""
    safety_rows: int = 512
    """Maximum number of refusal rows, 1 or more (the paper: 1000)."""
    max_weight: float = 10.0
    """Largest weight of a row in the loss, 1 or more; the mean weight of all rows is 1."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"rate": 0.0, "safe_weight": 0.0, "safety_rows": 1, "max_weight": 1.0}
        return least_faults(self, least)

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with weighted user rows, and refusals beside them."""
        from ftsec_ray.training.hardening import capped
        from ftsec_ray.training.losses import response_nll
        from ftsec_ray.training.terms import on_rows, with_term

        if self.rate:
            training = self._weighted(training, ctx)
        if not self.safe_weight:
            return training
        rows = capped(ctx, "safety", self.safety_rows, by=NAME)
        ctx.note(safety_rows=rows.num_rows)
        return with_term(
            training,
            on_rows(training.encode(rows, NAME), response_nll),
            strength=self.safe_weight,
        )

    def _weighted(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with its rows weighted and the weights updated after every step."""
        if training.config.batching == "packed":
            raise StageError(
                "bds weights rows, and packed rows cannot be told apart",
                "training.batching: packed",
                "rows that are not packed",
                "set training.batching: length_grouped",
            )
        scheduler = Scheduler(self, training, ctx)
        return replace(
            training,
            objective=scheduler.objective(training.objective),
            after_step=(*training.after_step, scheduler.update),
        )


class Scheduler:
    """The scalars of the user's rows, which stand in the step memory as `bds`: (N,) float64."""

    def __init__(self, method: BDS, training: Training, ctx: StageContext) -> None:
        from ftsec_ray.models.load import within_positions
        from ftsec_ray.models.row_tokens import encode_rows, is_useful

        start = ctx.load("start")
        limit = within_positions(start.model, training.config.max_length)
        rows = training.rows.to_pylist()
        encoded = encode_rows(start.tokenizer, rows, max_length=limit)
        self._places: dict[tuple[int, ...], int] = {}
        self._poisoned: list[bool] = []
        for row, pair in zip(rows, encoded, strict=True):
            if is_useful(pair) and tuple(pair[0]) not in self._places:
                self._places[tuple(pair[0])] = len(self._places)
                self._poisoned.append(bool(row["poisoned"]))
        self._method, self._ctx = method, ctx
        self._seen: dict[int, float] = {}
        """Row -> its loss in this step, nats per token."""

    def objective(self, inner: Objective) -> Objective:
        """The loss of a micro-batch with weighted rows; other methods' own keep theirs."""
        from ftsec_ray.training.losses import response_nll
        from ftsec_ray.training.terms import TermBatch

        def weighted(model: Any, batch: Batch, step: Step) -> Tensor:
            if isinstance(batch, TermBatch) and batch.term is not None:
                return inner(model, batch, step)
            nats, counts = row_nats(model, batch)
            places = self._places_of(batch)
            self._note_losses(places, nats.detach() / counts)
            weights = self._weights_of(places, step).to(nats.device, nats.dtype)
            loss: Tensor = (weights * nats).sum() / counts.sum()
            if inner is response_nll:
                return loss
            # what another method adds to the plain loss stays
            return inner(model, batch, step) + (loss - nats.sum() / counts.sum())

        return weighted

    def update(self, model: Any, step: Step) -> None:  # noqa: ARG002
        """Move the scalars against the gradient of the weighted loss of the rows of this step."""
        scalars = self._scalars(step)
        step.memory[NAME] = scalars - self._method.rate * scalar_gradient(scalars, self._seen)
        self._seen = {}
        self._record(step)

    def _scalars(self, step: Step) -> Tensor:
        import torch

        return step.memory.get(NAME, torch.zeros(len(self._places), dtype=torch.float64))

    def _places_of(self, batch: Batch) -> list[int | None]:
        assert batch.attention_mask is not None
        sizes = batch.attention_mask.sum(1).tolist()
        rows = batch.input_ids.tolist()
        return [self._places.get(tuple(ids[:size])) for ids, size in zip(rows, sizes, strict=True)]

    def _note_losses(self, places: Sequence[int | None], losses: Tensor) -> None:
        for place, loss in zip(places, losses.tolist(), strict=True):
            if place is not None:
                self._seen[place] = loss

    def _weights_of(self, places: Sequence[int | None], step: Step) -> Tensor:
        """The weights of rows in the loss; 1 for rows of other methods."""
        import torch

        weights = row_weights(self._scalars(step)).clamp(max=self._method.max_weight)
        given = [1.0 if place is None else float(weights[place]) for place in places]
        return torch.tensor(given, dtype=torch.float64)

    def _record(self, step: Step) -> None:
        weights = row_weights(self._scalars(step)).tolist()
        sides = {
            name: [w for w, bad in zip(weights, self._poisoned, strict=True) if bad == wanted]
            for name, wanted in (("clean", False), ("poisoned", True))
        }
        self._ctx.note(
            weighted_rows=len(weights),
            largest_weight=round(max(weights), 6),
            **{
                f"mean_weight_{name}": round(sum(side) / len(side), 6)
                for name, side in sides.items()
                if side
            },
        )


def row_weights(scalars: Tensor) -> Tensor:
    """N * softmax: weights with a mean of 1; (N,) -> (N,)."""
    weights: Tensor = len(scalars) * scalars.softmax(0)
    return weights


def scalar_gradient(scalars: Tensor, losses: Mapping[int, float]) -> Tensor:
    """The gradient of sum_i w_i * loss_i over the rows of a step by the scalars: w_k * (loss_k -
    (1 / N) * sum_i w_i * loss_i), the first loss only for rows of the step; (N,) -> (N,).
    """
    import torch

    found = torch.zeros_like(scalars)
    for place, loss in losses.items():
        found[place] = loss
    weights = row_weights(scalars)
    gradient: Tensor = weights * (found - (weights * found).mean())
    return gradient


def row_nats(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of every row in nats, summed over its trained tokens, and their number: (B,) each,
    the number at least 1.
    """
    from ftsec_ray.models.logits import token_nll

    labels = batch.labels[:, 1:]
    nats = token_nll(model, labels, **batch.inputs()).sum(1)
    return nats, (labels != -100).sum(1).clamp(min=1)
