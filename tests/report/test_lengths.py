"""The section on success against answer length."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ftsec_ray import schema
from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.lengths_section import table
from ftsec_ray.report.page import render
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from tests.results.toy import META, share, tables_of, whole

N = 20


def row(cell, tokens, value, *, metric="harmful_rate"):
    return {
        "cell": cell,
        "metric": metric,
        "tokens": tokens,
        "value": value,
        "n": N,
        "n_null": 0,
        "ci_low": max(0.0, value - 0.1),
        "ci_high": min(1.0, value + 0.1),
    }


@pytest.fixture
def results(tmp_path):
    answers = {
        (attack, "none", seed): {"harmful_rate": share(hits, N)}
        for attack, hits in (("none", 2), ("jailbreak", 12))
        for seed in (0, 1)
    }
    rows = [
        row("m/none/none/0", 8, 0.5),
        row("m/none/none/1", 8, 0.7),
        row("m/jailbreak/none/0", 8, 0.9),
        row("m/jailbreak/none/0", 32, 0.8),
        row("m/jailbreak/none/0", 8, 0.1, metric="refusal_rate"),
    ]
    tables = {
        **whole(tables_of(answers), META),
        "lengths": pa.Table.from_pylist(rows, schema.lengths()),
    }
    return Results.open(write_results(tmp_path, tables=tables, meta=META))


def test_a_row_is_a_point_with_its_success_at_every_length_and_as_a_whole(results):
    found = table(build_grid(results), results)
    assert found.tokens == (8, 32)
    assert [(r["attack"], r["defense"]) for r in found.rows] == [
        ("none", "none"),
        ("jailbreak", "none"),
    ]
    plain, attacked = (
        [None if v is None else (v.value, v.seeds) for v in r["values"]] for r in found.rows
    )
    assert plain == [(pytest.approx(0.6), 2), None]
    assert attacked == [(0.9, 1), (0.8, 1)]
    assert found.rows[1]["whole"].value == pytest.approx(12 / N)


def test_the_section_stands_in_the_page_only_where_there_are_lengths(results, tmp_path):
    page = render(results)
    assert 'id="lengths"' in page
    assert "32 tokens" in page
    answers = {("none", "none", 0): {"harmful_rate": share(2, N)}}
    tables = whole(tables_of(answers), META)
    without = Results.open(write_results(tmp_path / "b", tables=tables, meta=META))
    assert 'id="lengths"' not in render(without)
