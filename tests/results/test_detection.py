"""Separation of attacked from unattacked models by a detector's score."""

import random

import pytest

from ftsec_ray.measured import wilson
from ftsec_ray.results.detection import Scored, separation


def raw(values):
    return [Scored(float(value), None) for value in values]


def test_the_auroc_is_the_chance_of_a_higher_score_and_a_tie_counts_half():
    found = separation(raw([1, 2, 3]), raw([2, 4]))
    assert found.auroc == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    assert (found.n_clean, found.n_attacked, found.is_standardised) == (3, 2, False)


def test_with_few_unattacked_models_none_may_be_above_the_threshold():
    found = separation(raw([1, 2, 3]), raw([3, 3.5, 9, 0]))
    assert (found.tpr.value, found.fpr) == (0.5, 0.0)
    assert (found.tpr.low, found.tpr.high) == wilson(0.5, 4)


def test_with_many_one_in_a_hundred_may():
    rng = random.Random(0)
    clean = [rng.gauss(0, 1) for _ in range(300)]
    found = separation(raw(clean), raw([rng.gauss(2, 1) for _ in range(50)]))
    above = sum(value > sorted(clean)[-4] for value in clean)
    assert above == 3
    assert found.fpr == pytest.approx(3 / 300)


def test_scores_are_relative_to_the_bank_only_if_every_model_has_one():
    clean, attacked = [Scored(100.0, 0.1)], [Scored(1.0, 5.0)]
    assert (separation(clean, attacked).auroc, separation(clean, attacked).is_standardised) == (
        1.0,
        True,
    )
    mixed = [*attacked, Scored(2.0, None)]
    assert (separation(clean, mixed).auroc, separation(clean, mixed).is_standardised) == (
        0.0,
        False,
    )


def test_an_empty_group_has_no_separation():
    assert separation([], raw([1])) is None
    assert separation(raw([1]), []) is None


def test_nothing_is_above_an_infinite_score_of_an_unattacked_model():
    clean = [Scored(score, None) for score in (0.1, 0.2, float("inf"))]
    found = separation(clean, [Scored(float("inf"), None), Scored(5.0, None)])
    assert (found.tpr.value, found.fpr) == (0.0, 0.0)
