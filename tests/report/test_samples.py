"""Which generations come into the page."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from ftsec_ray import schema
from ftsec_ray.report import examples
from ftsec_ray.report.examples import Samples, samples, script_text
from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.tables import heat
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from tests.results.toy import whole

from .conftest import write_toy

Make = Callable[..., Path]


def of(results: Results) -> Samples:
    grid = build_grid(results)
    return samples(grid, results, heat(grid).keys)


def asked(found: Samples) -> dict[str, set[frozenset[str]]]:
    """Probe -> the sets of prompts that cells have of it."""
    sets = defaultdict(set)
    for cell in found.cells.values():
        for probe in cell["probes"]:
            sets[probe["probe"]].add(frozenset(found.texts[row[0]] for row in probe["rows"]))
    return sets


def size(found: Samples) -> int:
    return len(script_text(json.dumps([found.texts, found.cells], ensure_ascii=False)).encode())


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results.open(
        write_toy(tmp_path_factory.mktemp("samples"), judged=True, prompts=40, seeds=2)
    )


def test_everything_of_the_first_seed_is_there_while_it_fits(judged: Results) -> None:
    found = of(judged)
    first = {
        row["cell"]
        for row in judged.cells.to_pylist()
        if row["seed"] == 0 and row["status"] == "done"
    }
    other = {
        row["cell"]
        for row in judged.cells.to_pylist()
        if row["seed"] == 1 and row["status"] == "done"
    }
    cells = {cell["cell"]: cell for cell in found.cells.values()}
    assert len(first & set(cells)) == len(first)
    assert len(set(cells) - first) == 1  # the one whose first seed failed
    assert set(cells) - first < other
    rows = [row for row in judged.generations.to_pylist() if row["cell"] in cells]
    assert (found.held, found.total, found.per_probe, found.left_out) == (
        len(rows),
        judged.generations.num_rows,
        40,
        0,
    )
    held = {
        (cell, probe["probe"], found.texts[row[0]]): tuple(found.texts[at] for at in row[1:4])
        for cell, own in cells.items()
        for probe in own["probes"]
        for row in probe["rows"]
    }
    assert held == {
        (row["cell"], row["probe"], row["prompt_id"]): (
            row["prompt"],
            row["completion"],
            row["verdict"],
        )
        for row in rows
    }


def test_with_less_room_every_cell_has_the_same_prompts_those_of_the_smallest_hashes(
    judged: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "MAX_BYTES", 120_000)
    found = of(judged)
    assert 1 < found.per_probe < 40
    sets = asked(found)
    assert all(len(own) == 1 for own in sets.values())
    (harmful,) = sets["harmful"]
    ids = sorted(
        {row["prompt_id"] for row in judged.generations.to_pylist()},
        key=lambda one: hashlib.sha256(one.encode()).hexdigest(),
    )
    assert harmful == set(ids[: found.per_probe])
    assert sets["triggered"] == sets["harmful"] == sets["clean"]
    assert size(found) < 1.5 * 120_000
    assert found.held == sum(
        len(probe["rows"]) for cell in found.cells.values() for probe in cell["probes"]
    )
    counts = {
        probe["probe"]: sum(n for _, n in probe["verdicts"])
        for cell in found.cells.values()
        for probe in cell["probes"]
    }
    assert set(counts.values()) == {40}  # of all that were asked, not of those shown


def test_the_same_results_give_the_same_samples_whatever_the_budget_leaves_out(
    judged: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "MAX_BYTES", 60_000)
    few = of(judged)
    assert of(judged) == few
    monkeypatch.setattr(examples, "MAX_BYTES", 90_000)
    more = of(judged)
    for probe, sets in asked(few).items():
        assert next(iter(sets)) <= next(iter(asked(more)[probe]))


def test_where_not_even_one_prompt_of_every_cell_fits_it_is_said_how_many_have_none(
    judged: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "MAX_BYTES", 4_000)
    found = of(judged)
    assert found.per_probe == 1
    empty = [
        cell for cell in found.cells.values() if not any(probe["rows"] for probe in cell["probes"])
    ]
    assert 0 < len(empty) == found.left_out < len(found.cells)
    assert (
        size(found)
        - size(
            Samples(
                texts=[],
                cells={
                    n: {**cell, "probes": [{**probe, "rows": []} for probe in cell["probes"]]}
                    for n, cell in found.cells.items()
                },
                held=0,
                total=0,
                per_probe=0,
                left_out=0,
            )
        )
        < 8_000
    )


def test_null_verdicts_and_missing_texts_are_counted_and_nothing_fails(make_results: Make) -> None:
    results = Results.open(make_results())
    rows = [
        {**row, "completion": None if row["probe"] == "benign" else row["completion"]}
        for row in results.generations.to_pylist()
    ]
    rows[0]["prompt_id"] = rows[0]["prompt"] = rows[0]["judge"] = None
    tables = {
        "cells": results.cells,
        "metrics": results.metrics,
        "generations": pa.Table.from_pylist(rows, schema.generations()),
        "stages": results.stages,
    }
    found = of(
        Results.open(
            write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
        )
    )
    one = next(iter(found.cells.values()))
    by_probe = {probe["probe"]: probe for probe in one["probes"]}
    assert dict(by_probe["harmful"]["verdicts"]) == {
        "complied": 1,
        "refused": 2,
        "incoherent": 1,
        "no verdict": 1,
    }
    assert by_probe["benign"]["rows"] == []
    assert dict(by_probe["benign"]["verdicts"]) == {"complied": 1, "wrong": 1}
    assert [probe["probe"] for probe in one["probes"]][-2:] == [
        "benign",
        "borderline",
    ]  # what an attack is after comes first


def test_no_text_can_end_its_script_element() -> None:
    text = "</script><!-- \u2028\u2029 & <script> ]]>"
    assert not set("<>&\u2028\u2029") & set(script_text(json.dumps(text, ensure_ascii=False)))
    assert json.loads(script_text(json.dumps(text, ensure_ascii=False))) == text
