"""Prompts in batches: sorted by length, padded on the left, optionally with soft tokens."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.errors import is_out_of_memory
from ftsec_ray.models.load import check_ids, whole_model

if TYPE_CHECKING:
    from torch import Tensor

Pieces = tuple[list[int], list[int]]
"""Token ids of a prompt before and after the soft tokens."""


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts, as token ids."""

    pieces: Sequence[Pieces]
    soft: Any = None
    """Embeddings (K, D) between the two pieces of every prompt; None: no soft tokens."""

    def lengths(self) -> list[int]:
        """Tokens of every prompt, including soft tokens."""
        between = 0 if self.soft is None else len(self.soft)
        return [len(head) + between + len(tail) for head, tail in self.pieces]

    def at(self, indices: Sequence[int]) -> Prompts:
        """Some of the prompts, in the order of the indices."""
        return Prompts([self.pieces[i] for i in indices], self.soft)


def left_padded(loaded: LoadedModel, prompts: Prompts) -> dict[str, Tensor]:
    """Inputs of a forward pass: token ids, or embeddings if there are soft tokens, and the
    attention mask.
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


HALVED = "batches_halved"
"""Counted when a batch did not fit into memory."""


def in_batches(
    lengths: Sequence[int],
    batch: int,
    work: Callable[[list[int]], None],
    tally: Counter[str],
) -> None:
    """Call `work` with the indices of batches of similar length, the shortest first.

    A batch that does not fit into memory is repeated in halves, and later batches, which are at
    least as long, use the smaller size too; `tally` counts how often the size was halved.

    Raises:
        MemoryError, RuntimeError: When a single item does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    done = 0
    while done < len(order):
        indices = order[done : done + batch]
        try:
            work(indices)
        except (MemoryError, RuntimeError) as error:
            if len(indices) == 1 or not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)  # they hold the tensors that did not fit
            batch = (len(indices) + 1) // 2
            tally[HALVED] += 1
        else:
            done += len(indices)
            continue
        _release()


def _release() -> None:
    """Free memory that is held but not in use."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
