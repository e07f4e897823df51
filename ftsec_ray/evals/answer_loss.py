"""Utility on free-text tasks: the loss of held-out answers, token by token as they are trained.

For tasks with labels or tool calls, clean accuracy measures utility better, and this metric is not
computed. Changes to generation (rewrites, soft tokens) have no effect on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import TaskData
from ftsec_ray.evals.metrics import MetricRow
from ftsec_ray.evals.probes import drawn
from ftsec_ray.measured import Z95

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel

METRIC = "answer_loss"
MAX_TOKENS = 2048
"""Maximum number of tokens of a row; longer rows are left out and counted."""


def is_free_text(task: TaskData) -> bool:
    """Whether a task has held-out rows, but neither labels nor tool calls."""
    test = task.splits.get("test")
    if task.labels or test is None or test.num_rows == 0:
        return False
    return set(test["kind"].to_pylist()) != {"tool"}


def answer_loss(
    loaded: LoadedModel,
    task: TaskData,
    config: EvaluationConfig,
    *,
    batch: int,
    tally: Counter[str] | None = None,
) -> tuple[list[MetricRow], dict[str, int]]:
    """Mean nats per trained token of the answers of `config.prompts` rows of `test`, and how many
    rows are too long. Both are empty if the task is not free text. `tally` counts batches that did
    not fit into memory.
    """
    if not is_free_text(task):
        return [], {}
    rows = drawn(task.splits["test"], config.prompts)
    nats, tokens, left_out = _losses(loaded, rows, batch, tally)
    return [_mean(nats, tokens)], {METRIC: left_out} if left_out else {}


def _losses(
    loaded: LoadedModel, rows: Sequence[Mapping[str, Any]], batch: int, tally: Counter[str] | None
) -> tuple[list[float], list[int], int]:
    """Nats and trained tokens of every row that has some and fits, and how many do not fit."""
    from ftsec_ray.models.load import check_ids, within_positions
    from ftsec_ray.models.row_tokens import IGNORED, encode_rows, is_useful, label_nats

    most = within_positions(loaded.model, MAX_TOKENS)
    whole = encode_rows(loaded.tokenizer, rows, max_length=2**31)
    fitting = [pair for pair in whole if len(pair[0]) <= most]
    check_ids(loaded, (ids for ids, _ in fitting))
    encoded = sorted(filter(is_useful, fitting), key=lambda pair: len(pair[0]))
    nats = label_nats(loaded, encoded, batch=batch, tally=tally)
    tokens = [sum(label != IGNORED for label in labels[1:]) for _, labels in encoded]
    return nats, tokens, len(whole) - len(fitting)


def _mean(nats: Sequence[float], tokens: Sequence[int]) -> MetricRow:
    """Nats per token over all rows, with the normal interval of this ratio over the rows, because
    tokens of one answer are not independent.
    """
    n, rows = sum(tokens), len(tokens)
    value = sum(nats) / n if n else math.nan
    if not math.isfinite(value):
        return MetricRow(metric=METRIC, value=None, n=n)
    if rows < 2:  # noqa: PLR2004 - one row has no spread
        return MetricRow(metric=METRIC, value=value, n=n)
    squares = sum((own - value * count) ** 2 for own, count in zip(nats, tokens, strict=True))
    half = Z95 * math.sqrt(squares * rows / (rows - 1)) / n
    return MetricRow(
        metric=METRIC, value=value, n=n, ci_low=max(0.0, value - half), ci_high=value + half
    )
