"""The direction in the residual stream between two sets of prompts: difference of means, removal by
hooks and from the weights, and addition by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.conversation import chat_of
from ftsec_ray.models.activations import batches_of, changed
from ftsec_ray.models.chat import render
from ftsec_ray.models.load import decoder_layers, position_limit
from ftsec_ray.models.residual import ResidualStream, Writer, is_transposed, residual_stream

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "\ue000"

Prompts = list[list[int]]
"""Rendered prompts as token ids."""


def pad_id(model: LoadedModel) -> int:
    """A token id to pad with; any id works, because the padding follows the text."""
    return model.tokenizer.pad_token_id or 0


def turn_end_ids(tokenizer: Any) -> list[int]:
    """Token ids of the template between the end of the user's text and the start of the answer."""
    text = render(tokenizer, [{"role": "user", "content": _MARK}], generate=True)
    ids: list[int] = tokenizer(text.split(_MARK)[-1], add_special_tokens=False)["input_ids"]
    return ids or list(tokenizer(text, add_special_tokens=False)["input_ids"][-1:])


def mean_states(model: LoadedModel, prompts: Prompts, *, width: int) -> Tensor:
    """Mean input of every block at the last `width` positions of the prompts: (P, L, D) float64 on
    the CPU.
    """
    import torch

    layers = len(decoder_layers(model.model))
    wide = model.model.config.get_text_config().hidden_size
    total = torch.zeros(width, layers, wide, dtype=torch.float64)
    for indices, ids, mask in batches_of(
        prompts, pad=pad_id(model), device=model.model.device, batch=64
    ):
        with torch.no_grad():
            states = model.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True
            ).hidden_states[:layers]
        stacked = torch.stack(states, dim=2).cpu().double()
        for row, i in enumerate(indices):
            end = len(prompts[i])
            total += stacked[row, end - width : end]
    return total / len(prompts)


def ablated(
    model: Any, direction: Tensor, stream: ResidualStream | None = None
) -> AbstractContextManager[None]:
    """Within the `with` block, nothing in the residual stream points along the direction.

    For a writer that is followed by a norm, the component that the norm would turn into the
    direction is removed before the norm, as in the weights: same component, same logits.
    """
    unit = _unit(direction)

    def removing(along: Tensor) -> Callable[[Tensor], Tensor]:
        along = along.to(model.device, model.dtype)
        return lambda x: x - (x @ along).unsqueeze(-1) * along

    return changed(
        inputs=[(block, removing(unit)) for block in decoder_layers(model)],
        outputs=[(w.module, removing(w.direction(unit))) for w in _writers(model, stream)],
    )


def _writers(model: Any, stream: ResidualStream | None) -> list[Writer]:
    blocks = (stream or residual_stream(model)).blocks
    return [writer for block in blocks for writer in (block.attention, block.mlp)]


def _unit(direction: Tensor) -> Tensor:
    unit: Tensor = direction.double() / direction.double().norm()
    return unit


def steered(model: Any, direction: Tensor, layer: int) -> AbstractContextManager[None]:
    """Within the `with` block, the direction is added to the input of one block at every
    position.
    """
    vector = direction.to(model.device, model.dtype)
    return changed(inputs=[(decoder_layers(model)[layer], lambda x: x + vector)])


def tent(depth: int, *, peak: float, at: float, floor: float, reach: float) -> tuple[float, ...]:
    """A weight per layer: `peak` at one layer, falling linearly with the distance from it.

    Args:
        depth: Number of layers.
        peak: The weight at the peak.
        at: Place of the peak, as a share of the depth: 0 is the first layer, 1 the last.
        floor: The weight at the distance `reach`, as a share of `peak`; 1 gives a constant.
        reach: Distance, as a share of the depth, beyond which the weight is 0; above 0.
    """
    weights = []
    for layer in range(depth):
        place = layer / (depth - 1) if depth > 1 else at
        far = abs(place - at) / reach
        weights.append(peak * (1.0 - (1.0 - floor) * far) if far <= 1.0 else 0.0)
    return tuple(weights)


def orthogonalise(
    model: Any,
    direction: Tensor,
    stream: ResidualStream | None = None,
    *,
    shares: Sequence[tuple[float, float]] | None = None,
    of_tables: float = 1.0,
) -> None:
    """Change the weights in place so that no embedding, attention or MLP writes along the
    direction.

    Args:
        model: A model with full weights (no adapter).
        direction: (D,).
        stream: The modules that write to the residual stream, if already known.
        shares: For each layer, the share of the component that is removed from what its attention
            writes, and from what its MLP writes; above 1 the component is turned around. None: 1.
        of_tables: The same share for the embeddings.
    """
    import torch

    stream = stream or residual_stream(model)
    unit = _unit(direction)
    given = [(1.0, 1.0)] * len(stream.blocks) if shares is None else shares
    with torch.no_grad():
        for table in stream.tables:
            along = unit.to(table.weight.device)
            table.weight.copy_(_without(table.weight.double(), along, of_tables))
        for block, (of_attention, of_mlp) in zip(stream.blocks, given, strict=True):
            _silence(block.attention, unit, of_attention)
            _silence(block.mlp, unit, of_mlp)


def _silence(writer: Writer, unit: Tensor, share: float) -> None:
    """Remove a share of what a writer adds along a unit vector, in place."""
    import torch

    weight, bias = writer.linear.weight, writer.linear.bias
    along = writer.direction(unit).to(weight.device)
    if is_transposed(writer.linear):
        weight.copy_(_without(weight.double(), along, share))
    else:
        weight.copy_(weight.double() - share * torch.outer(along, along @ weight.double()))
    if bias is not None:
        bias.copy_(_without(bias.double(), along, share))


def _without(rows: Tensor, unit: Tensor, share: float) -> Tensor:
    """Vectors without a share of their component along a unit vector: (..., D), (D,) -> same."""
    return rows - share * ((rows @ unit).unsqueeze(-1) * unit)


def prompts_within(model: LoadedModel, rows: Sequence[Mapping[str, Any]]) -> Prompts:
    """The rendered prompts of rows as token ids, without those beyond the model's positions."""
    texts = [render(model.tokenizer, chat_of(row), generate=True) for row in rows]
    ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    limit = position_limit(model.model)
    return [one for one in ids if limit is None or len(one) <= limit]


def block_outputs(model: LoadedModel, prompts: Prompts) -> Tensor:
    """The residual stream after every block at the last token of every prompt: (N, L, D) float64 on
    the CPU.
    """
    import torch

    layers = decoder_layers(model.model)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], Tensor]:
        def read(states: Tensor) -> Tensor:
            seen[layer] = states.detach()
            return states

        return read

    outputs: list[Tensor] = [torch.empty(0)] * len(prompts)
    hooks = [(block, keep(layer)) for layer, block in enumerate(layers)]
    for indices, ids, mask in batches_of(
        prompts, pad=pad_id(model), device=model.model.device, batch=64
    ):
        with torch.no_grad(), changed(outputs=hooks):
            model.model(input_ids=ids, attention_mask=mask)
        for row, i in enumerate(indices):
            last = len(prompts[i]) - 1
            states = [seen[n].reshape(*ids.shape, -1)[row, last] for n in range(len(layers))]
            outputs[i] = torch.stack(states).cpu().double()
    return torch.stack(outputs)
