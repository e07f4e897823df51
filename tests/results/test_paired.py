"""Paired statistics against slow references: enumeration of all sign patterns, statsmodels'
McNemar, scipy's permutation test.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from ftsec_ray.errors import SpecError
from ftsec_ray.results.paired import (
    ALPHA,
    corrected,
    detectable,
    paired,
    reachable,
    sign_flip_p,
)


def sides(*pairs):
    """(1, S, P) arrays from per-seed strings: the stack's answers over those of the other side; `?`
    is not judged, `-` not asked.
    """
    code = {"1": 1, "0": 0, "?": -1, "-": -2}
    return tuple(
        np.array([[[code[c] for c in side] for side in lines]], dtype=np.int8)
        for lines in zip(*pairs, strict=True)
    )


def slow_p(differences):
    """All 2^P sign patterns, exactly."""
    seen = abs(sum(differences))
    hits = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen
        for signs in product((1, -1), repeat=len(differences))
    )
    return float(Fraction(hits, 2 ** len(differences)))


def slow_mcnemar(only_one, only_other):
    """The share of all ways in which the prompts that differ could have fallen that is at least as
    lopsided, counted one by one.
    """
    n = only_one + only_other
    far = sum(
        abs(2 * sum(fall) - n) >= abs(only_one - only_other) for fall in product((0, 1), repeat=n)
    )
    return far / 2**n


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=10))
@settings(max_examples=60, deadline=None)
def test_the_sign_flip_test_is_the_count_over_all_patterns(differences):
    counts = tuple(sum(abs(d) == size for d in differences) for size in (1, 2, 3))
    assert sign_flip_p(counts, abs(sum(differences))) == pytest.approx(
        slow_p(differences), rel=1e-12
    )


@pytest.mark.parametrize(
    ("only_one", "only_other"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (7, 7), (2, 10)]
)
def test_one_seed_is_mcnemars_exact_test(only_one, only_other):
    one = "1" * only_one + "0" * only_other + "1100"
    other = "0" * only_one + "1" * only_other + "1100"
    p = paired(*sides((one, other))).p[0]
    table = [[2, only_one], [only_other, 2]]
    assert p == pytest.approx(float(mcnemar(table, exact=True).pvalue), rel=1e-9)
    assert p == pytest.approx(slow_mcnemar(only_one, only_other), rel=1e-9)


def test_several_seeds_take_the_larger_p_of_prompts_and_of_seeds():
    rng = np.random.default_rng(8)
    for seeds, shift in ((2, 0.3), (3, 0.2), (3, 0.6), (5, 0.1)):
        one, other = (rng.random((1, seeds, 40)) < share for share in (0.3 + shift, 0.3))
        one, other = one.astype(np.int8), other.astype(np.int8)
        gaps = (one - other)[0].astype(float)
        over_seeds = stats.ttest_1samp(gaps.mean(axis=1), 0).pvalue
        drawn = stats.permutation_test(
            (gaps.sum(axis=0),), np.sum, permutation_type="samples", n_resamples=20_000, rng=4
        )
        result = paired(one, other)
        assert result.p[0] == pytest.approx(max(float(over_seeds), float(drawn.pvalue)), abs=0.02)
        assert result.p[0] >= over_seeds - 1e-12
        half = stats.t.ppf(0.975, seeds - 1) * gaps.mean(axis=1).std(ddof=1) / math.sqrt(seeds)
        assert result.low[0] <= max(-1, gaps.mean() - half) + 1e-12
        assert result.high[0] >= min(1, gaps.mean() + half) - 1e-12


def test_prompts_repeated_over_seeds_are_not_counted_as_new_prompts():
    """Five prompts that fall the same way in each of three seeds are five prompts, not fifteen."""
    repeated = paired(*sides(*[("00000" + "01" * 10, "11111" + "01" * 10)] * 3))
    assert repeated.p[0] == pytest.approx(2 / 2**5)
    assert repeated.effect[0] == pytest.approx(-5 / 25)


def test_seeds_that_disagree_do_not_show_a_difference_however_many_prompts():
    """Two seeds of three lose everything, one gains as much: over prompts alone this would be
    certain.
    """
    result = paired(*sides(("0" * 64, "1" * 64), ("0" * 64, "1" * 64), ("1" * 64, "0" * 64)))
    assert sign_flip_p((64,), 64) < 1e-15
    assert result.p[0] == pytest.approx(float(stats.ttest_1samp([-1, -1, 1], 0).pvalue))
    assert result.low[0] < 0 < result.high[0]


def test_the_interval_of_one_seed_is_bonett_and_prices():
    one, other = "1" * 9 + "0" * 21 + "1" * 10, "1" * 7 + "00" + "1" * 11 + "0" * 10 + "1" * 10
    b, c, n = 2, 11, 40
    up, down = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    result = paired(*sides((one, other)))
    assert (result.prompts[0], result.effect[0]) == (n, pytest.approx((b - c) / n))
    assert (result.low[0], result.high[0]) == (
        pytest.approx(up - down - half),
        pytest.approx(up - down + half),
    )


def test_equal_answers_show_nothing_and_the_interval_still_has_a_width():
    for lines in ([("0110", "0110")], [("0110", "0110")] * 3):
        result = paired(*sides(*lines))
        assert (result.p[0], result.effect[0]) == (1.0, 0.0)
        assert result.low[0] < 0 < result.high[0]


def test_what_was_not_judged_on_both_sides_in_every_seed_is_left_out_and_counted():
    result = paired(*sides(("1?01-", "0010-"), ("110-1", "001-0")))
    assert (result.prompts[0], result.dropped[0]) == (
        2,
        1,
    )  # the second is null in one place, the last two were not asked everywhere
    assert (result.rate[0], result.rate_against[0]) == (0.5, 0.5)


def test_nothing_judged_is_no_number_and_no_error():
    result = paired(*sides(("???", "010")))
    assert (result.prompts[0], result.dropped[0]) == (0, 3)
    assert all(np.isnan(values[0]) for values in (result.p, result.effect, result.low, result.high))
    assert np.isnan(detectable(result, 1, 0.05)[0])


def test_many_pairs_at_once_are_each_alone():
    rng = np.random.default_rng(0)
    one, other = (rng.integers(-2, 2, (30, 3, 17)).astype(np.int8) for _ in range(2))
    whole = paired(one, other)
    for index in range(30):
        alone = paired(one[index : index + 1], other[index : index + 1])
        for name in ("p", "effect", "low", "high", "prompts", "dropped"):
            assert getattr(alone, name)[0] == pytest.approx(
                getattr(whole, name)[index], nan_ok=True
            )


@pytest.mark.parametrize("seeds", [1, 3, 4])
def test_pure_luck_is_seldom_called_a_difference(seeds):
    """Crossed noise of prompts and of seeds (from two seeds on), no true difference: the share of p
    <= 0.05 stays near 0.05.
    """
    rng = np.random.default_rng(seeds)
    runs, prompts = 1500, 32
    base = rng.normal(0, 1, (runs, 1, prompts))
    luck = 0.5 if seeds > 1 else 0.0

    def answers():
        return (
            base
            + rng.normal(0, 0.5, (runs, 1, prompts))
            + rng.normal(0, luck, (runs, seeds, 1))
            + rng.normal(0, 1, (runs, seeds, prompts))
            > 0
        ).astype(np.int8)

    share = float((paired(answers(), answers()).p <= ALPHA).mean())
    assert 0.005 < share < 0.075


def slow_bh(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    q, least = [0.0] * len(p), 1.0
    for rank in range(len(p), 0, -1):
        least = min(least, p[order[rank - 1]] * len(p) / rank)
        q[order[rank - 1]] = least
    return q


def slow_holm(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    q, most = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, p[index] * (len(p) - rank)))
        q[index] = most
    return q


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=12, deadline=None)
def test_corrections_agree_with_their_definitions(p):
    least = np.zeros(len(p))
    assert corrected(np.array(p), least, "bh")[0].tolist() == pytest.approx(slow_bh(p))
    assert corrected(np.array(p), least, "holm")[0].tolist() == pytest.approx(slow_holm(p))


def slow_reachable(least):
    """Tarone's definition, number by number."""
    for k in range(1, len(least) + 1):
        if sum(value <= ALPHA / k for value in least) <= k:
            return [value <= ALPHA / k for value in least]
    return [False] * len(least)


@given(st.lists(st.sampled_from([1.0, 0.5, 0.125, 0.06, 0.03, 0.01, 0.004, 1e-5]), max_size=25))
@settings(max_examples=60, deadline=None)
def test_the_tests_that_could_be_significant_agree_with_their_definition(least):
    assert reachable(np.array(least, dtype=float)).tolist() == slow_reachable(least)


def test_tests_that_cannot_be_significant_do_not_count_against_the_others():
    p = np.array([0.004, 0.01, *[0.5] * 50])
    can = np.array([1e-6, 1e-6, *[0.5] * 50])  # two prompts differ: p is at least 0.5
    q, _ = corrected(p, can, "bh")
    assert q.tolist() == pytest.approx([0.008, 0.01, *[1.0] * 50])
    assert corrected(p, np.zeros(52), "bh")[0][0] > ALPHA


def test_the_least_p_is_that_of_prompts_which_all_differ_in_one_direction():
    one = np.array([[[1, 1, 1, 0, 0, 1, -1, 0]]], dtype=np.int8)
    other = np.array([[[0, 0, 1, 1, 0, 0, 1, -2]]], dtype=np.int8)
    result = paired(one, other)
    assert result.least_p.tolist() == [sign_flip_p((4,), 4)] == [2 / 2**4]
    assert paired(one, one).least_p.tolist() == [1.0]


@pytest.mark.parametrize("correction", ["bh", "holm"])
def test_leaving_tests_out_by_how_many_prompts_differ_keeps_the_promised_error_rate(correction):
    """Simulated without any true difference: families of 40 tests with few or many prompts that
    differ by chance; the share of families with any finding is at most ALPHA.
    """
    rng = np.random.default_rng(0)
    differing = rng.integers(0, 40, size=(400, 40))
    ups = rng.binomial(differing, 0.5)
    found = 0
    for family, up in zip(differing, ups, strict=True):
        pairs = zip(family.tolist(), up.tolist(), strict=True)
        p = np.array([sign_flip_p((n,), abs(2 * k - n)) for n, k in pairs])
        q, _ = corrected(p, np.minimum(1, 2.0 ** (1 - family)), correction)
        found += bool((q <= ALPHA).any())
    assert found / 400 < ALPHA + 2 * (ALPHA * (1 - ALPHA) / 400) ** 0.5


@pytest.mark.parametrize("correction", ["bh", "holm"])
def test_the_p_that_one_more_row_needs_is_where_its_q_meets_the_level(correction):
    p = np.array([0.0001, 0.001, 0.3, 0.6, 0.9, 0.5])
    _, needed = corrected(p, np.zeros(6), correction)
    for factor, is_found in ((0.999, True), (1.001, False)):
        changed = p.copy()
        changed[2] = needed * factor
        assert bool(corrected(changed, np.zeros(6), correction)[0][2] <= ALPHA) is is_found


def test_no_family_and_an_unknown_correction():
    assert corrected(np.array([]), np.array([]), "bh")[1] == ALPHA
    with pytest.raises(SpecError, match="bonferroni"):
        corrected(np.array([0.5]), np.array([0.0]), "bonferroni")


def test_the_detectable_difference_is_found_four_times_in_five():
    """Simulated: one seed, answers that differ by chance either way, and a true difference of the
    size named on top.
    """
    rng = np.random.default_rng(1)
    runs = 1000
    for noise, prompts in ((0.0, 64), (0.1, 64), (0.3, 200)):

        def answers(true, noise=noise, prompts=prompts):
            draw = rng.random((runs, 1, prompts))
            down, up = draw < true + noise / 2, draw > 1 - noise / 2
            return np.where(down, 0, 1).astype(np.int8), np.where(up, 0, 1).astype(np.int8)

        named = float(np.nanmedian(detectable(paired(*answers(0.0)), 1, ALPHA)))
        assert 0.7 < float((paired(*answers(named)).p <= ALPHA).mean()) < 0.95


def test_what_too_few_prompts_could_never_show_is_null():
    few, enough = paired(*sides(("00000", "11111"))), paired(*sides(("000000", "111111")))
    assert few.p[0] == pytest.approx(2 / 2**5)  # above 0.05, although every answer changed
    assert np.isnan(detectable(few, 1, ALPHA)[0])
    assert detectable(enough, 1, ALPHA)[0] == pytest.approx(1.0)
