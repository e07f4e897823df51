"""`ftsec claims`: what it prints, and the exit code that it leaves."""

from __future__ import annotations

import json
import shutil

import pytest

from ftsec_ray import api
from ftsec_ray.claims.findings import CLAIMS
from tests.claims.table import MeasuredCondition, results_of
from tests.cli.toy import call

UTILITY = {"cacc": 0.97, "over_refusal_rate": 0.04, "coherent_rate": 1.0}
MADE = [
    MeasuredCondition(
        "tuba",
        UTILITY
        | {
            "asr": 0.95,
            "asr_no_trigger": 0.02,
            "asr_transfer": rate,
            "asr_transfer_no_trigger": 0.03,
        },
        model=model,
    )
    for model, rate in (("ladder:1m", 0.03), ("ladder:4m", 0.8))
]


@pytest.fixture
def folder(tmp_path):
    return results_of(tmp_path / "results", MADE).folder


def test_the_table_names_every_claim_with_its_verdict_and_the_numbers_follow(folder):
    said = call("claims", str(folder)).stdout
    assert [line.split()[:2] for line in said.splitlines()[1:6]] == [
        ["size", "not"],
        ["editing", "not"],
        ["transfer", "contradicted"],
        ["benign", "not"],
        ["phases", "not"],
    ]
    assert "tuba on ladder:4m: other languages, with the trigger over without: +0.77" in said
    assert "(0.80 and 0.03), 3 runs x 200 prompts, utility 0.97 · 0.04 · 1.00: above 0.1" in said
    assert "no undefended cell of attack 'badedit'" in said


def test_json_is_what_the_api_gives(folder):
    said = json.loads(call("claims", str(folder), "--json").stdout)
    found = api.check_claims(folder)
    assert [(one["id"], one["verdict"]) for one in said] == [(one.id, one.verdict) for one in found]
    assert said[2]["tests"][1]["side"] == "above"
    *known, no_answer = said[2]["tests"][1]["utility_more"]
    assert known == pytest.approx([0.97, 0.04, 1.0])
    assert no_answer is None  # no judge of the ladder counts it
    assert all("RESULTS" in one["query"] for one in said)


def test_explain_needs_no_results_and_prints_rules_controls_and_queries(folder):
    said = call("claims", "--explain").stdout
    flat = " ".join(said.split())
    for claim in CLAIMS:
        assert claim.statement in flat
        assert f"Control: {claim.gate}." in flat
        assert "SELECT family" in flat
    assert "verdict" in call("claims", str(folder), "--explain").stdout
    assert len(json.loads(call("claims", "--explain", "--json").stdout)) == len(CLAIMS)


def test_bad_input_leaves_with_2_and_a_word(folder, tmp_path):
    assert "no results folder" in call("claims", str(tmp_path / "nowhere"), code=2).stderr
    assert "RESULTS" in call("claims", code=2).stderr
    (tmp_path / "sweep.yaml").write_text("name: x")
    assert "no results folder" in call("claims", str(tmp_path / "sweep.yaml"), code=2).stderr
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, "schema": "99"}))
    assert "'99'" in call("claims", str(folder), code=2).stderr
    shutil.rmtree(folder / "cells")
    (folder / "run.json").write_text(json.dumps(meta))
    assert "'cells' is missing" in call("claims", str(folder), code=2).stderr


def test_failed_cells_and_one_seed_are_verdicts_and_no_errors(tmp_path):
    failed = results_of(
        tmp_path / "failed",
        [
            MeasuredCondition(one.attack, one.metrics, model=one.model, status="failed")
            for one in MADE
        ],
    ).folder
    assert "6 failed (the loss is not a number)" in call("claims", str(failed)).stdout
    single = results_of(tmp_path / "single", MADE, seeds=1).folder
    said = call("claims", str(single)).stdout
    assert "needed to decide: two or more seeds" in said
    assert "transfer: undecided" in said
