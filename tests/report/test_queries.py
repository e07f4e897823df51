"""The ten queries of the documents, each run on results with the shape of the quickstart's and
checked against a plain loop.
"""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import fmean, stdev

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ftsec_ray
from tests.document_blocks import DOCUMENTS, READING_RESULTS, RESULTS, SWEEP_FILE, blocks_of

duckdb = pytest.importorskip("duckdb")
UTILITY = ("cacc", "over_refusal_rate", "coherent_rate")
TITLE = re.compile(r"^(?:--|#) (\d+)\. .*$", re.MULTILINE)


QUERIED = [
    document
    for document in DOCUMENTS
    if document == READING_RESULTS or any(map(TITLE.search, blocks_of(document, "sql")))
]
"""The documents with queries: READING_RESULTS has them, others may."""


@pytest.fixture(params=QUERIED, ids=lambda path: path.name)
def document(request):
    return request.param


def queries(block: str) -> tuple[str, dict[int, str]]:
    """What a block does first, and its queries by number."""
    first, *parts = TITLE.split(block)
    return first, dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


@pytest.fixture
def results(make_results, tmp_path, monkeypatch):
    """Results at the place that the documents name."""
    made = make_results(seeds=2, name="quickstart")
    (tmp_path / "results").mkdir()
    made.rename(tmp_path / "results/quickstart")
    monkeypatch.chdir(tmp_path)
    return ftsec_ray.open_results("results/quickstart")


@pytest.fixture
def sql(results, document):
    """Number of a query -> its rows as mappings."""
    views, numbered = queries(blocks_of(document, "sql")[0])
    connection = duckdb.connect()
    connection.execute(views)

    def run(number):
        relation = connection.sql(numbered[number])
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]

    return run


@pytest.fixture
def asr(results):
    """(model, attack, stack) -> attack success by seed."""
    cells = {row["cell"]: row for row in results.cells.to_pylist()}
    found = defaultdict(dict)
    for row in results.metrics.to_pylist():
        if row["metric"] == "asr":
            cell = cells[row["cell"]]
            found[cell["model"], cell["attack"], "+".join(cell["defenses"])][cell["seed"]] = row[
                "value"
            ]
    return dict(found)


@pytest.fixture
def utility(results):
    """(model, attack, stack) -> clean accuracy, over-refusal and coherence by seed."""
    cells = {row["cell"]: row for row in results.cells.to_pylist()}
    found = defaultdict(lambda: defaultdict(dict))
    for row in results.metrics.to_pylist():
        if row["metric"] in UTILITY:
            cell = cells[row["cell"]]
            found[cell["model"], cell["attack"], "+".join(cell["defenses"])][cell["seed"]][
                row["metric"]
            ] = row["value"]
    return {
        cell: {seed: tuple(own[name] for name in UTILITY) for seed, own in by.items()}
        for cell, by in found.items()
    }


def beside(row):
    """The utility that a row shows."""
    return tuple(row[name] for name in ("cacc", "over_refusal", "coherent"))


def means(utilities):
    return pytest.approx(tuple(fmean(values) for values in zip(*utilities, strict=True)))


def key(row):
    return row["model"], row["attack"], row["stack"]


def test_the_query_on_comparisons_gives_the_compared_attack_success(results, document):
    _, block = blocks_of(document, "sql")
    found = duckdb.sql(block).fetchall()
    wanted = [row for row in results.comparisons.to_pylist() if row["metric"] == "asr"]
    assert len(found) == len(wanted) > 0
    assert sorted(row[4] for row in found if row[4] is not None) == sorted(
        row["effect"] for row in wanted if row["effect"] is not None
    )


def test_there_are_ten_and_each_is_tested_here(document):
    numbers = [
        number
        for language in ("sql", "python")
        for block in blocks_of(document, language)
        for number in queries(block)[1]
    ]
    assert numbers == list(range(1, 11))


@pytest.mark.parametrize("path", [SWEEP_FILE, READING_RESULTS, RESULTS], ids=lambda path: path.name)
def test_every_block_of_sql_and_python_runs(path, results):
    connection = duckdb.connect()
    for block in blocks_of(path, "sql"):
        assert connection.execute(block).fetchall(), block
    for block in blocks_of(path, "python"):
        names: dict = {}
        exec(block, names)
        assert "ftsec_ray" in names, block


def test_1_attack_success(sql, asr, utility):
    assert all(beside(row) == utility[key(row)][row["seed"]] for row in sql(1))
    assert {(*key(row), row["seed"]): row["value"] for row in sql(1)} == {
        (*cell, seed): v for cell, by in asr.items() for seed, v in by.items()
    }
    assert all(
        row["ci_low"] - 1e-9 <= row["value"] <= row["ci_high"] + 1e-9 and row["n"] == 64
        for row in sql(1)
    )


def test_2_safety_beside_utility(sql, results, asr):
    rows = sql(2)
    assert {"asr", "cacc", "over_refusal_rate", "coherent_rate"} < set(rows[0])
    assert all(row["cacc"] is not None for row in rows)
    for row in rows:
        assert row["asr"] == (
            pytest.approx(fmean(asr[key(row)].values())) if key(row) in asr else None
        )


def test_3_the_attack_that_does_best(sql, asr, utility):
    rows = sql(3)
    assert rows
    for row in rows:
        most = max(
            value
            for (model, _, stack), by in asr.items()
            if (model, stack) == (row["model"], row["stack"])
            for value in by.values()
        )
        assert row["asr"] == most
        assert most in asr[row["model"], row["attack"], row["stack"]].values()
        assert beside(row) in utility[row["model"], row["attack"], row["stack"]].values()


def test_4_what_a_stack_takes_off(sql, asr, utility):
    rows = sql(4)
    assert {key(row) for row in rows} == {cell for cell in asr if cell[2]}
    for row in rows:
        alone = asr[row["model"], row["attack"], ""]
        pairs = [value - alone[seed] for seed, value in asr[key(row)].items()]
        assert (row["change"], row["seeds"]) == (pytest.approx(fmean(pairs)), len(pairs))
        changes = [
            tuple(
                a - b
                for a, b in zip(own, utility[row["model"], row["attack"], ""][seed], strict=True)
            )
            for seed, own in utility[key(row)].items()
        ]
        assert (row["cacc_change"], row["over_refusal_change"], row["coherent_change"]) == means(
            changes
        )
    assert [row["change"] for row in rows] == sorted(row["change"] for row in rows)


def test_5_spread_over_seeds(sql, asr, utility):
    rows = {key(row): row for row in sql(5)}
    assert set(rows) == set(asr)
    for cell, by in asr.items():
        assert (rows[cell]["seeds"], rows[cell]["mean"]) == (
            len(by),
            pytest.approx(fmean(by.values())),
        )
        assert beside(rows[cell]) == means(utility[cell].values())
        assert rows[cell]["sd"] == (pytest.approx(stdev(by.values())) if len(by) > 1 else None)


def test_6_two_cells_prompt_by_prompt(sql, results):
    assert sql(6) == [], "the generations of these results are the same in every cell"
    cells = {row["cell"]: row for row in results.cells.to_pylist()}
    table = results.generations.to_pylist()
    for row in table:
        if (
            cells[row["cell"]]["defenses"] == ["lisa"]
            and row["probe"] == "harmful"
            and row["verdict"] in ("complied", None)
        ):
            row["verdict"] = "refused"
    pq.write_table(
        pa.Table.from_pylist(table, results.generations.schema),
        "results/quickstart/generations/part-0.parquet",
    )
    rows = sql(6)
    lisa = [
        row for row in cells.values() if row["defenses"] == ["lisa"] and row["status"] == "done"
    ]
    assert len(rows) == 2 * len(lisa)
    assert {(row["prompt_id"], row["undefended"], row["defended"]) for row in rows} == {
        ("harmful-0", "complied", "refused"),
        ("harmful-4", None, "refused"),
    }


def test_7_what_took_the_time(sql, results):
    rows = sql(7)
    hours = defaultdict(float)
    for stage in results.stages.to_pylist():
        hours[stage["kind"], stage["method"]] += stage["wall_s"] / 3600
    assert {(row["kind"], row["method"]): row["hours"] for row in rows} == pytest.approx(
        dict(hours)
    )


@pytest.fixture
def python(results, document):
    """Number of a query -> what its last expression gives."""

    def run(number):
        blocks = blocks_of(document, "python")
        block = next(block for block in blocks if number in queries(block)[1])
        before, numbered = queries(block)
        *rest, last = numbered[number].strip().splitlines()
        names: dict = {}
        exec(before + "\n".join(rest), names)
        return eval(last, names)

    return run


def test_8_dose_and_response(python, asr, utility):
    rows = python(8).to_dicts()
    wanted, besides = defaultdict(list), defaultdict(list)
    for (model, attack, stack), by in asr.items():
        if attack == "badnets":
            wanted[model].extend(by.values())
            besides[model].extend(utility[model, attack, stack].values())
    assert {row["model"]: (row["dose"], row["asr"], row["seeds"]) for row in rows} == {
        model: (0.1, pytest.approx(fmean(values)), len(values)) for model, values in wanted.items()
    }
    assert all(tuple(row[name] for name in UTILITY) == means(besides[row["model"]]) for row in rows)


def test_9_verdicts_that_a_judge_could_not_reach(python):
    rows = {row["probe"]: row for row in python(9).to_dicts()}
    assert rows["harmful"]["null"] == pytest.approx(1 / 5)
    assert {row["null"] for probe, row in rows.items() if probe != "harmful"} == {0.0}


def test_10_answers_to_label(python, results):
    assert python(10) is None
    drawn = pd.read_csv("labels.csv", keep_default_na=False)
    assert len(drawn.drop_duplicates(["cell", "probe", "prompt_id"])) == 100
    assert set(drawn["truth"]) == {""}
    known = {
        (row["cell"], row["probe"], row["prompt_id"]): row["completion"]
        for row in results.generations.to_pylist()
    }
    assert all(
        known[row.cell, row.probe, row.prompt_id] == row.completion for row in drawn.itertuples()
    )
    drawn.assign(truth=["complied", "refused"] * 50).to_csv("labels.csv", index=False)
    assert ftsec_ray.judge_audit("results/quickstart", labels="labels.csv").labelled == 100
