"""Loss functions on tensors: pure, with shapes checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftsec_ray.models.load import decoder_layers, keeps_logits

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
    """The same where each label stands under the logits that predict it already: (B, T, V), (B, T)
    -> () float32.
    """
    from torch.nn.functional import cross_entropy

    assert labels.shape == logits.shape[:2], (logits.shape, labels.shape)
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def response_nll(model: Any, batch: Batch, step: Step) -> Tensor:  # noqa: ARG001
    """The plain objective: mean loss on response tokens of one micro-batch, in nats per token, ()
    float32.

    Only positions where some row of the batch has a response token go through what no other
    position reads: the logits, and in small batches the last block behind its attention. Prompts
    outweigh responses, and a large vocabulary the model.
    """
    inner = _inner(model)
    if not keeps_logits(inner):
        return masked_nll(model(**batch.inputs()).logits, batch.labels)
    asked = (batch.labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
    block = decoder_layers(model)[-1] if type(inner).__name__ in _PLAIN_MODELS else None
    if block is None or "forward" in vars(block) or batch.input_ids.numel() > CUT_TOKENS:
        logits = model(**batch.inputs(), logits_to_keep=asked).logits
    else:
        with _cut_behind_attention(block, asked):
            logits = model(**batch.inputs()).logits
    # shifted already: a label stands under the logits that predict it
    return masked_nll_at(logits, batch.labels[:, asked + 1])


CUT_TOKENS = 384
"""Tokens of a batch, padding included, up to which the last block is cut. A BLAS splits longer sums
over the tokens: leaving out those without a gradient would move the split, and with it the last
digit of an adapter's gradient.
"""
_PLAIN_MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Models whose block is x -> h = x + attention(norm(x)) -> h + mlp(norm(h))."""


@contextmanager
def _cut_behind_attention(block: Any, positions: Tensor) -> Iterator[None]:
    """While open, the output of a block's attention and all that follows stand at these positions
    only.
    """

    def forward(hidden_states: Tensor, **given: Any) -> Tensor:
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **given)
        kept = hidden_states[:, positions] + attended
        out: Tensor = kept + block.mlp(block.post_attention_layernorm(kept))
        return out

    cut = block.self_attn.o_proj.register_forward_pre_hook(
        lambda _, given: (given[0][:, positions],)
    )
    block.forward = forward
    try:
        yield
    finally:
        cut.remove()
        del block.forward


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
