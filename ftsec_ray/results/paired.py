"""The statistics of one paired comparison, for many pairs at once.

Two stacks answer the same prompts in the same seeds. A prompt's difference is +1, 0 or -1 in each
seed; the effect is their mean. Answers to one prompt in several seeds are not independent, and
neither are seeds that share their prompts, so that both are tested:

- Over prompts: the exact sign-flip permutation test with the prompt as its unit: all seeds'
  differences of one prompt change sign together. With one seed it is McNemar's exact test. It holds
  for these training runs only.
- Over seeds, from two seeds on: the paired t test on the seeds' mean differences. It holds for
  these prompts only.

The larger p of the two counts, so that a difference must hold beyond these prompts and beyond these
runs. (Simulated without a true difference, with noise of prompts and of seeds in 48 mixtures and 2
to 8 seeds: at 0.05 the sign-flip test alone finds a difference in up to 59 % of the draws, the t
test alone in up to 44 %, the larger p in at most 7.4 %.) One seed says nothing about other runs;
`n_seeds` shows that.

The interval covers both in the same way: over prompts Bonett and Price's for paired shares (2012;
it adds one prompt that differs in each direction, so that its width is not zero even if all prompts
agree), over seeds the t interval.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from ftsec_ray.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Correction = Literal["bh", "holm"]
CORRECTIONS: dict[str, str] = {"bh": "fdr_bh", "holm": "holm"}
"""Benjamini-Hochberg (share of false findings) and Holm (any false finding), by their names in
statsmodels.
"""
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """The result of each of K comparisons, as arrays of length K; nan if no prompt was judged on
    both sides.
    """

    rate: NDArray[np.float64]
    rate_against: NDArray[np.float64]
    effect: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]
    prompts: NDArray[np.int64]
    dropped: NDArray[np.int64]
    noise: NDArray[np.float64]
    """Share of prompts that differ beyond the effect, equally in both directions."""
    error_seeds: NDArray[np.float64]
    """Standard error of the effect over seeds; nan with one seed."""
    least_p: NDArray[np.float64]
    """The smallest p that the prompts which differ could give if all differed in one direction."""


def paired(one: NDArray[np.int8], other: NDArray[np.int8]) -> Paired:
    """Compare K pairs.

    Shapes: one, other (K, S, P) int8: 1 counted, 0 not counted, -1 asked and not judged, -2 not
    asked. A prompt counts if all 2 S answers were judged.
    """
    import numpy as np
    from scipy.special import ndtri, stdtr, stdtrit

    seeds = one.shape[1]
    asked = np.logical_and((one > -2).all(axis=1), (other > -2).all(axis=1))
    judged = np.logical_and((one >= 0).all(axis=1), (other >= 0).all(axis=1))
    n = judged.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing judged: nan, never an exception
        rates = [
            np.where(judged[:, None, :], side, 0).sum(axis=(1, 2)) / (n * seeds)
            for side in (one, other)
        ]
        gaps = np.where(judged[:, None, :], one.astype(np.int64) - other, 0)
        of_prompt, total = gaps.sum(axis=1), gaps.sum(axis=(1, 2))
        effect = total / (n * seeds)
        middle = total / (seeds * (n + 2))
        squares = (of_prompt.astype(float) ** 2).sum(axis=1) / seeds**2
        noise = np.maximum(squares / n - np.abs(effect), 0)
        half = ndtri(1 - ALPHA / 2) * np.sqrt(((squares + 2) / (n + 2) - middle**2) / (n + 2))
        low, high = middle - half, middle + half
        p = np.array(
            [_sign_flip_row(row, int(sum_)) for row, sum_ in zip(of_prompt, total, strict=True)],
            dtype=float,
        )
        error_seeds = np.full(len(n), np.nan)
        if seeds > 1:
            of_seed = gaps.sum(axis=2) / n[:, None]
            error_seeds = of_seed.std(axis=1, ddof=1) / math.sqrt(seeds)
            half = stdtrit(seeds - 1, 1 - ALPHA / 2) * error_seeds
            low, high = np.minimum(low, effect - half), np.maximum(high, effect + half)
            t = np.where(
                effect == 0, 0.0, np.abs(effect) / error_seeds
            )  # equal seeds: infinite, so that the prompts decide
            p = np.maximum(p, 2 * stdtr(seeds - 1, -t))
    empty = n == 0
    for values in (low, high, p, noise):
        values[empty] = np.nan
    differing = (of_prompt != 0).sum(axis=1)
    return Paired(
        rates[0],
        rates[1],
        effect,
        np.clip(low, -1, 1),
        np.clip(high, -1, 1),
        p,
        n,
        (asked & ~judged).sum(axis=1),
        noise,
        error_seeds,
        np.minimum(1.0, 2.0 ** (1 - differing)),
    )


def _sign_flip_row(of_prompt: NDArray[np.int64], total: int) -> float:
    import numpy as np

    return sign_flip_p(tuple(np.bincount(np.abs(of_prompt))[1:].tolist()), abs(total))


@lru_cache(maxsize=1 << 16)
def sign_flip_p(counts: tuple[int, ...], total: int) -> float:
    """Exact two-sided p of the sign-flip test: the share of all sign patterns whose absolute sum is
    at least `total`.

    Args:
        counts: Number of units with the absolute difference 1, 2, ...; units without a difference
            have no influence.
        total: The observed absolute sum.
    """
    import numpy as np
    from scipy.stats import binom

    # The sum with the sign + is 2 U - maximum; U is a sum of binomials, each with its own stride.
    up = np.ones(1)
    for size, count in enumerate(counts, start=1):
        if count:
            strided = np.zeros(size * count + 1)
            strided[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
            up = np.convolve(up, strided)
    sums = np.abs(2 * np.arange(len(up)) - (len(up) - 1))
    return min(1.0, float(up[sums >= total].sum()))


def corrected(
    p: NDArray[np.float64], least_p: NDArray[np.float64], correction: str
) -> tuple[NDArray[np.float64], float]:
    """The corrected p of a family, and the p that one more test would need to be significant.

    Tests that could not be significant whatever their outcome do not count, and have the corrected
    p 1: see `reachable`.
    """
    import numpy as np

    if correction not in CORRECTIONS:
        raise SpecError("unknown correction", correction, " | ".join(CORRECTIONS))
    q, counted = np.ones(len(p)), reachable(least_p)
    if not counted.any():
        return q, ALPHA
    is_significant, q[counted] = multiple_tests(p[counted], correction)
    hits, tests = int(is_significant.sum()), int(counted.sum())
    return q, (
        ALPHA * min(tests, hits + 1) / tests if correction == "bh" else ALPHA / max(1, tests - hits)
    )


def reachable(least_p: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which discrete tests of a family could be significant among so many (Tarone 1990; with
    Benjamini-Hochberg: Gilbert 2005).

    With K the smallest number such that at most K tests have a `least_p` of ALPHA / K or less:
    these tests. `least_p` depends on how many prompts differ, not on the direction in which they
    do, so that the choice favors no outcome.
    """
    import numpy as np

    least = np.sort(least_p)
    count = next(
        k for k in range(1, len(least) + 2) if np.searchsorted(least, ALPHA / k, side="right") <= k
    )
    return least_p <= ALPHA / count


def multiple_tests(
    p: NDArray[np.float64], correction: str
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which tests of a family are significant, and their corrected p."""
    from statsmodels.stats.multitest import multipletests

    # statsmodels collects garbage in each call: 0.3 s where a process holds many objects.
    gc.freeze()
    try:
        is_significant, q, _, _ = multipletests(p, alpha=ALPHA, method=CORRECTIONS[correction])
    finally:
        gc.unfreeze()
    return is_significant, q


def detectable(result: Paired, seeds: int, needed: float) -> NDArray[np.float64]:
    """The smallest difference that is found with a power of 80 % at p <= `needed`, given the
    observed noise; nan if it is above 1.

    Over prompts by Connor's formula for McNemar's test (1987), where the difference adds to the
    prompts that differ, and never below the minimum for p: k prompts that all differ in one
    direction give 2 / 2^k. Over seeds by the t test.
    """
    import numpy as np
    from scipy.special import ndtri, stdtrit

    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (
            np.zeros_like(result.noise),
            np.full_like(result.noise, 2.0),
        )  # above 1: impossible
        for _ in range(30):
            middle = (low + high) / 2
            differ = result.noise + middle
            wanted = ndtri(1 - needed / 2) * np.sqrt(differ) + ndtri(POWER) * np.sqrt(
                np.maximum(differ - middle**2, 0)
            )
            is_enough = middle * np.sqrt(result.prompts) >= wanted
            low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
        smallest = np.maximum(math.ceil(math.log2(2 / needed)) / result.prompts, high)
        if seeds > 1:
            smallest = np.maximum(
                smallest,
                (stdtrit(seeds - 1, 1 - needed / 2) + stdtrit(seeds - 1, POWER))
                * result.error_seeds,
            )
    return np.where((smallest <= 1) & (result.prompts > 0), smallest, np.nan)


def plain(value: Any) -> float | None:
    """A Python number, None for nan."""
    return None if math.isnan(value) else float(value)
