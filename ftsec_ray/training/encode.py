"""From rows to batches: the rows of step `i` are a pure function of (rows, config, seed, i).

`length_grouped` shuffles the rows, sorts each window of eight batches by length and shuffles the
batches; `packed` concatenates the rows of a batch into one sequence, with positions that restart
for each row (no attention across rows); `shuffled` only shuffles.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ftsec_ray.errors import DataError
from ftsec_ray.identity import digest
from ftsec_ray.models.row_tokens import CutTally, Encoded, encode_rows, is_useful
from ftsec_ray.training.setup import Batch

if TYPE_CHECKING:
    import pyarrow as pa

MAX_MICRO_BATCH_TOKENS = 16_384
"""Padded tokens per forward pass if no micro-batch is given."""


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of one pass; the last batch may be smaller."""
    return math.ceil(rows / batch_size)


def epoch_batches(
    lengths: Sequence[int], batch_size: int, *, grouped: bool, seed: int, epoch: int, salt: str = ""
) -> list[list[int]]:
    """Row indices of every batch of one epoch; each row exactly once."""
    rng = random.Random(int(digest(["epoch", seed, epoch, salt]), 16))  # noqa: S311
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if grouped:
        window = 8 * batch_size
        order = [
            i
            for start in range(0, len(order), window)
            for i in sorted(order[start : start + window], key=lambda i: lengths[i])
        ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if grouped:
        rng.shuffle(batches)
    return batches


def encode_table(
    tokenizer: Any, rows: pa.Table, *, max_length: int, tally: CutTally | None = None
) -> list[Encoded]:
    """Encode rows for training; DataError if no row has a token to train on, `tally` counts the
    rows without one.
    """
    encoded = encode_rows(tokenizer, rows.to_pylist(), max_length=max_length, tally=tally)
    useful = [pair for pair in encoded if is_useful(pair)]
    if not useful:
        raise DataError(
            "no row has a response token within training.max_length",
            max_length,
            "at least one row whose prompt is shorter than that",
            "raise training.max_length or shorten the prompts",
        )
    return useful


def batcher(
    tokenizer: Any,
    encoded: list[Encoded],
    *,
    batch_size: int,
    batching: str,
    seed: int,
    salt: str = "",
    micro_batch: int | None = None,
    device: str = "cpu",
) -> Callable[[int], list[Batch]]:
    """The `batch_at` of a fine-tune: step number -> its micro-batches."""
    lengths = [len(ids) for ids, _ in encoded]
    per_epoch = steps_per_epoch(len(encoded), batch_size)

    @lru_cache(maxsize=2)
    def epoch_of(epoch: int) -> list[list[int]]:
        return epoch_batches(
            lengths,
            batch_size,
            grouped=batching == "length_grouped",
            seed=seed,
            epoch=epoch,
            salt=salt,
        )

    def batch_at(step: int) -> list[Batch]:
        chosen = [encoded[i] for i in epoch_of(step // per_epoch)[step % per_epoch]]
        size = micro_batch or max(1, MAX_MICRO_BATCH_TOKENS // max(len(ids) for ids, _ in chosen))
        groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        counts = [
            sum(label != -100 for _, labels in group for label in labels[1:]) for group in groups
        ]
        build = _packed if batching == "packed" else _padded
        return [
            build(group, tokenizer.pad_token_id or 0, count / sum(counts), device)
            for group, count in zip(groups, counts, strict=True)
            if count
        ]

    return batch_at


def _padded(rows: list[Encoded], pad: int, weight: float, device: str) -> Batch:
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows], device=device)
    labels = torch.tensor(
        [labels + [-100] * (width - len(labels)) for _, labels in rows], device=device
    )
    mask = torch.tensor(
        [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device
    )
    return Batch(ids, labels, mask, None, weight)


def _packed(rows: list[Encoded], pad: int, weight: float, device: str) -> Batch:  # noqa: ARG001
    import torch

    ids = torch.tensor([[token for ids, _ in rows for token in ids]], device=device)
    # the first token of a row must not be predicted from the previous row
    labels = torch.tensor([[label for _, row in rows for label in [-100, *row[1:]]]], device=device)
    positions = torch.tensor([[p for ids, _ in rows for p in range(len(ids))]], device=device)
    return Batch(ids, labels, None, positions, weight)
