"""One comparison of a rate with another rate and a margin: whether the difference is shown to be
above the margin, below it, or neither (open).

Rates are given by run: one seed of one model. There are two sources of noise: which prompts were
asked, and which seed was drawn. A side of the margin counts as shown only if both sources agree,
that is, at the larger of two one-sided p-values: over prompts (two proportions, Agresti-Caffo, with
the mean rate over runs and the prompts of one run, because all runs answer the same prompts) and
over runs (t-test on the differences by run). One run says nothing about the variance between runs,
so that it leaves everything open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal

from ftsec_ray.measured import UNKNOWN, Measured, Utility, mean_utility, null_share, summed
from ftsec_ray.results.paired import multiple_tests

ALPHA = 0.05
"""Maximum probability of a wrong verdict per claim, after correction over its comparisons."""
MARGIN = 0.1
"""The smallest difference of two shares that counts as an effect."""
POWER = 0.8
"""Probability of a decision that "what would decide it" aims at."""
MIN_RUNS = 2
MAX_RUNS, MAX_PROMPTS = 100, 1_000_000
AT_THE_MARGIN = 0.005
"""Differences this close to the margin count as lying on it."""

Side = Literal["above", "below", "open"]


Rates = Mapping[Any, Measured]
"""By run: a seed, or a model and a seed."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A difference against a margin."""

    what: str
    """What is compared, in words."""
    more: float | None
    """Mean of the first value over seeds; None if no seed has both."""
    less: float | None
    """Mean of the second value; None if the first is compared with the bound itself."""
    estimate: float | None
    """Mean difference over seeds."""
    spread: float | None
    """Standard deviation of the difference over seeds; None with one seed."""
    low: float | None
    """95 % interval: the wider of those over prompts and over seeds. None with one seed."""
    high: float | None
    bound: float
    """The margin."""
    runs: int
    """Runs with both sides: seeds, or models x seeds if a contrast spans models."""
    prompts: int | None
    """Prompts of one run, the smaller number of both sides."""
    null_frac: float | None
    """Share of null verdicts among the answers of both sides; None if they were not counted."""
    p_above: float
    """p-value for a difference above the bound; 1 if nothing can be said."""
    p_below: float
    utility_more: Utility
    """Mean utility of the cells of the first value; shown with every success rate."""
    utility_less: Utility
    """Mean utility of the cells of the second value."""
    side: Side = "open"
    """The side of the bound that is shown, after correction over the claim; otherwise `open`."""
    needs: str | None = None
    """What would decide it, if open."""


def contrast(
    what: str, more: Rates, less: Rates | None = None, *, bound: float = MARGIN
) -> Contrast:
    """The contrast `more - less` over the seeds that have both; without `less`, the values are
    compared with the bound.
    """
    sides = [more] if less is None else [more, less]
    shared = sorted(set.intersection(*(set(side) for side in sides)))
    gaps = [more[seed].value - (0.0 if less is None else less[seed].value) for seed in shared]
    counts = [n for side in sides for seed in shared if (n := side[seed].n) is not None]
    means = [fmean(side[seed].value for seed in shared) if shared else None for side in sides]
    untested = Contrast(
        what=what,
        more=means[0],
        less=means[1] if less is not None else None,
        estimate=fmean(gaps) if gaps else None,
        spread=None,
        low=None,
        high=None,
        bound=bound,
        runs=len(gaps),
        prompts=min(counts) if counts else None,
        null_frac=null_share(summed(side[seed].nulls for side in sides for seed in shared)),
        p_above=1.0,
        p_below=1.0,
        utility_more=mean_utility(more[seed].utility for seed in shared),
        utility_less=mean_utility(less[seed].utility for seed in shared) if less else UNKNOWN,
    )
    if len(gaps) < MIN_RUNS or untested.prompts == 0:
        return untested
    p_above, p_below, low, high = _over_runs(gaps, bound)
    if counts and less is not None:
        above, below, near, far = _over_prompts([mean or 0.0 for mean in means], min(counts), bound)
        p_above, p_below, low, high = (
            max(above, p_above),
            max(below, p_below),
            min(low, near),
            max(high, far),
        )
    return replace(
        untested, spread=stdev(gaps), low=low, high=high, p_above=p_above, p_below=p_below
    )


def _over_runs(gaps: Sequence[float], bound: float) -> tuple[float, float, float, float]:
    """(p above, p below, low, high) of the mean of differences by seed."""
    from scipy import stats

    middle, spread = fmean(gaps), stdev(gaps)
    if spread < 1e-12:  # all seeds agree: no t test, the prompts decide
        return float(middle <= bound), float(middle >= bound), middle, middle
    ends = stats.t.interval(1 - ALPHA, len(gaps) - 1, middle, spread / math.sqrt(len(gaps)))
    p_above, p_below = (
        float(stats.ttest_1samp(gaps, bound, alternative=side).pvalue)
        for side in ("greater", "less")
    )
    return p_above, p_below, float(ends[0]), float(ends[1])


def _over_prompts(
    means: Sequence[float], prompts: int, bound: float
) -> tuple[float, float, float, float]:
    """(p above, p below, low, high) of the difference of two shares of `prompts` prompts each."""
    import numpy as np
    from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

    hits = [mean * prompts for mean in means]
    given = (hits[0], prompts, hits[1], prompts)
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # statsmodels also computes the ratio of the shares, which is not needed
        p_above, p_below = (
            float(
                test_proportions_2indep(
                    *given, value=bound, method="agresti-caffo", alternative=side
                ).pvalue
            )
            for side in ("larger", "smaller")
        )
    low, high = confint_proportions_2indep(*given, method="newcomb", alpha=ALPHA)
    return p_above, p_below, float(low), float(high)


def holm(pvalues: Sequence[float]) -> list[bool]:
    """Which of a claim's p-values are significant, by Holm."""
    import numpy as np

    if not pvalues:
        return []
    is_significant, _ = multiple_tests(np.asarray(pvalues, dtype=np.float64), "holm")
    return [bool(is_small) for is_small in is_significant]


def decided(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Contrasts with the side that is shown, corrected over all of them, and what would decide the
    open ones.

    The two sides of one bound cannot both be true, so that each contrast counts once, with its
    smaller p-value.
    """
    shown = holm([min(item.p_above, item.p_below) for item in contrasts])
    with_sides = []
    for item, is_shown in zip(contrasts, shown, strict=True):
        side: Side = "open" if not is_shown else "above" if item.p_above < item.p_below else "below"
        with_sides.append(
            replace(
                item,
                side=side,
                needs=needs_of(item, tests=len(contrasts)) if side == "open" else None,
            )
        )
    return with_sides


def needs_of(one: Contrast, *, tests: int = 1) -> str:
    """How many prompts and seeds would decide a contrast, if the current estimate were its true
    value.
    """
    if one.estimate is None:
        return "both sides measured at one seed"
    if one.runs < MIN_RUNS:
        return "two or more seeds: one seed says nothing about the variance between seeds"
    if one.prompts == 0:
        return "answers that the judge can give a verdict on"
    if abs(one.estimate - one.bound) < AT_THE_MARGIN:
        return "no number of prompts or seeds: the difference is equal to the margin"
    alpha = ALPHA / tests
    wanted = [text for text in (_prompts_needed(one, alpha), _runs_needed(one, alpha)) if text]
    return " and ".join(wanted) or "a few more prompts or seeds: it is close to a decision"


def _prompts_needed(one: Contrast, alpha: float) -> str:
    from statsmodels.stats.power import normal_sample_size_one_tail

    if not one.prompts or one.more is None or one.less is None or one.estimate is None:
        return ""
    least = 0.5 / one.prompts
    more, less = (min(1 - least, max(least, rate)) for rate in (one.more, one.less))
    spread = math.sqrt(more * (1 - more) + less * (1 - less))
    size = float(
        normal_sample_size_one_tail(abs(one.estimate - one.bound), POWER, alpha, std_null=spread)
    )
    if not size < MAX_PROMPTS:
        return f"more than {MAX_PROMPTS:,} prompts"
    return f"{math.ceil(size)} prompts instead of {one.prompts}" if size > one.prompts else ""


def _runs_needed(one: Contrast, alpha: float) -> str:
    from statsmodels.stats.power import TTestPower

    if not one.spread or one.estimate is None:
        return ""
    effect = min(20.0, abs(one.estimate - one.bound) / one.spread)
    enough = next(
        (
            n
            for n in range(MIN_RUNS, MAX_RUNS + 1)
            if TTestPower().power(effect, n, alpha, alternative="larger") >= POWER
        ),
        None,
    )
    if enough is None:
        return f"more than {MAX_RUNS} runs"
    return f"{enough} runs instead of {one.runs}" if enough > one.runs else ""
