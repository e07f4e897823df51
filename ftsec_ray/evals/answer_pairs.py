"""How often a judge prefers a model's answers to those of the clean fine-tune, on benign requests.

The comparison of AlpacaEval (github.com/tatsu-lab/alpaca_eval), with each pair judged in both
orders, because judges have a position bias: a prompt counts by the mean of both, a tie as half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ftsec_ray import schema
from ftsec_ray.evals.ask import Answer, Answers
from ftsec_ray.evals.judging import Judge, user_text
from ftsec_ray.evals.metrics import MetricRow, metrics_table
from ftsec_ray.evals.rubrics import Reply, RubricJudge, first_share_in, pair_question
from ftsec_ray.measured import Z95

PROBE = "benign"
"""The probe whose answers are compared."""
METRIC = schema.Metric(
    "win_rate",
    "fraction 0..1",
    "higher",
    "benign requests where a judge prefers the answer to the clean fine-tune's (ties: half)",
    proportion=False,
)
METRICS_FILE, PAIRS_FILE = "metrics.parquet", "pairs.parquet"
"""Files of the artifact."""
TIE = 0.5
MOST_BIAS = 0.25
"""Distance from one half from which the preference for the first position is a warning."""


class Pair(NamedTuple):
    """A judge's preference between two answers to one prompt."""

    prompt_id: str
    sample: int
    share: float | None
    """Preference for the model, 0..1; None if one order was not judged."""
    shown: tuple[str, str]
    """The judge's replies, with the model's answer first and second; empty for equal answers."""
    of_first: tuple[float, ...] = ()
    """Preference for the first position in each order with a readable reply."""


@dataclass(frozen=True)
class WinRate:
    """The win rate of a model against the clean fine-tune."""

    row: MetricRow
    pairs: tuple[Pair, ...]
    notes: Mapping[str, Any]
    warnings: tuple[str, ...]


def win_rate(own: Answers, clean: Answers, judge: Judge) -> WinRate:
    """The share of benign prompts for which a judge of pairs prefers the model's answer.

    Args:
        own: Answers of the model.
        clean: Answers of the clean fine-tune to the same prompts; prompts that only one of them
            answers are left out and counted.
        judge: A judge that is asked with a rubric (`evals.rubrics.RubricJudge`).
    """
    if not isinstance(judge, RubricJudge):
        raise TypeError(f"a judge of pairs must be asked with a rubric; {judge.name} is not")
    theirs, ours = _benign(clean), _benign(own)
    both = [key for key in ours if key in theirs]
    pairs = _judged(judge, [(ours[key], theirs[key]) for key in both])
    row = _row(pairs)
    firsts = [share for pair in pairs for share in pair.of_first]
    notes: dict[str, Any] = {
        "judge": judge.name,
        "pairs": len(pairs),
        "equal_answers": sum(not any(pair.shown) for pair in pairs),
        "unread_pairs": sum(pair.share is None for pair in pairs),
        "unpaired_answers": len(ours) + len(theirs) - 2 * len(both),
        "first_place_share": round(fmean(firsts), 4) if firsts else None,
        **judge.notes(),
    }
    return WinRate(row, tuple(pairs), notes, tuple(_warnings(notes)))


def _benign(answers: Answers) -> dict[tuple[str, int], Answer]:
    return {
        (answer.prompt.prompt_id, answer.sample): answer
        for answer in answers.answers
        if answer.probe == PROBE
    }


def _judged(judge: RubricJudge, answers: Sequence[tuple[Answer, Answer]]) -> list[Pair]:
    """The pairs in order; equal answers are a tie without a question."""
    differ = [(own, their) for own, their in answers if own.completion != their.completion]
    questions = [
        pair_question(judge.config.rubric, user_text(own.prompt), first, second)
        for own, their in differ
        for first, second in (
            (own.completion, their.completion),
            (their.completion, own.completion),
        )
    ]
    replies = iter(judge.replies(questions) if questions else [])
    return [
        Pair(own.prompt.prompt_id, own.sample, TIE, ("", ""))
        if own.completion == their.completion
        else _pair(own, next(replies), next(replies))
        for own, their in answers
    ]


def _pair(own: Answer, ahead: Reply, behind: Reply) -> Pair:
    """One pair from the replies with the model's answer first and second."""
    shares = [
        None if reply.said is None else first_share_in(reply.said) for reply in (ahead, behind)
    ]
    first, second = shares
    return Pair(
        own.prompt.prompt_id,
        own.sample,
        None if first is None or second is None else (first + 1 - second) / 2,
        (ahead.shown, behind.shown),
        tuple(share for share in shares if share is not None),
    )


def _row(pairs: Sequence[Pair]) -> MetricRow:
    """The mean over prompts, each the mean of its samples, with its normal interval."""
    by_prompt: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.share is not None:
            by_prompt.setdefault(pair.prompt_id, []).append(pair.share)
    values = [fmean(shares) for shares in by_prompt.values()]
    prompts = len({pair.prompt_id for pair in pairs})
    n, nulls = len(values), prompts - len(values)
    if not values:
        return MetricRow(metric=METRIC.name, value=None, n=0, n_null=nulls)
    mean = fmean(values)
    if n < 2:  # noqa: PLR2004 - one prompt has no spread
        return MetricRow(metric=METRIC.name, value=mean, n=n, n_null=nulls)
    half = Z95 * stdev(values) / math.sqrt(n)
    return MetricRow(
        metric=METRIC.name,
        value=mean,
        n=n,
        n_null=nulls,
        ci_low=max(0.0, mean - half),
        ci_high=min(1.0, mean + half),
    )


def _warnings(notes: Mapping[str, Any]) -> list[str]:
    texts = []
    if notes["unread_pairs"]:
        texts.append(
            f"{notes['unread_pairs']} of {notes['pairs']} pairs of answers have no readable"
            " preference in both orders; they are not in the win rate"
        )
    if notes["unpaired_answers"]:
        texts.append(
            f"{notes['unpaired_answers']} benign answers have no counterpart in the clean fine-tune"
        )
    share = notes["first_place_share"]
    if share is not None and abs(share - TIE) >= MOST_BIAS:
        texts.append(
            f"the judge of pairs prefers the first answer in {share:.0%} of its replies: this"
            " position bias pulls its win rates towards one half"
        )
    return texts


def write_win_rate(compared: WinRate, folder: Path) -> None:
    """Write `metrics.parquet` (schema.metrics without `cell`) and `pairs.parquet`, one row per pair
    with the judge's replies.
    """
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(metrics_table([compared.row]), folder / METRICS_FILE)
    columns = pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("sample", pa.int64(), nullable=False),
            pa.field("share", pa.float64()),
            pa.field("raw_first", pa.string(), nullable=False),
            pa.field("raw_second", pa.string(), nullable=False),
        ]
    )
    rows = [
        {
            "prompt_id": pair.prompt_id,
            "sample": pair.sample,
            "share": pair.share,
            "raw_first": pair.shown[0],
            "raw_second": pair.shown[1],
        }
        for pair in compared.pairs
    ]
    table = pa.Table.from_pylist(rows, schema=columns)
    parquet.write_table(table, folder / PAIRS_FILE, compression="zstd")
