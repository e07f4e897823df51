"""The metrics of an evaluation: shares with Wilson intervals, and perplexity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.errors import DataError
from ftsec_ray.measured import wilson

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import LoadedModel

MAX_TEXT_TOKENS = 512
"""Maximum number of tokens of a text row that count for perplexity."""


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric: its value, the number of items, and its interval; null if nothing could be
    judged.
    """

    metric: str
    value: float | None
    n: int
    n_null: int | None = None
    """Items with a null verdict, not in `n`; None if no judge gives verdicts."""
    ci_low: float | None = None
    ci_high: float | None = None


def proportion(
    metric: str, hits: int, n: int, *, n_null: int | None = None, prompts: int | None = None
) -> MetricRow:
    """`hits` of `n` judged answers with a 95 % Wilson interval, null if `n` is 0; `n_null` more
    could not be judged.

    If prompts have several answers, `prompts` is the number of prompts; it is then the n of the row
    and of the interval. Answers to one prompt are not independent, so the number of prompts is the
    safe lower bound of the number of items.
    """
    if not 0 <= hits <= n:
        raise DataError(f"{metric}: more hits than items", (hits, n), "0 <= hits <= n")
    items = n if prompts is None else prompts
    if n == 0:
        return MetricRow(metric=metric, value=None, n=0, n_null=n_null)
    value = hits / n
    low, high = wilson(value, items)
    # With 0 or n hits, one bound equals the value except for rounding.
    return MetricRow(
        metric=metric,
        value=value,
        n=items,
        n_null=n_null,
        ci_low=min(low, value),
        ci_high=max(high, value),
    )


def metrics_table(rows: Iterable[MetricRow]) -> pa.Table:
    """Metrics as a table: schema.metrics without `cell`, which the results add."""
    import pyarrow as pa

    kept = pa.schema([column for column in schema.metrics() if column.name != "cell"])
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=kept)


def perplexity(
    loaded: LoadedModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch: int = 64,
    tally: Counter[str] | None = None,
) -> MetricRow:
    """Perplexity exp(mean nats per token) over the responses of rows; `n` is the number of
    predicted tokens.

    A row without a prompt is plain text: its first token is not predicted. Changes to generation
    have no effect. `tally` counts batches that did not fit into memory.
    """
    from ftsec_ray.models.load import check_ids, within_positions
    from ftsec_ray.models.row_tokens import IGNORED, encode_rows, label_nats

    length = within_positions(loaded.model, MAX_TEXT_TOKENS)
    encoded = encode_rows(loaded.tokenizer, rows, max_length=length)
    check_ids(loaded, (ids for ids, _ in encoded))
    encoded = [pair for pair in encoded if len(pair[0]) > 1]
    nats = label_nats(loaded, encoded, batch=batch, tally=tally)
    tokens = sum(label != IGNORED for _, labels in encoded for label in labels[1:])
    value = _exp(math.fsum(nats) / tokens) if tokens else None
    return MetricRow(metric="perplexity", value=value, n=tokens)


def _exp(nats: float) -> float | None:
    """The exponential, or None if the loss is not a number or the result overflows."""
    return math.exp(nats) if nats < math.log(1.7e308) else None
