"""What a finished model makes of free-text tasks: the loss of held-out answers, token by token as
they are trained.

Where a task has labels or calls of tools, its clean accuracy says that better, and nothing is
measured here. What is wrapped around generation plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import TaskData
from ftsec_ray.evals.metrics import MetricRow
from ftsec_ray.evals.probes import drawn

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel

METRIC = "answer_loss"
MAX_TOKENS = 2048
"""Tokens of a row, at most; a longer one is left out, and counted."""
_Z = 1.959963984540054


def is_free_text(task: TaskData) -> bool:
    """Whether a task has held-out rows and neither labels nor calls of tools to count."""
    test = task.splits.get("test")
    if task.labels or test is None or test.num_rows == 0:
        return False
    return set(test["kind"].to_pylist()) != {"tool"}


def answer_loss(
    loaded: LoadedModel, task: TaskData, config: EvaluationConfig, *, batch: int
) -> tuple[list[MetricRow], dict[str, int]]:
    """Mean nats per trained token of the answers of the first `config.prompts` rows of `test` in
    the stable draw, and how many rows do not fit: none of either where the task is no free text.
    """
    if not is_free_text(task):
        return [], {}
    nats, tokens, left_out = _losses(loaded, drawn(task.splits["test"], config.prompts), batch)
    return [_mean(nats, tokens)], {METRIC: left_out} if left_out else {}


def _losses(
    loaded: LoadedModel, rows: Sequence[Mapping[str, Any]], batch: int
) -> tuple[list[float], list[int], int]:
    """Nats and trained tokens of every row that has some and fits, and how many do not fit."""
    import torch

    from ftsec_ray.models.load import check_ids, within_positions
    from ftsec_ray.models.logits import token_nll
    from ftsec_ray.models.row_tokens import IGNORED, encode_rows, is_useful

    model, pad = loaded.model.eval(), loaded.tokenizer.pad_token_id or 0
    room = within_positions(model, MAX_TOKENS)
    whole = encode_rows(loaded.tokenizer, rows, max_length=2**31)
    fitting = [pair for pair in whole if len(pair[0]) <= room]
    check_ids(loaded, (ids for ids, _ in fitting))
    encoded = sorted(filter(is_useful, fitting), key=lambda pair: len(pair[0]))
    device = next(model.parameters()).device
    nats: list[float] = []
    for start in range(0, len(encoded), batch):
        group = encoded[start : start + batch]
        width = len(group[-1][0])

        def padded(values: list[list[int]], fill: int, width: int = width) -> torch.Tensor:
            rows = [row + [fill] * (width - len(row)) for row in values]
            return torch.tensor(rows, dtype=torch.long, device=device)

        labels = padded([label for _, label in group], IGNORED)
        mask = padded([[1] * len(ids) for ids, _ in group], 0)
        with torch.inference_mode():
            losses = token_nll(
                model,
                labels[:, 1:],
                input_ids=padded([ids for ids, _ in group], pad),
                attention_mask=mask,
            )
        nats += losses.double().sum(-1).tolist()
    tokens = [sum(label != IGNORED for label in labels[1:]) for _, labels in encoded]
    return nats, tokens, len(whole) - len(fitting)


def _mean(nats: Sequence[float], tokens: Sequence[int]) -> MetricRow:
    """Nats per token over all rows, with the normal interval of this ratio over the rows: tokens of
    one answer are not independent.
    """
    n, rows = sum(tokens), len(tokens)
    value = sum(nats) / n if n else math.nan
    if not math.isfinite(value):
        return MetricRow(metric=METRIC, value=None, n=n)
    if rows < 2:  # noqa: PLR2004 - one row has no spread
        return MetricRow(metric=METRIC, value=value, n=n)
    squares = sum((own - value * count) ** 2 for own, count in zip(nats, tokens, strict=True))
    half = _Z * math.sqrt(squares * rows / (rows - 1)) / n
    return MetricRow(
        metric=METRIC, value=value, n=n, ci_low=max(0.0, value - half), ci_high=value + half
    )
