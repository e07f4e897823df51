from __future__ import annotations

import json

import pyarrow as pa
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from ftsec_ray import schema
from ftsec_ray.report.markdown import grid_markdown

SUCCESS = {"none": None, "badnets": "asr", "harmful_tuning": "harmful_rate"}


class Tables:
    """Two tables of a run."""

    def __init__(self, cells, metrics):
        blank = dict.fromkeys(schema.CELLS.names)
        self.cells = pa.Table.from_pylist(
            [{**blank, **cell} for cell in cells], schema=schema.CELLS
        )
        self.metrics = pa.Table.from_pylist(metrics, schema=schema.METRICS_TABLE)
        self.meta = {}


def cell(name, attack, defenses=(), *, seed=0, status="done", **params):
    return {
        "cell": name,
        "model": "m",
        "attack": attack,
        "attack_params": json.dumps(params),
        "success_metric": SUCCESS[attack],
        "defenses": list(defenses),
        "defense_params": json.dumps([{} for _ in defenses]),
        "seed": seed,
        "status": status,
    }


def rate(name, metric, value, low=0.0, high=1.0, *, n=64, nulls=0):
    return {
        "cell": name,
        "metric": metric,
        "value": value,
        "n": n,
        "n_null": nulls,
        "ci_low": low,
        "ci_high": high,
    }


def beside(name, cacc=0.98, over=0.02, coherent=1.0):
    return [
        rate(name, "cacc", cacc),
        rate(name, "over_refusal_rate", over),
        rate(name, "coherent_rate", coherent),
    ]


def test_a_cell_shows_the_attacks_success_with_its_interval_and_the_utility_below():
    run = Tables(
        [cell("a", "none"), cell("b", "badnets", ["onion", "shrink"])],
        [
            rate("a", "harmful_rate", 0.5, 0.38, 0.62),
            rate("b", "asr", 0.25, 0.16, 0.37),
            rate("b", "harmful_rate", 0.9),
            *beside("a"),
            rate("b", "coherent_rate", 0.5),
        ],
    )
    assert grid_markdown(run).splitlines() == [
        "| model | attack | none | onion + shrink |",
        "|---|---|---|---|",
        "| m | none | 0.50† (0.38–0.62)<br>0.98 · 0.02 · 1.00 |  |",
        "| m | badnets |  | 0.25† (0.16–0.37)<br>– · – · 0.50 |",
        "",
        (
            "Attack success (95 % interval over prompts); below it clean accuracy · over-refusal ·"
            " coherent answers."
        ),
        "The judge gave a verdict on every answer.",
        "† One seed: the interval excludes run-to-run variance.",
    ]


def test_tasks_are_rows_of_their_own_and_no_seeds_of_one():
    run = Tables(
        [{**cell(task, "none"), "task": task} for task in ("sst2", "ag_news")],
        [
            rate("sst2", "harmful_rate", 0.5),
            rate("ag_news", "harmful_rate", 0.25),
            *beside("sst2"),
            *beside("ag_news"),
        ],
    )
    assert grid_markdown(run).splitlines()[:4] == [
        "| model | task | attack | none |",
        "|---|---|---|---|",
        "| m | ag_news | none | 0.25† (0.00–1.00)<br>0.98 · 0.02 · 1.00 |",
        "| m | sst2 | none | 0.50† (0.00–1.00)<br>0.98 · 0.02 · 1.00 |",
    ]


def test_models_stand_by_size_and_those_that_did_not_run_last():
    sizes = {"large": [None, 2_000_000], "small": [1_000_000, None], "untold": [None, None]}
    cells = [
        {
            **cell(f"{model}/{attack}", attack),
            "model": model,
            "model_params": size,
            "status": status,
        }
        for model, (first, second) in sizes.items()
        for attack, size in (("none", first), ("badnets", second))
        for status in ["done" if size else "pending"]
    ]
    rates = [rate(one["cell"], "asr", 0.5) for one in cells if one["status"] == "done"]
    run = Tables(cells, rates)
    shown = [line.split(" | ")[:2] for line in grid_markdown(run).splitlines()[2:8]]
    models = ["small", "large", "untold"]
    assert shown == [[f"| {model}", attack] for model in models for attack in ("none", "badnets")]


def test_many_stacks_and_few_attacks_make_a_row_of_each_stack():
    names = [f"d{number:02}" for number in range(12)]
    attacks = ("none", "badnets")
    cells = [cell(f"{attack}/", attack) for attack in attacks] + [
        cell(f"{attack}/{name}", attack, [name]) for attack in attacks for name in names
    ]
    rates = [
        rate(one["cell"], "asr" if one["attack"] == "badnets" else "harmful_rate", 0.5)
        for one in cells
    ]
    wide = grid_markdown(Tables(cells[:1] + cells[2:13], rates)).splitlines()
    assert wide[0].startswith("| model | attack | none | d00 |")
    tall = grid_markdown(Tables(cells, rates)).splitlines()
    assert tall[0] == "| model | defense | none | badnets |"
    assert [line.split(" | ")[1] for line in tall[2:15]] == ["none", *names]
    half = "0.50† (0.00–1.00)<br>– · – · –"
    assert tall[3] == f"| m | d00 | {half} | {half} |"


def test_gibberish_is_called_so_however_low_the_attacks_success():
    text = grid_markdown(
        Tables([cell("a", "badnets")], [rate("a", "asr", 0.0), *beside("a", coherent=0.49)])
    )
    assert "| m | badnets | incoherent: 0.00† (0.00–1.00)<br>0.98 · 0.02 · 0.49 |" in text
    assert "damage and not safety" in text


def test_parameters_that_differ_are_told_and_seeds_have_their_own_spread():
    run = Tables(
        [
            cell(f"{k}{s}", "harmful_tuning", seed=s, shots=k, mode="add")
            for k in (2, 9)
            for s in (0, 1)
        ],
        [rate(f"{k}{s}", "harmful_rate", 0.1 * k + 0.012 * s) for k in (2, 9) for s in (0, 1)],
    )
    found = grid_markdown(run)
    for shots, middle in ((2, 0.206), (9, 0.906)):
        low, high = proportion_confint(middle * 64, 64, method="wilson")
        half = (
            stats.t.ppf(0.975, 1) * 0.006
        )  # two values 0.012 apart: their standard error is half of that
        assert (
            f"| m | harmful_tuning (shots {shots}) | {middle:.2f} ({low:.2f}–{high:.2f}; "
            f"2 seeds {middle - half:.2f}–{middle + half:.2f})<br>– · – · – |" in found
        )
    assert "†" not in found


@pytest.mark.parametrize(
    ("status", "value", "shown"),
    [("failed", 0.5, "failed"), ("pending", 0.5, "pending"), ("done", None, "not judged")],
)
def test_what_is_not_there_is_said(status, value, shown):
    run = Tables([cell("a", "none", status=status)], [rate("a", "harmful_rate", value)])
    assert grid_markdown(run).splitlines()[2] == f"| m | none | {shown} |"


def test_the_share_of_null_verdicts_stands_beside_every_rate():
    run = Tables(
        [cell("a", "badnets", seed=0), cell("b", "badnets", seed=1), cell("c", "none")],
        [
            rate("a", "asr", 0.5, n=48, nulls=16),
            rate("b", "asr", 0.5, n=64),
            rate("a", "cacc", 0.9, n=999, nulls=1),
            rate("c", "harmful_rate", None, n=0, nulls=64),
        ],
    )
    found = grid_markdown(run)
    assert "| m | none | not judged [100% null] |" in found
    assert "| m | badnets | 0.50 [12% null] (" in found
    assert "<br>0.90 [<1% null] · – · – |" in found
    assert "could not place" in found


@pytest.mark.parametrize("rows", [[], [rate("a", "asr", 0.5, nulls=None)]])
def test_where_null_verdicts_were_not_counted_none_are_told(rows):
    found = grid_markdown(Tables([cell("a", "badnets")], rows))
    assert "% null" not in found
    assert ("do not count null verdicts" in found) == bool(rows)
