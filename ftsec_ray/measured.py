"""A measured value with its intervals, for one run or over the seeds of a point.

Over prompts: the Wilson interval for the number of prompts of one seed. All seeds answer the same
prompts, so that counting each prompt once per seed would give an interval that is too narrow.

Over seeds: the t interval on the seeds' values, from two seeds on. A bootstrap over three seeds has
only three values to draw from, cannot leave their range and is far too narrow; the t interval with
two degrees of freedom is wide because three values say little. With many seeds the two agree,
because the mean is then nearly normal, so that the t interval is right for any number of seeds. One
seed has no such interval, and everything that shows its value says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

Interval = tuple[float, float]
Nulls = tuple[int, int]
"""Answers without a verdict, and all answers that were asked for."""
CLEAN = ("cacc", "benign_rate")
"""Metrics of normal utility, in order of preference: the first that was measured is used."""
UTILITY_NAMES = (
    "clean accuracy · over-refusal · coherent answers (· no answer, where it is counted)"
)
"""The parts of a utility text."""
NO_ANSWER = "no_answer_rate"
Z95 = 1.959963984540054
"""Half width of a 95 % normal interval in standard errors."""


class Utility(NamedTuple):
    """Utility of a cell, or the mean over several; None if it was not measured."""

    clean: float | None
    """Clean accuracy, or the share of benign requests answered correctly if the task has none."""
    over_refusal: float | None
    coherent: float | None
    no_answer: float | None = None
    """Share of forbidden requests without an answer; None if no judge counts them."""

    @property
    def text(self) -> str:
        """The three numbers, and the fourth if there is one."""
        shown = self[:3] if self.no_answer is None else self
        return " · ".join("–" if value is None else f"{value:.2f}" for value in shown)


UNKNOWN = Utility(None, None, None)


def utility_metrics(measured: Collection[str]) -> tuple[str, ...]:
    """The utility metrics that are shown with every safety metric, from those that were measured:
    clean accuracy, or correct answers to benign requests if there is none; over-refusal; coherence;
    and the share of requests without an answer if it was counted.
    """
    clean = next((metric for metric in CLEAN if metric in measured), CLEAN[-1])
    more = (NO_ANSWER,) if NO_ANSWER in measured else ()
    return clean, "over_refusal_rate", "coherent_rate", *more


def mean_utility(utilities: Iterable[Utility]) -> Utility:
    """The mean of each number over the utilities that have it."""
    columns = [
        [value for value in column if value is not None] for column in zip(*utilities, strict=True)
    ]
    return Utility(*(fmean(known) if known else None for known in columns)) if columns else UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Count:
    """Hits among the judged answers of one run."""

    hits: int
    n: int
    n_null: int = 0
    """Answers without a verdict, not counted in `n`."""

    @property
    def value(self) -> float | None:
        """The share; None if nothing was judged."""
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
    """Judged items of one seed, the minimum over the seeds; None for values that are not shares."""
    n_null: int | None = None
    """Null verdicts of one seed, the maximum over the seeds; None if no judge gives verdicts, and
    in results that did not count them.
    """
    seeds: int = 1
    prompts: Interval | None = None
    """95 % over prompts; None if the metric is not a share."""
    over_seeds: Interval | None = None
    """95 % over seeds; None with one seed."""
    nulls: Nulls | None = None
    """Summed over all seeds."""
    utility: Utility = UNKNOWN
    """Utility of the same cells."""

    @property
    def span(self) -> Interval | None:
        """The interval that covers both intervals."""
        known = [interval for interval in (self.prompts, self.over_seeds) if interval is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return self.span[0] if self.span else None

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return self.span[1] if self.span else None

    @property
    def complement(self) -> Measured:
        """1 minus the value, with the same intervals."""

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
        """The share of answers without a verdict, as shown with every rate."""
        return null_text(self.nulls)

    @property
    def text(self) -> str:
        """The value with its interval, for sentences and tooltips."""
        ends = "" if self.span is None else " [{:.2f}, {:.2f}]".format(*self.span)
        return f"{self.value:.2f}{ends}"


def pooled(runs: Sequence[Measured], *, is_share: bool) -> Measured:
    """One metric over one or more seeds of a point: the mean with both intervals."""
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
    """Null verdicts summed over several runs; None if one of them did not count them."""
    known = list(counts)
    if not known or None in known:
        return None
    return sum(pair[0] for pair in known if pair), sum(pair[1] for pair in known if pair)


def null_share(nulls: Nulls | None) -> float | None:
    """The share of null verdicts, 0..1; None if they were not counted or nothing was asked."""
    return None if nulls is None or nulls[1] == 0 else nulls[0] / nulls[1]


def null_text(nulls: Nulls | None) -> str:
    """A share of null verdicts as text; never rounded to 0 % if there are any."""
    if nulls is None:
        return "? null"
    share = 100 * (null_share(nulls) or 0.0)
    return f"{share:.0f} % null" if share == 0 or share >= 1 else "< 1 % null"


def wilson(share: float, n: int) -> Interval:
    """The 95 % Wilson interval of a share of n items, within 0..1.

    Also for shares that are not counts over n, such as a mean over seeds. Written here instead of
    using statsmodels, because importing that takes longer than a whole report.
    """
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def threshold_of(scores: Sequence[float], frac: float) -> float:
    """The smallest number that at most `frac` of the scores reach."""
    ordered = sorted(scores, reverse=True)
    allowed = math.floor(frac * len(ordered) + 1e-9)
    return math.nextafter(ordered[allowed], math.inf) if allowed < len(ordered) else -math.inf


def t_interval(values: Sequence[float]) -> Interval:
    """The 95 % t interval of the mean of two or more values."""
    from scipy.special import stdtrit

    mean, free = sum(values) / len(values), len(values) - 1
    half = float(stdtrit(free, 0.975)) * math.sqrt(
        sum((value - mean) ** 2 for value in values) / free / len(values)
    )
    return mean - half, mean + half
