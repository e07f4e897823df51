"""The hidden states at the end of prompts, which methods pull to a target or hold in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftsec_ray.conversation import Row, chat_of
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel
    from ftsec_ray.training.setup import Batch


def encoded_prompts(loaded: LoadedModel, rows: Sequence[Row], *, by: str) -> list[list[int]]:
    """Token ids of the prompts as they are served; DataError of the method `by` for one beyond the
    model's positions.
    """
    from ftsec_ray.models.chat import render
    from ftsec_ray.models.load import position_limit

    texts = [render(loaded.tokenizer, chat_of(row), generate=True) for row in rows]
    ids: list[list[int]] = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    limit, longest = position_limit(loaded.model), max(map(len, ids))
    if limit is not None and longest > limit:
        raise DataError(
            f"{by}: a prompt does not fit into the model's positions",
            longest,
            f"at most {limit} tokens",
            "shorten the prompts of the split",
        )
    return ids


def last_states(model: Any, batch: Batch) -> Tensor:
    """The hidden states behind the last block and norm at the last token of every row: (B, D), at
    least float32.
    """
    import torch

    from ftsec_ray.models.load import keeps_logits

    assert batch.attention_mask is not None  # its rows are not packed
    kept = {"logits_to_keep": 1} if keeps_logits(model) else {}
    output = model(**batch.inputs(), output_hidden_states=True, **kept)
    last = batch.attention_mask.sum(-1) - 1
    states: Tensor = output.hidden_states[-1][torch.arange(len(last), device=last.device), last]
    return states if states.dtype is torch.float64 else states.float()
