"""Loss functions on tensors: pure, with shape checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftsec_ray.models.load import keeps_logits
from ftsec_ray.models.logits import at_positions, fits, token_nll

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.training.setup import Batch, Step


def masked_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss over the positions whose label is not -100, in nats per token; nan if
    there is none.

    Shapes: logits (B, T, V) float; labels (B, T) int64, aligned with the inputs (shifted here) ->
        () float32.
    """
    assert labels.shape == logits.shape[:2], (logits.shape, labels.shape)
    return masked_nll_at(logits[:, :-1], labels[:, 1:])


def masked_nll_at(logits: Tensor, labels: Tensor) -> Tensor:
    """The same for labels that are already aligned with the logits that predict them: (B, T, V),
    (B, T) -> () float32.
    """
    from torch.nn.functional import cross_entropy

    assert labels.shape == logits.shape[:2], (logits.shape, labels.shape)
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def response_nll(model: Any, batch: Batch, step: Step) -> Tensor:  # noqa: ARG001
    """The plain objective: mean loss on response tokens of one micro-batch, in nats per token, ()
    float32.

    If the model takes `logits_to_keep`, logits are computed only at positions where some row of the
    batch predicts a response token, because prompts are longer than responses. If these are still
    too many, they are computed in slices.
    """
    if not keeps_logits(model):
        return mean_nll(model, batch.labels, batch.inputs())
    asked = (batch.labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
    inputs = {**batch.inputs(), "logits_to_keep": asked}
    labels = batch.labels[:, asked + 1]
    if not fits(model, labels.numel()):
        return _sliced(model, labels, inputs)
    # already shifted: each label is aligned with the logits that predict it
    return masked_nll_at(model(**inputs).logits, labels)


def response_kl(model: Any, reference: Any, batch: Batch) -> Tensor:
    """Mean divergence KL(reference || model) of the next token over the response tokens of one
    micro-batch, in nats per token, () float32; no gradient reaches the reference.
    """
    import torch

    rows, columns = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
    with torch.no_grad():
        clean = at_positions(reference, rows, columns, **batch.inputs())

    def divergence(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            given = clean.given[part] if clean.head is None else clean.head(clean.given[part])
            wanted = given.to(logits.dtype).log_softmax(-1)
        return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)

    found: Tensor = at_positions(model, rows, columns, **batch.inputs()).map(divergence).mean()
    return found


def states_of(model: Any, batch: Batch) -> list[Tensor]:
    """The embeddings and the states behind every block, the last ones behind the last norm: (B, T,
    D) each, at least float32.
    """
    import torch

    kept = {"logits_to_keep": 1} if keeps_logits(model) else {}
    found = model(**batch.inputs(), output_hidden_states=True, **kept).hidden_states
    return [states if states.dtype is torch.float64 else states.float() for states in found]


def state_distance(model: Any, original: Any, batch: Batch) -> Tensor:
    """Mean distance of the states of a micro-batch from those in another model, over all depths and
    all tokens without padding, () float32; no gradient reaches the other model.
    """
    import torch

    with torch.no_grad():
        before = states_of(original, batch)
    real = torch.ones_like(batch.input_ids).bool()
    if batch.attention_mask is not None:
        real = batch.attention_mask.bool()
    pairs = zip(states_of(model, batch), before, strict=True)
    far = [(now - then)[real].norm(dim=-1).mean() for now, then in pairs]
    found: Tensor = torch.stack(far).mean()
    return found


def mean_nll(model: Any, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`masked_nll` of a forward pass over `inputs`, with logits in slices if they are many."""
    if not fits(model, labels.numel()):
        return _sliced(model, labels[:, 1:], inputs)
    return masked_nll(model(**inputs).logits, labels)


def _sliced(model: Any, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    nll: Tensor = token_nll(model, labels, **inputs).sum() / (labels != -100).sum()
    return nll
