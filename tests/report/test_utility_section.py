"""Benchmarks and held-out loss on the page and in Markdown: every point that measured them, with its interval."""

from __future__ import annotations

import pytest

from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.report.utility_section import utility_rows
from ftsec_ray.results.read import Results
from tests.report import conftest
from tests.report.test_page import data_of, page_of

ACC = "benchmark:words:acc"


@pytest.fixture
def measured(make_results, monkeypatch):
    def beside(cell, attack, defense):
        if defense not in ("none", "lisa"):
            return []
        value = 0.61 if defense == "none" else 0.43
        row = {"cell": cell, "metric": ACC, "value": value, "n": 120}
        ends = {"ci_low": value - 0.08, "ci_high": value + 0.08}
        loss = {"metric": "answer_loss", "value": 1.25, "n": 900, "ci_low": 1.1, "ci_high": 1.4}
        return [{**row, **ends}, {"cell": cell, **loss}]

    monkeypatch.setattr(conftest, "_alarms", beside)
    return make_results()


def test_every_point_that_measured_them_has_a_row_beside_the_clean_tune(measured):
    rows = utility_rows(build_grid(Results.open(measured)))
    acc = [row for row in rows if row["metric"] == "words:acc"]
    assert {row["defense"] for row in acc} == {"none", "lisa"}
    assert {row["better"] for row in acc} == {"higher"}
    lisa = next(row for row in acc if (row["attack"], row["defense"]) == ("badnets", "lisa"))
    assert (lisa["value"].value, lisa["value"].n) == (0.43, 120)
    assert lisa["clean"].value == 0.61
    losses = [row for row in rows if row["metric"] == "answer_loss"]
    assert {row["better"] for row in losses} == {"lower"}
    assert len(losses) == len(acc)


def test_the_page_has_a_section_and_a_metric_of_the_heatmap_for_them(measured):
    page = page_of(measured)
    assert "benchmarks" in {attrs.get("id") for attrs in page.named("section")}
    assert "words:acc" in page.whole
    assert "0.43" in page.whole
    (legend,) = [one for one in data_of(page)["metrics"] if one["name"] == ACC]
    assert legend["meaning"] == "acc on the benchmark words of lm-eval"
    assert (legend["good"], legend["bad"]) == ("1", "0")


def test_without_them_there_is_neither(make_results):
    folder = make_results()
    assert "benchmarks" not in {attrs.get("id") for attrs in page_of(folder).named("section")}
    assert "benchmark" not in grid_markdown(Results.open(folder)).lower()


def test_markdown_has_a_table_of_their_own(measured):
    text = grid_markdown(Results.open(measured))
    assert "| answer_loss (lower is better) | words:acc (higher is better) |" in text
    assert "| lisa | 1.25 (1.10–1.40; n 900) | 0.43 (0.35–0.51; n 120) |" in text
