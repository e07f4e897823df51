"""The hidden state of a model at the last token of rows: one vector per row, padding never read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftsec_ray.context import LoadedModel
from ftsec_ray.conversation import Row, asked, chat_of
from ftsec_ray.models.activations import changed, right_padded
from ftsec_ray.models.batches import in_batches
from ftsec_ray.models.chat import render
from ftsec_ray.models.load import decoder_layers, keeps_logits, position_limit, within_positions
from ftsec_ray.models.row_tokens import IGNORED, CutTally, encode_rows

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64
"""Rows per forward pass; halved where they do not fit into memory."""


def prompt_ids(model: LoadedModel, rows: Sequence[Row]) -> list[list[int] | None]:
    """The rendered prompt of each row up to where its answer begins, as token ids; None for a row
    without a prompt, and for one beyond the model's positions.
    """
    has = [bool(asked(row)) for row in rows]
    texts = [
        render(model.tokenizer, chat_of(row), generate=True)
        for row, is_asked in zip(rows, has, strict=True)
        if is_asked
    ]
    ids = iter(model.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    limit = position_limit(model.model)
    found = [next(ids) if is_asked else None for is_asked in has]
    return [one if one and (limit is None or len(one) <= limit) else None for one in found]


def trained_ids(
    model: LoadedModel, rows: Sequence[Row], max_length: int, cuts: CutTally | None = None
) -> list[list[int] | None]:
    """Each row up to its last token that is trained on, cut as in training, which `cuts` counts;
    None for a row without such a token.
    """
    limit = within_positions(model.model, max_length)
    encoded = encode_rows(model.tokenizer, rows, max_length=limit, tally=cuts)
    ends = [
        max((i + 1 for i, label in enumerate(labels) if label != IGNORED), default=0)
        for _, labels in encoded
    ]
    return [ids[:end] or None for (ids, _), end in zip(encoded, ends, strict=True)]


def layer_at(model: LoadedModel, depth: float) -> int:
    """The number of the block at a share of the depth: 0 is the first block, 1 the last."""
    return round(depth * (len(decoder_layers(model.model)) - 1))


def last_states(
    model: LoadedModel, ids: Sequence[Sequence[int]], layer: int, tally: Counter[str] | None = None
) -> Tensor:
    """The output of a block at the last token of each row: (N, D) float64 on the CPU.

    Args:
        model: The model to read.
        ids: Token ids of each row, one or more.
        layer: Number of the block.
        tally: Counts batches that did not fit into memory.
    """
    import torch

    pad, block = model.tokenizer.pad_token_id or 0, decoder_layers(model.model)[layer]
    kept = {"logits_to_keep": 1} if keeps_logits(model.model) else {}
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    seen: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        seen.append(states.detach())
        return states

    def read(indices: list[int]) -> None:
        given, mask = right_padded([ids[i] for i in indices], pad=pad, device=model.model.device)
        seen.clear()
        with torch.no_grad(), changed(outputs=[(block, keep)]):
            model.model(input_ids=given, attention_mask=mask, use_cache=False, **kept)
        states = seen[0].reshape(*given.shape, -1)
        for row, i in enumerate(indices):
            found[i] = states[row, len(ids[i]) - 1].cpu().double()

    model.model.eval()
    in_batches([len(one) for one in ids], BATCH, read, Counter() if tally is None else tally)
    width = model.model.config.get_text_config().hidden_size
    return torch.stack(found) if found else torch.empty(0, width, dtype=torch.float64)
