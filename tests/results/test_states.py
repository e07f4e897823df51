"""Results in every state that a sweep may leave, through everything that reads them: each answers
in words, and nothing divides by zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ftsec_ray import api
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.report.page import render
from ftsec_ray.results.read import Results
from tests.cli.toy import call
from tests.results.toy import Answers, results_of

JUDGED = {
    "asr": "110010",
    "harmful_rate": "000000",
    "cacc": "111111",
    "coherent_rate": "111111",
    "over_refusal_rate": "000001",
}
ANSWERS: Answers = {
    ("poison", stack, seed): JUDGED
    for stack in ("none", "guard", "filter+guard", "look")
    for seed in (0, 1)
}
UNJUDGED: Answers = {
    key: {name: "?" * len(said) for name, said in own.items()} for key, own in ANSWERS.items()
}
STATES: dict[str, tuple[Answers, dict[tuple[str, str, int], str], str]] = {
    "whole": (ANSWERS, {}, "0.50 ("),
    "one seed": ({key: own for key, own in ANSWERS.items() if key[2] == 0}, {}, "0.50†"),
    "nothing judged": (UNJUDGED, {}, "not judged [100% null]"),
    "undefended not judged": (
        {key: own if key[1] != "none" else UNJUDGED[key] for key, own in ANSWERS.items()},
        {},
        "not judged [100% null]",
    ),
    "all failed": ({}, dict.fromkeys(ANSWERS, "failed"), "failed"),
    "all pending": ({}, dict.fromkeys(ANSWERS, "pending"), "pending"),
    "a seed failed": (
        {key: own for key, own in ANSWERS.items() if key[2] == 0},
        {key: "failed" for key in ANSWERS if key[2] == 1},
        "failed",
    ),
    "no cells": ({}, {}, "| model | attack |"),
}
"""State -> answers, statuses of cells without any, and what the table says."""
TOLD = {
    "whole": (
        "not known 0.50, base rate not measured – accuracy 1.00 · over-refusal 0.17 · coherent 1.00"
        " · 0 % null 2 seeds"
    ),
    "one seed": "Every point of this sweep was run with a single seed.",
    "nothing judged": "poison pre – no metrics – no metrics",
    "undefended not judged": "not judged n 0 · 100 % null 2 seeds",
    "all failed": "0 of 8 cells done · 8 failed",
    "all pending": "0 of 8 cells done · 8 pending",
    "a seed failed": "0 % null 1 seed 1.00 · 0.17 · 1.00 1 of 2 seeds",
    "no cells": "0 of 0 cells done",
}
"""State -> what the page says of it, and of no other."""


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Results]:
    answers, statuses, _ = STATES[request.param]
    results = results_of(tmp_path / "made", answers, statuses=statuses)
    meta = json.loads((results.folder / "run.json").read_text())
    told = {**meta, "sweep_text": "", "versions": {}, "counts": {}}
    (results.folder / "run.json").write_text(json.dumps(told))
    return request.param, Results.open(results.folder)


def test_the_table_says_what_there_is(state: tuple[str, Results]) -> None:
    name, results = state
    assert STATES[name][2] in grid_markdown(results)


def test_the_page_says_what_there_is(state: tuple[str, Results]) -> None:
    name, results = state
    page = render(results)
    text = " ".join(
        re.sub(r"<[^>]+>", " ", page[page.index("<body>") : page.index("<dialog")]).split()
    )
    assert [one for one, phrase in TOLD.items() if phrase in text] == [name]


@pytest.mark.parametrize(
    "read",
    [
        lambda one: one.aggregated,
        lambda one: one.compared("holm"),
        lambda one: one.wide(intervals=True),
    ],
)
def test_every_number_is_null_or_finite(
    state: tuple[str, Results], read: Callable[[Results], object]
) -> None:
    _, results = state
    table = read(results)
    for name in table.column_names:  # type: ignore[attr-defined]
        assert all(
            value == value for value in table[name].to_pylist() if isinstance(value, float)
        ), name  # type: ignore[index]  # noqa: PLR0124


def test_pairs_without_an_answer_on_both_sides_say_why(state: tuple[str, Results]) -> None:
    name, results = state
    rows = [
        row for row in results.comparisons.to_pylist() if row["metric"] in ("asr", "harmful_rate")
    ]
    assert bool(rows) == (name != "no cells")
    for row in rows:
        assert (row["q"] is None) == bool(
            row["note"] and not row["note"].endswith("seeds have both")
        ), row
    if name == "undefended not judged":
        assert {row["note"] for row in rows if row["kind"] == "none"} == {
            "no judged answer of `against`"
        }


def test_claims_and_an_audit_leave_with_a_word(state: tuple[str, Results]) -> None:
    name, results = state
    said = json.loads(call("claims", str(results.folder), "--json").stdout)
    assert {one["verdict"] for one in said} <= {"not tested", "undecided"}
    assert all(one["why"] for one in said)
    found = [one for one in api.check_claims(results) if one.verdict == "undecided"]
    assert all(one.decide for one in found)
    if name in ("all failed", "all pending", "no cells"):
        assert (
            "the results hold no answer"
            in call("judge-audit", str(results.folder), "--exact", code=1).stderr
        )
    else:
        said = json.loads(
            call("judge-audit", str(results.folder), "--judge", "refusal_phrases", "--json").stdout
        )["rates"]
        unjudged = {one["cell"] for one in said if one["judge"] == "j@1" and one["null_share"] == 1}
        assert unjudged == {
            cell
            for cell in results.cells["cell"].to_pylist()
            if name == "nothing judged" or (name == "undefended not judged" and "/none/" in cell)
        }
        assert all(
            one["raw"]["value"] is None and one["corrected"] is None
            for one in said
            if one["null_share"] == 1
        )
        call("judge-audit", str(results.folder), "--judge", "refusal_phrases")
