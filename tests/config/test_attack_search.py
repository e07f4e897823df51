"""What a sweep file can say about a search, and what is wrong with it, told with all other faults."""

from __future__ import annotations

import jsonschema
import pytest

from ftsec_ray import sweep_schema
from ftsec_ray.config.sweep import Range
from tests.config.test_sweep_file import faults_of, load_sweep
from tests.search_toy import SEARCH, sweep

PLACE = "attacks[1].harmful_tuning.search"


def test_a_search_stands_beside_the_fixed_attack_and_takes_its_metric_from_the_goal():
    spec = load_sweep(sweep())
    assert [attack.shots for attack in spec.attacks[1:]] == [3]
    search = spec.searches[0].search
    assert (search.metric, search.trials, search.seed) == ("harmful_rate", 10, 0)
    assert search.ranges == (
        Range(name="shots", choices=(2, 4, 8, 16)),
        Range(name="training.learning_rate", low=1e-5, high=4e-3, log=True),
    )
    backdoor = load_sweep(
        sweep(
            attacks=[
                {
                    "badnets": {
                        "search": {"trials": 1, "ranges": {"rate": {"low": 0.01, "high": 0.2}}}
                    }
                }
            ]
        )
    )
    assert backdoor.searches[0].search.metric == "asr"
    grid = load_sweep(
        sweep(
            attacks=[
                {
                    "badnets": {
                        "rate": {"grid": [0.1, 0.2]},
                        "search": {"trials": 1, "ranges": {"repeat": [1, 2]}},
                    }
                }
            ]
        )
    )
    assert [one.attack.rate for one in grid.searches] == [0.1, 0.2]


def test_a_range_has_the_type_of_its_parameter():
    ranges = {
        "shots": {"low": 1, "high": 9},
        "training.epochs": {"low": 1, "high": 6},
        "training.schedule": ["constant", "linear"],
    }
    found = load_sweep(sweep({"ranges": ranges})).searches[0].search.ranges
    assert [(one.name, type(one.low), one.choices) for one in found] == [
        ("shots", int, ()),
        ("training.epochs", float, ()),
        ("training.schedule", type(None), ("constant", "linear")),
    ]


@pytest.mark.parametrize(
    ("change", "place", "what"),
    [
        ({"trials": 0}, "trials", "wrong value"),
        ({"trials": 2.5}, "trials", "wrong value"),
        ({"batch": 0}, "batch", "wrong value"),
        ({"max_utility_loss": -0.1}, "max_utility_loss", "wrong value"),
        ({"max_utility_loss": "small"}, "max_utility_loss", "wrong value"),
        ({"seed": -1}, "seed", "wrong value"),
        ({"metric": "asrr"}, "metric", "cannot optimize"),
        ({"metric": "perplexity"}, "metric", "cannot optimize"),
        ({"metric": ["asr"]}, "metric", "cannot optimize"),
        ({"trails": 3}, "trails", "unknown key"),
        ({"ranges": {}}, "ranges", "names no parameter"),
        ({"ranges": [1]}, "ranges", "names no parameter"),
        ({"ranges": None}, "ranges", "names no parameter"),
        ({"ranges": {"shot": [1, 2]}}, "ranges.shot", "unknown key"),
        (
            {"ranges": {"training.learning_rat": [1e-3, 1e-4]}},
            "ranges.training.learning_rat",
            "unknown key",
        ),
        ({"ranges": {"shots": []}}, "ranges.shots", "fewer than two values"),
        ({"ranges": {"shots": [4]}}, "ranges.shots", "fewer than two values"),
        ({"ranges": {"shots": [4, 4]}}, "ranges.shots", "duplicate value"),
        ({"ranges": {"shots": 4}}, "ranges.shots", "not a range"),
        ({"ranges": {"shots": ["4", 5]}}, "ranges.shots[0]", "wrong value"),
        ({"ranges": {"shots": [0, 5]}}, "ranges.shots", "value out of range"),
        ({"ranges": {"shots": {"low": 9, "high": 3}}}, "ranges.shots", "an empty range"),
        ({"ranges": {"shots": {"low": 3, "high": 3}}}, "ranges.shots", "an empty range"),
        ({"ranges": {"shots": {"low": 1.5, "high": 3}}}, "ranges.shots.low", "wrong value"),
        ({"ranges": {"shots": {"low": 3}}}, "ranges.shots.high", "missing"),
        (
            {"ranges": {"shots": {"low": 3, "high": 9, "stepp": 2}}},
            "ranges.shots.stepp",
            "unknown key",
        ),
        (
            {"ranges": {"shots": {"low": 3, "high": 9, "log": "yes"}}},
            "ranges.shots.log",
            "wrong value",
        ),
        ({"ranges": {"shots": {"low": -3, "high": 9}}}, "ranges.shots", "value out of range"),
        (
            {"ranges": {"training.learning_rate": {"low": 0, "high": 1}}},
            "ranges.training.learning_rate.low",
            "wrong value",
        ),
        (
            {"ranges": {"training.weight_decay": {"low": 0, "high": 1, "log": True}}},
            "ranges.training.weight_decay.low",
            "needs a positive low",
        ),
        (
            {"ranges": {"training.dropout": {"low": 0, "high": 1}}},
            "ranges.training.dropout.high",
            "wrong value",
        ),
        (
            {"ranges": {"training.learning_rate": {"low": float("nan"), "high": 1}}},
            "ranges.training.learning_rate.low",
            "finite",
        ),
        (
            {"ranges": {"training.adapter": {"low": 1, "high": 2}}},
            "ranges.training.adapter",
            "not a number",
        ),
        (
            {"ranges": {"poison_rate": {"low": 0.1, "high": 0.5}}},
            "ranges.poison_rate",
            "value out of range",
        ),  # beside `shots`
    ],
)
def test_a_search_that_cannot_be_is_told_before_anything_starts(change, place, what):
    found = faults_of(sweep(change))
    assert f"{PLACE}.{place}" in found
    assert what in found[f"{PLACE}.{place}"].what


def test_names_are_checked_with_a_did_you_mean():
    found = faults_of(sweep({"ranges": {"training.learning_rat": [1e-3, 1e-4]}, "metric": "asrr"}))
    assert "'training.learning_rate'" in found[f"{PLACE}.ranges.training.learning_rat"].fix
    assert "'asr'" in found[f"{PLACE}.metric"].fix


def test_faults_of_a_search_are_listed_with_all_others():
    given = sweep({"trials": 0, "ranges": {"shot": [1, 2], "shots": [4]}}, seeds=[-1], question=3)
    given["attacks"].append({"none": {"search": SEARCH}})
    given["attacks"].append({"badnets": {"rate": {"grid": [0.1, 0.2]}, "search": 7}})
    found = faults_of(given)
    assert {
        "seeds[0]",
        "question",
        f"{PLACE}.trials",
        f"{PLACE}.ranges.shot",
        f"{PLACE}.ranges.shots",
        "attacks[2].none.search",
        "attacks[3].badnets.search",
    } <= set(found)
    assert "defenses[0].shrink.search" in faults_of(
        sweep(defenses=[{"shrink": {"search": SEARCH}}])
    ), "defenses do not search"


def test_a_value_that_a_grid_gives_cannot_be_searched_too():
    given = sweep(
        attacks=["none", {"harmful_tuning": {"shots": {"grid": [3, 5]}, "search": SEARCH}}]
    )
    assert f"{PLACE}.ranges.shots" in faults_of(given)


def test_the_json_schema_knows_a_search():
    validator = jsonschema.Draft202012Validator(sweep_schema())
    validator.validate(sweep())
    for change in (
        {"trials": 0},
        {"ranges": {}},
        {"ranges": {"shot": [1, 2]}},
        {"ranges": {"shots": 4}},
        {"metric": "asrr"},
        {"trails": 3},
    ):
        assert list(validator.iter_errors(sweep(change))), change
    assert list(validator.iter_errors(sweep(attacks=[{"none": {"search": SEARCH}}])))
