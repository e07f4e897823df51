"""One contrast: its two noises, its interval and its power, against scipy and statsmodels called by
hand.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats import proportion

from ftsec_ray.claims.contrast import ALPHA, MARGIN, contrast, decided, holm, needs_of
from ftsec_ray.measured import Measured


def run(value, n, null=None):
    nulls = None if null is None else (null, null + n)
    return Measured(value=value, n=n, n_null=null, nulls=nulls)


def rates(*values, n=100):
    return {seed: run(value, n) for seed, value in enumerate(values)}


def test_the_larger_of_both_p_values_counts_and_the_wider_interval():
    more, less = rates(0.5, 0.7, 0.6), rates(0.2, 0.2, 0.1)
    one = contrast("x", more, less)
    by_run = stats.ttest_1samp([0.3, 0.5, 0.5], MARGIN, alternative="greater").pvalue
    by_prompt = proportion.test_proportions_2indep(
        60, 100, 50 / 3, 100, value=MARGIN, method="agresti-caffo", alternative="larger"
    ).pvalue
    assert by_run > by_prompt
    assert one.p_above == pytest.approx(by_run)
    t_interval = stats.ttest_1samp([0.3, 0.5, 0.5], 0).confidence_interval(0.95)
    newcombe = proportion.confint_proportions_2indep(60, 100, 50 / 3, 100, method="newcomb")
    assert one.low == pytest.approx(min(t_interval.low, newcombe[0]))
    assert one.high == pytest.approx(max(t_interval.high, newcombe[1]))
    assert (one.estimate, one.runs, one.prompts) == (pytest.approx(13 / 30), 3, 100)


def test_seeds_that_agree_leave_the_word_to_the_prompts():
    few, many = (
        contrast("x", rates(0.3, 0.3, 0.3, n=n), rates(0.1, 0.1, 0.1, n=n)) for n in (10, 4_000)
    )
    by_hand = proportion.test_proportions_2indep(
        3, 10, 1, 10, value=MARGIN, method="agresti-caffo", alternative="larger"
    )
    assert few.p_above == pytest.approx(by_hand.pvalue)
    assert [one.side for one in decided([few, many])] == ["open", "above"]


def test_many_prompts_do_not_help_where_the_seeds_disagree():
    one = contrast("x", rates(0.9, 0.1, 0.5, n=100_000), rates(0.1, 0.1, 0.1, n=100_000))
    assert one.p_above > ALPHA
    assert decided([one])[0].side == "open"
    assert "runs instead of 3" in decided([one])[0].needs
    assert "prompts" not in decided([one])[0].needs


@pytest.mark.parametrize("side", [rates(0.9), {}])
def test_one_seed_or_none_leaves_all_open(side):
    one = contrast("x", side, rates(0.0))
    assert (one.p_above, one.p_below, one.low) == (1.0, 1.0, None)
    assert decided([one])[0].needs in (
        "two or more seeds: one seed says nothing about the variance between seeds",
        "both sides measured at one seed",
    )


def test_no_judged_prompt_leaves_all_open():
    one = contrast("x", rates(0.9, 0.9, n=0), rates(0.1, 0.1, n=50))
    assert (one.p_above, one.p_below) == (1.0, 1.0)
    assert needs_of(one) == "answers that the judge can give a verdict on"


def test_values_that_are_no_shares_are_held_against_the_bound_by_runs_alone():
    values = {seed: run(value, None) for seed, value in enumerate((1.4, 1.6, 1.5))}
    one = contrast("x", values, bound=math.log(2))
    assert one.p_above == pytest.approx(
        stats.ttest_1samp([1.4, 1.6, 1.5], math.log(2), alternative="greater").pvalue
    )
    assert (one.less, one.prompts) == (None, None)


def test_the_share_of_null_verdicts_is_that_of_all_answers_of_both_sides():
    more, less = (
        {0: run(0.5, 90, 10), 1: run(0.5, 100, 0)},
        {
            0: run(0.1, 70, 30),
            1: run(0.1, 100, 0),
            2: run(0.1, 50, 50),
        },
    )
    assert contrast("x", more, less).null_frac == pytest.approx(
        40 / 400
    )  # the seed that only one side has plays no part
    assert contrast("x", rates(0.5), rates(0.5)).null_frac is None
    assert contrast("x", {0: run(0.5, 0, 0)}).null_frac is None


SHARES = st.lists(st.floats(0, 1), min_size=0, max_size=5)


@settings(max_examples=15, deadline=None)
@given(more=SHARES, less=SHARES, n=st.integers(0, 300))
def test_whatever_the_rates_the_answer_is_finite_and_one_sided(more, less, n):
    one = decided([contrast("x", rates(*more, n=n), rates(*less, n=n))])[0]
    assert 0 <= one.p_above <= 1
    assert 0 <= one.p_below <= 1
    assert one.p_above + one.p_below >= 1 - 1e-9  # at most one side of a bound can be shown
    assert (one.side == "open") == (one.needs is not None)
    if one.low is not None:
        assert one.low - 1e-9 <= one.estimate <= one.high + 1e-9


def test_holm_is_what_it_is_by_hand():
    assert holm([0.01, 0.04, 0.03]) == [True, False, False]  # 0.05/3, then 0.03 > 0.05/2
    assert holm([0.01, 0.02, 0.03]) == [True, True, True]
    assert holm([]) == []


def test_a_comparison_that_would_pass_alone_may_not_pass_among_many():
    weak = contrast("weak", rates(0.31, 0.30, 0.32, n=150), rates(0.1, 0.1, 0.1, n=150))
    assert decided([weak])[0].side == "above"
    assert {one.side for one in decided([weak] * 8)} == {"open"}


def test_the_prompts_that_are_said_to_decide_do_decide_four_times_in_five():
    import numpy as np

    one = decided([contrast("x", rates(0.3, 0.3, 0.3, n=30), rates(0.1, 0.1, 0.1, n=30))])[0]
    prompts = int(one.needs.split()[0])
    assert 100 < prompts < 1_000
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(
        400
    ):  # the prompts are the same for all seeds, so that one draw stands for all of them
        a, b = (rng.binomial(prompts, p) / prompts for p in (0.3, 0.1))
        hits += contrast("x", rates(a, a, a, n=prompts), rates(b, b, b, n=prompts)).p_above < ALPHA
    assert 0.7 < hits / 400 < 0.9


def test_at_the_margin_nothing_would_decide():
    assert "equal to the margin" in needs_of(
        contrast("x", rates(0.2, 0.21, 0.19), rates(0.1, 0.1, 0.1))
    )
