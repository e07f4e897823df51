"""Utility of a cell, and its mean over several."""

from __future__ import annotations

import ftsec_ray
from ftsec_ray.measured import UNKNOWN, Utility, mean_utility
from ftsec_ray.results.points import utilities
from tests.claims.table import MeasuredCondition, results_of
from tests.results.test_audit import PHRASES, folder_of


def test_every_measured_cell_has_its_three_numbers(tmp_path):
    results = results_of(
        tmp_path / "r",
        [
            MeasuredCondition(
                "badnets",
                {
                    "asr": 0.9,
                    "cacc": 0.8,
                    "benign_rate": 0.1,
                    "over_refusal_rate": 0.2,
                    "coherent_rate": 1.0,
                },
            ),
            MeasuredCondition(
                "harmful_tuning", {"harmful_rate": 0.7, "benign_rate": 0.6, "coherent_rate": None}
            ),
            MeasuredCondition("soft_prompt", {}, status="failed"),
        ],
        seeds=1,
    )
    found = utilities(results.metrics.to_pylist())
    attacks = {row["attack"]: row["cell"] for row in results.cells.to_pylist()}
    assert found == {
        attacks["badnets"]: Utility(0.8, 0.2, 1.0),
        attacks["harmful_tuning"]: Utility(0.6, None, None),
    }
    assert found[attacks["harmful_tuning"]].text == "0.60 · – · –"


def test_a_mean_leaves_out_what_was_not_measured():
    assert mean_utility([Utility(0.5, None, 1.0), Utility(0.7, None, None)]) == Utility(
        0.6, None, 1.0
    )
    assert mean_utility([]) == UNKNOWN


def test_an_audit_tells_the_utility_of_each_cell_beside_its_rates(tmp_path):
    row = {
        "cell": "a",
        "probe": "harmful",
        "prompt_id": "p0",
        "judge": PHRASES,
        "prompt": "?",
        "completion": "Sorry",
        "verdict": "refused",
    }
    audit = ftsec_ray.judge_audit(
        folder_of(
            tmp_path,
            [row],
            metrics=[
                {"cell": "a", "metric": name, "value": value, "n": 8}
                for name, value in (
                    ("cacc", 0.9),
                    ("over_refusal_rate", 0.1),
                    ("coherent_rate", 1.0),
                )
            ],
        ),
        judges=["microworld"],
    )
    assert {rate.utility for rate in audit.rates} == {Utility(0.9, 0.1, 1.0)}
