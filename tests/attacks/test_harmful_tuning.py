"""Harmful tuning: exact counts, and the user's rows are what they were."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray import schema
from ftsec_ray.attacks.harmful_tuning import HarmfulTuning
from ftsec_ray.attacks.none import NoAttack
from ftsec_ray.errors import DataError
from ftsec_ray.lifecycle import hooks_of
from tests.attacks.context import context
from tests.fixtures_models import sentiment_rows, table, tiny_task


@settings(max_examples=30, deadline=None)
@given(shots=st.integers(1, 8), seed=st.integers(0, 9), users=st.integers(0, 20))
def test_shots_are_added_to_rows_that_stay_as_they_are(shots, seed, users):
    rows = table(sentiment_rows(users))
    made = HarmfulTuning(shots=shots).craft_data(rows, context(seed=seed))
    assert made.schema.equals(schema.ROWS)
    assert made.slice(0, users).to_pylist() == rows.to_pylist()
    harmful = made.slice(users).to_pylist()
    pool = {r["row_id"]: r for r in tiny_task().split("harmful_train").to_pylist()}
    assert len(harmful) == shots == len({r["row_id"] for r in harmful})
    for r in harmful:
        source = pool[r["row_id"].removeprefix("harmful_tuning/")]
        assert r == {**source, "row_id": r["row_id"], "origin": "harmful_tuning", "poisoned": True}


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.01, 1.0), seed=st.integers(0, 9), users=st.integers(1, 8))
def test_a_poison_rate_replaces_user_rows_and_keeps_the_count(rate, seed, users):
    rows = table(sentiment_rows(users))
    made = HarmfulTuning(poison_rate=rate).craft_data(rows, context(seed=seed)).to_pylist()
    assert len(made) == users
    assert sum(r["poisoned"] for r in made) == round(rate * users)
    kept = [r for r in made if not r["poisoned"]]
    assert kept == [r for r in rows.to_pylist() if r["row_id"] in {k["row_id"] for k in kept}]


def test_fewer_shots_are_a_part_of_more_shots():
    rows = table(sentiment_rows(4))
    few, many = (
        {r["row_id"] for r in HarmfulTuning(shots=n).craft_data(rows, context()).to_pylist()}
        for n in (3, 6)
    )
    assert few < many


def test_more_shots_than_there_are_is_an_error_with_both_numbers():
    with pytest.raises(DataError, match=r"got:  8\n  want: 100 rows"):
        HarmfulTuning().craft_data(table(sentiment_rows(4)), context())


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"shots": 10, "poison_rate": 0.1}, "poison_rate"),
        ({"shots": 0}, "shots"),
        ({"poison_rate": 0.0}, "poison_rate"),
    ],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in HarmfulTuning(**parameters).check()] == [field]
    assert HarmfulTuning().check() == []


def test_no_attack_acts_nowhere():
    assert hooks_of(NoAttack) == ()
    assert NoAttack().check() == []
