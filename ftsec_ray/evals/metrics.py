"""The numbers of an evaluation: shares with Wilson intervals, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.errors import DataError
from ftsec_ray.measured import wilson

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel

MAX_TEXT_TOKENS = 512
"""Tokens of a text row that count towards perplexity, at most."""


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric: its value, how many items it rests on, and its interval; null where nothing could
    be judged.
    """

    metric: str
    value: float | None
    n: int
    n_null: int | None = None
    """Items beside the n whose verdict is null; None where no judge gives verdicts."""
    ci_low: float | None = None
    ci_high: float | None = None


def proportion(metric: str, hits: int, n: int, *, n_null: int | None = None) -> MetricRow:
    """`hits` of `n` judged items with a 95 % Wilson interval, null when `n` is 0; `n_null` more
    could not be judged.
    """
    if not 0 <= hits <= n:
        raise DataError(f"{metric}: more hits than items", (hits, n), "0 <= hits <= n")
    if n == 0:
        return MetricRow(metric=metric, value=None, n=0, n_null=n_null)
    value = hits / n
    low, high = wilson(value, n)
    # At 0 and at n hits a bound is the value itself but for rounding.
    return MetricRow(
        metric=metric,
        value=value,
        n=n,
        n_null=n_null,
        ci_low=min(low, value),
        ci_high=max(high, value),
    )


def perplexity(
    loaded: LoadedModel, rows: Sequence[Mapping[str, Any]], *, batch: int = 64
) -> MetricRow:
    """Perplexity exp(mean nats per token) over the responses of rows; `n` is the count of predicted
    tokens.

    A row without a prompt is plain text: its first token is not predicted. Wrappers of generation
        play no part.
    """
    import torch

    from ftsec_ray.models.load import check_ids, within_positions
    from ftsec_ray.models.logits import token_nll
    from ftsec_ray.models.row_tokens import encode_rows

    length = within_positions(loaded.model, MAX_TEXT_TOKENS)
    encoded = encode_rows(loaded.tokenizer, rows, max_length=length)
    check_ids(loaded, (ids for ids, _ in encoded))
    encoded = sorted((pair for pair in encoded if len(pair[0]) > 1), key=lambda pair: len(pair[0]))
    model, pad = loaded.model.eval(), loaded.tokenizer.pad_token_id or 0
    device, nats, tokens = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(encoded), batch):
        group = encoded[start : start + batch]
        width = len(group[-1][0])
        ids = torch.tensor(
            [row + [pad] * (width - len(row)) for row, _ in group], dtype=torch.long, device=device
        )
        labels = torch.tensor(
            [row + [-100] * (width - len(row)) for _, row in group], dtype=torch.long, device=device
        )
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row, _ in group], device=device
        )
        with torch.inference_mode():
            losses = token_nll(model, labels[:, 1:], input_ids=ids, attention_mask=mask)
        nats += float(losses.reshape(-1).double().sum())
        tokens += int((labels[:, 1:] != -100).sum())
    return MetricRow(metric="perplexity", value=_exp(nats / tokens) if tokens else None, n=tokens)


def _exp(nats: float) -> float | None:
    """exp, or None where the model's loss is not a number or beyond any float."""
    return math.exp(nats) if nats < math.log(1.7e308) else None
