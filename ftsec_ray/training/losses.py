"""Loss functions on tensors: pure, with shapes checked."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.training.setup import Batch, Step


def masked_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss over the positions whose label is not -100, in nats per token; nan if there is none.

    Shapes: logits (B, T, V) float; labels (B, T) int64, aligned with the inputs (shifted here) -> () float32.
    """
    assert labels.shape == logits.shape[:2], (logits.shape, labels.shape)
    return masked_nll_at(logits[:, :-1], labels[:, 1:])


def masked_nll_at(logits: Tensor, labels: Tensor) -> Tensor:
    """The same where each label stands under the logits that predict it already: (B, T, V), (B, T) -> () float32."""
    from torch.nn.functional import cross_entropy

    assert labels.shape == logits.shape[:2], (logits.shape, labels.shape)
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def response_nll(model: Any, batch: Batch, step: Step) -> Tensor:  # noqa: ANN401, ARG001
    """The plain objective: mean loss on response tokens of one micro-batch, in nats per token, () float32.

    Logits are made only at positions where some row of the batch has a response token: prompts outweigh responses, and a
    large vocabulary outweighs the model.
    """
    if "logits_to_keep" not in signature(_inner(model).forward).parameters:
        return masked_nll(model(**batch.inputs()).logits, batch.labels)
    asked = (batch.labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
    logits = model(**batch.inputs(), logits_to_keep=asked).logits
    # shifted already: a label stands under the logits that predict it
    return masked_nll_at(logits, batch.labels[:, asked + 1])


def _inner(model: Any) -> Any:  # noqa: ANN401
    return model.get_base_model() if hasattr(model, "get_base_model") else model
