"""What stages warn of stands behind a run, in `status`, in the tables and in both reports."""

from __future__ import annotations

import json

import pytest

from ftsec_ray import api
from tests.cli import toy
from tests.cli.toy import SWEEP, call

TEXT = "3 of 8 prompts of `test` <b>are</b> tuned on"
LINE = f"warning: {TEXT} (task: 1 stage, 6 cells)"


@pytest.fixture
def folder(workplace):
    (workplace / "small.yaml").write_text(SWEEP)
    toy.warned.update({"task": [TEXT], "revise": ["the weights are small"]})
    return workplace


def test_run_status_and_report_show_each_warning_once_with_its_stages_and_cells(folder):
    told = "warning: the weights are small (revise shrink: 3 stages, 3 cells)"
    for result in (
        call("run", "small.yaml"),
        call("run", "small.yaml"),
        call("plan", "small.yaml"),
        call("status", "small.yaml"),
        call("report", "small.yaml"),
    ):
        lines = result.stdout.splitlines()
        assert lines.count(LINE) == lines.count(told) == 1
        assert lines.index(LINE) < lines.index(told), "those of most cells come first"


def test_the_warnings_are_in_the_results_the_json_and_both_reports_as_text(folder):
    call("run", "small.yaml")
    kept = api.open_results("results/small").meta["warnings"]
    assert kept[0] == {"text": TEXT, "stages": 1, "cells": 6, "places": ["task"]}
    assert json.loads(call("status", "small.yaml", "--json").stdout)["warnings"] == kept
    page = (folder / "results/small/report.html").read_text(encoding="utf-8")
    assert "3 of 8 prompts of `test` &lt;b&gt;are&lt;/b&gt; tuned on" in page
    assert "revise shrink: 3 stages, 3 cells" in page
    shown = call("report", "small.yaml", "--markdown").stdout
    assert r"- warning: 3 of 8 prompts of \`test\` \<b\>are\</b\> tuned on (task: 1 stage" in shown


def test_a_sweep_without_warnings_says_nothing_of_them(folder):
    toy.warned.clear()
    assert "warning" not in call("run", "small.yaml").stdout
    assert 'id="warnings"' not in (folder / "results/small/report.html").read_text(encoding="utf-8")
    assert "warning" not in call("report", "small.yaml", "--markdown").stdout


def test_more_warnings_than_a_screen_holds_are_counted(folder):
    toy.warned["task"] = [f"number {i:02d}" for i in range(30)]
    lines = call("run", "small.yaml").stdout.splitlines()
    assert sum(line.startswith("warning: ") for line in lines) == 20
    assert "and 11 more warnings in run.json" in lines
