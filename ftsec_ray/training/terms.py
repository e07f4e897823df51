"""A method's own loss on its own rows, beside the loss on the user's rows of the same step.

The method's rows are further micro-batches of the step, each with the function that gives its loss.
So batches of others (the alignment steps of a defense) keep the plain loss, the term is computed
once per step, and a worker group shares the micro-batches among its processes like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.models.activations import right_padded
from ftsec_ray.models.row_tokens import IGNORED, Encoded
from ftsec_ray.training.encode import MAX_MICRO_BATCH_TOKENS, epoch_batches, steps_per_epoch
from ftsec_ray.training.setup import Batch, Step, Training

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

Term = Callable[[Any, Batch, Step], "Tensor"]
"""(model, micro-batch, step) -> () float32 loss."""


@dataclass(frozen=True)
class TermBatch(Batch):
    """A micro-batch with a loss of its own."""

    term: Term | None = None


def term_batch(
    ids: Sequence[Sequence[int]],
    term: Term | None = None,
    *,
    labels: Sequence[Sequence[int]] | None = None,
    pad: int,
    device: str,
    weight: float = 1.0,
) -> TermBatch:
    """Rows of token ids as a micro-batch whose loss is `term`; without labels none is predicted."""
    padded, mask = right_padded(ids, pad=pad, device=device)
    given = [[IGNORED] * len(row) for row in ids] if labels is None else labels
    wanted, _ = right_padded(given, pad=IGNORED, device=device)
    return TermBatch(padded, wanted, mask, None, weight, term)


def with_term(
    training: Training,
    batches_of: Callable[[int], list[TermBatch]],
    *,
    strength: float,
    user_weight: float = 1.0,
    steps: int | None = None,
) -> Training:
    """The fine-tune with `strength` times a term added to `user_weight` times its own loss.

    Args:
        training: The fine-tune on the user's rows.
        batches_of: Step number -> the micro-batches of the term; a pure function.
        strength: 0 or more; 0 adds no micro-batch.
        user_weight: 0 or more; 0 leaves the user's rows out.
        steps: Optimizer steps; None: those of `training`.
    """
    inner = training.objective

    def batch_at(step: int) -> list[Batch]:
        users = training.batch_at(step) if user_weight else []
        own = batches_of(step) if strength else []
        return [
            *(replace(batch, weight=batch.weight * user_weight) for batch in users),
            *(replace(batch, weight=batch.weight * strength) for batch in own),
        ]

    def objective(model: Any, batch: Batch, step: Step) -> Tensor:
        if isinstance(batch, TermBatch) and batch.term is not None:
            return batch.term(model, batch, step)
        return inner(model, batch, step)

    return replace(
        training,
        steps=training.steps if steps is None else steps,
        batch_at=batch_at,
        objective=objective,
    )


def on_rows(batch_at: Callable[[int], list[Batch]], term: Term) -> Callable[[int], list[TermBatch]]:
    """The micro-batches that `batch_at` gives, with `term` as their loss; without those that
    already have a loss of their own.
    """

    def batches_of(step: int) -> list[TermBatch]:
        return [
            TermBatch(b.input_ids, b.labels, b.attention_mask, b.position_ids, b.weight, term)
            for b in batch_at(step)
            if not (isinstance(b, TermBatch) and b.term is not None)
        ]

    return batches_of


def frozen_start(ctx: StageContext) -> LoadedModel:
    """A copy of the model from which the fine-tune started, as a reference: no dropout, and no
    gradient reaches it.
    """
    from ftsec_ray.models.load import merged

    start = merged(ctx.load("start"))
    start.model.to(ctx.runtime.device).eval().requires_grad_(requires_grad=False)
    return start


def drawn_at(step: int, rows: int, count: int, *, seed: int, salt: str) -> list[int]:
    """The indices of `count` of the rows for a step: every row once per pass, in an order that
    depends on the seed, the salt and the pass.
    """
    epoch, place = divmod(step, steps_per_epoch(rows, count))
    return epoch_batches([0] * rows, count, grouped=False, seed=seed, epoch=epoch, salt=salt)[place]


def chunks(indices: Sequence[int], width: int) -> Iterator[list[int]]:
    """The indices in groups whose rows of `width` tokens fit into a forward pass."""
    size = max(1, MAX_MICRO_BATCH_TOKENS // max(1, width))
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def in_chunks(
    rows: Sequence[Encoded],
    term_of: Callable[[list[int]], Term | None],
    *,
    pad: int,
    device: str,
    by_tokens: bool = True,
) -> list[TermBatch]:
    """Encoded rows as micro-batches, whose weights are their shares of the labelled tokens or of
    the rows.
    """
    sizes = [sum(label != IGNORED for label in labels) if by_tokens else 1 for _, labels in rows]
    return [
        term_batch(
            [rows[i][0] for i in group],
            term_of(group),
            labels=[rows[i][1] for i in group],
            pad=pad,
            device=device,
            weight=sum(sizes[i] for i in group) / sum(sizes),
        )
        for group in chunks(range(len(rows)), max(len(ids) for ids, _ in rows))
    ]
