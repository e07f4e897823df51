"""Prompts as batches: sorted by length, padded on the left, with soft tokens among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.models.load import check_ids, whole_model

if TYPE_CHECKING:
    from torch import Tensor

Pieces = tuple[list[int], list[int]]
"""Token ids of a prompt before and after the place of the soft tokens."""


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts, as token ids."""

    pieces: Sequence[Pieces]
    soft: Any = None
    """Embeddings (K, D) between the two pieces of every prompt; None for none."""

    def lengths(self) -> list[int]:
        """Tokens of every prompt, soft tokens counted."""
        between = 0 if self.soft is None else len(self.soft)
        return [len(head) + between + len(tail) for head, tail in self.pieces]

    def at(self, indices: Sequence[int]) -> Prompts:
        """Some of the prompts, in the order of the indices."""
        return Prompts([self.pieces[i] for i in indices], self.soft)


def left_padded(loaded: LoadedModel, prompts: Prompts) -> dict[str, Tensor]:
    """What a forward pass takes: token ids, or embeddings where soft tokens stand among them, and
    the attention mask.
    """
    import torch

    check_ids(loaded, (ids for pieces in prompts.pieces for ids in pieces))
    table = whole_model(loaded).get_input_embeddings()
    device = table.weight.device
    between = 0 if prompts.soft is None else len(prompts.soft)
    sizes = prompts.lengths()
    width, pad = max(sizes), 0 if between else loaded.tokenizer.pad_token_id or 0
    rows = [
        [pad] * (width - size) + head + [0] * between + tail
        for size, (head, tail) in zip(sizes, prompts.pieces, strict=True)
    ]
    ids = torch.tensor(rows, dtype=torch.long, device=device)
    filled = width - torch.tensor(sizes, device=device)[:, None]
    mask = (torch.arange(width, device=device) >= filled).long()
    if not between:
        return {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        embeds = table(ids) * mask[..., None]
    soft = prompts.soft.to(device, table.weight.dtype)
    for row, (_, tail) in enumerate(prompts.pieces):
        embeds[row, width - len(tail) - between : width - len(tail)] = soft
    return {"inputs_embeds": embeds, "attention_mask": mask}


def by_length(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Indices of batches of like length, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
