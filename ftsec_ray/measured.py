"""A measured value with what it rests on, of one run or over the seeds of a point.

Over prompts: the Wilson interval at one seed's number of prompts. All seeds answer the same
prompts, so that counting each prompt once per seed would promise a precision that is not there.

Over seeds: the t interval on the seeds' values, from two seeds on. A bootstrap that resamples seeds
has three values to draw from when there are three, cannot leave their range and is far too narrow;
t at two degrees of freedom is wide because so little is known. With many seeds the two agree, since
the mean of many is nearly normal, so that t serves for any number. One seed has no such spread, and
everything that shows it says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

Interval = tuple[float, float]
Nulls = tuple[int, int]
"""Answers that no judge could place, and all answers asked for."""
CLEAN = ("cacc", "benign_rate")
"""What says whether a model still does its work; the first of them that was measured."""
UTILITY_NAMES = (
    "clean accuracy · over-refusal · coherent answers (· no answer, where it is counted)"
)
"""What the text of a utility holds."""
NO_ANSWER = "no_answer_rate"
Z95 = 1.959963984540054
"""Standard errors on either side of a 95 % normal interval."""


class Utility(NamedTuple):
    """Utility of a cell, or the mean over several; None where it was not measured."""

    clean: float | None
    """Clean accuracy, or the share of benign requests answered right where a task has none."""
    over_refusal: float | None
    coherent: float | None
    no_answer: float | None = None
    """Share of forbidden requests without an answer; None where no judge counts them."""

    @property
    def text(self) -> str:
        """The three numbers, and the fourth where there is one."""
        shown = self[:3] if self.no_answer is None else self
        return " · ".join("–" if value is None else f"{value:.2f}" for value in shown)


UNKNOWN = Utility(None, None, None)


def utility_metrics(measured: Collection[str]) -> tuple[str, ...]:
    """What stands beside every safety metric, of what was measured: clean accuracy, or right
    answers to benign requests where there is none; over-refusal; coherence; and the share of
    requests without an answer where it was counted.
    """
    clean = next((metric for metric in CLEAN if metric in measured), CLEAN[-1])
    more = (NO_ANSWER,) if NO_ANSWER in measured else ()
    return clean, "over_refusal_rate", "coherent_rate", *more


def mean_utility(found: Iterable[Utility]) -> Utility:
    """The mean of each number over those that have it."""
    columns = [
        [value for value in column if value is not None] for column in zip(*found, strict=True)
    ]
    return Utility(*(fmean(known) if known else None for known in columns)) if columns else UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Count:
    """Hits among the judged answers of one run."""

    hits: int
    n: int
    n_null: int = 0
    """Answers beside them that could not be judged."""

    @property
    def value(self) -> float | None:
        """The share; None where nothing was judged."""
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> Interval | None:
        """Its 95 % Wilson interval."""
        return wilson(self.hits / self.n, self.n) if self.n else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The value of a metric: of one run, or the mean over the seeds of a point."""

    value: float
    n: int | None = None
    """Judged items of one seed, the smallest of the seeds; None for values that are no shares."""
    n_null: int | None = None
    """Null verdicts of one seed, the largest of the seeds; None where no judge gives verdicts, and
    in results that did not count them.
    """
    seeds: int = 1
    prompts: Interval | None = None
    """95 % over prompts; None where the metric is no share."""
    over_seeds: Interval | None = None
    """95 % over seeds; None with one seed."""
    nulls: Nulls | None = None
    """Over all seeds."""
    utility: Utility = UNKNOWN
    """Of the same cells."""

    @property
    def span(self) -> Interval | None:
        """The interval that covers both spreads."""
        known = [one for one in (self.prompts, self.over_seeds) if one is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None

    @property
    def low(self) -> float | None:
        """The lower end of the span."""
        return self.span[0] if self.span else None

    @property
    def high(self) -> float | None:
        """The upper end of the span."""
        return self.span[1] if self.span else None

    @property
    def complement(self) -> Measured:
        """What is left of 1, with the same spreads."""

        def turned(ends: Interval | None) -> Interval | None:
            return None if ends is None else (1 - ends[1], 1 - ends[0])

        return replace(
            self,
            value=1 - self.value,
            prompts=turned(self.prompts),
            over_seeds=turned(self.over_seeds),
        )

    @property
    def null_text(self) -> str:
        """The share of answers that could not be judged, as every rate has it beside it."""
        return null_text(self.nulls)

    @property
    def text(self) -> str:
        """The value with its interval, for sentences and tooltips."""
        ends = "" if self.span is None else " [{:.2f}, {:.2f}]".format(*self.span)
        return f"{self.value:.2f}{ends}"


def pooled(runs: Sequence[Measured], *, is_share: bool) -> Measured:
    """One metric of one or more seeds of a point as their mean with both spreads."""
    if len(runs) == 1:
        return runs[0]
    values = [run.value for run in runs]
    mean = sum(values) / len(values)
    n = min((run.n for run in runs if run.n is not None), default=None)
    low, high = t_interval(values)
    return Measured(
        value=mean,
        n=n,
        n_null=max((run.n_null for run in runs if run.n_null is not None), default=None),
        seeds=len(runs),
        prompts=wilson(mean, n) if is_share and n else None,
        over_seeds=(max(0.0, low), min(1.0, high)) if is_share else (low, high),
        nulls=summed(run.nulls for run in runs),
        utility=mean_utility(run.utility for run in runs),
    )


def summed(counts: Iterable[Nulls | None]) -> Nulls | None:
    """Null verdicts over several runs; None where one of them did not count them."""
    known = list(counts)
    if not known or None in known:
        return None
    return sum(one[0] for one in known if one), sum(one[1] for one in known if one)


def null_share(nulls: Nulls | None) -> float | None:
    """The share of null verdicts, 0..1; None where they were not counted or nothing was asked."""
    return None if nulls is None or nulls[1] == 0 else nulls[0] / nulls[1]


def null_text(nulls: Nulls | None) -> str:
    """A share of null verdicts; never rounded to 0 % where there is one."""
    if nulls is None:
        return "? null"
    share = 100 * (null_share(nulls) or 0.0)
    return f"{share:.0f} % null" if share == 0 or share >= 1 else "< 1 % null"


def wilson(share: float, n: int) -> Interval:
    """The 95 % Wilson interval of a share of n items, within 0..1.

    Also where the share is not a count over n: a mean over seeds, ties that count half. Own lines
    and not statsmodels, whose import takes longer than a whole report.
    """
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def t_interval(values: Sequence[float]) -> Interval:
    """The 95 % t interval of the mean of two or more values."""
    from scipy.special import stdtrit

    mean, free = sum(values) / len(values), len(values) - 1
    half = float(stdtrit(free, 0.975)) * math.sqrt(
        sum((value - mean) ** 2 for value in values) / free / len(values)
    )
    return mean - half, mean + half
