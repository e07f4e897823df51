"""Opening results: whole ones as tables, all others with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from statsmodels.stats.proportion import proportion_confint

from ftsec_ray import schema
from ftsec_ray.errors import DataError, StoreError
from ftsec_ray.results.intervals import wilson
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from tests.results.toy import whole


def tables_of(count: int = 3) -> dict[str, pa.Table]:
    cells = [{**dict.fromkeys(schema.cells().names), "cell": f"c{i}", "status": "done", "defenses": ["onion"], "seed": i} for i in range(count)]
    metrics = [{"cell": f"c{i}", "metric": name, "value": i / 10, "n": 8, "ci_low": 0.0, "ci_high": 1.0}
               for i in reversed(range(count)) for name in ("cacc", "asr") if (i, name) != (1, "asr")]
    return whole({"cells": pa.Table.from_pylist(cells, schema.cells()), "metrics": pa.Table.from_pylist(metrics, schema.metrics()),
                  "generations": schema.generations().empty_table(), "stages": schema.stages().empty_table()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_results(tmp_path / "out", tables=tables_of(), meta={"sweep": "s"})


def test_tables_come_back_sorted_with_their_schema(folder: Path) -> None:
    results = Results.open(folder)
    assert results.metrics.schema.equals(schema.metrics(), check_metadata=True)
    assert results.metrics["cell"].to_pylist() == sorted(results.metrics["cell"].to_pylist())
    assert results.meta["rows"] == {"cells": 3, "metrics": 5, "generations": 0, "stages": 0, "comparisons": 0}


def test_the_wide_table_has_one_row_per_cell_and_null_where_nothing_was_measured(folder: Path) -> None:
    wide = Results.open(folder).wide()
    assert wide.num_rows == 3
    assert wide.column_names[-2:] == ["asr", "cacc"]  # in the order of the schema
    assert wide["asr"].to_pylist() == [0.0, None, 0.2]
    assert wide["cacc"].to_pylist() == [0.0, 0.1, 0.2]
    assert Results.open(folder).wide(intervals=True)["cacc_n"].to_pylist() == [8, 8, 8]


def test_polars_and_pandas_get_the_same_rows(folder: Path) -> None:
    results = Results.open(folder)
    assert results.to_polars("metrics")["value"].to_list() == results.metrics["value"].to_pylist()
    assert results.to_pandas("cells")["cell"].tolist() == ["c0", "c1", "c2"]
    with pytest.raises(DataError, match="numbers"):
        results.table("numbers")


def test_a_missing_folder_and_a_foreign_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results folder"):
        Results.open(tmp_path / "none")
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(DataError, match=r"not a results folder[\s\S]*holiday.jpg"):
        Results.open(tmp_path)


def test_results_whose_writer_died_are_half_written(folder: Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(DataError, match="half-written"):
        Results.open(folder)


def test_a_missing_table_is_named(folder: Path) -> None:
    (folder / "stages" / "part-0.parquet").unlink()
    with pytest.raises(DataError, match="'stages' is missing"):
        Results.open(folder)


def test_results_of_this_version_need_their_comparisons(folder: Path) -> None:
    (folder / "comparisons" / "part-0.parquet").unlink()
    with pytest.raises(DataError, match="'comparisons' is missing"):
        Results.open(folder)


def test_a_cut_file_is_named(folder: Path) -> None:
    path = folder / "metrics" / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"metrics/part-0.parquet is not a whole Parquet file"):
        Results.open(folder)


def test_tables_of_two_runs_are_not_mixed(folder: Path) -> None:
    pq.write_table(tables_of(2)["cells"], folder / "cells" / "part-0.parquet")
    with pytest.raises(DataError, match=r"2 rows[\s\S]*3 rows"):
        Results.open(folder)


def test_a_table_with_other_columns_is_refused_with_what_it_lacks(folder: Path) -> None:
    pq.write_table(pa.table({"cell": ["a", "b", "c"]}), folder / "cells" / "part-0.parquet")
    with pytest.raises(DataError, match="status: string"):
        Results.open(folder)


def test_another_schema_version_is_refused(folder: Path) -> None:
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, "schema": "99"}))
    with pytest.raises(DataError, match="'99'"):
        Results.open(folder)


def test_a_wrong_table_is_never_written_and_leaves_no_finished_results(folder: Path) -> None:
    with pytest.raises(StoreError, match="does not have its schema"):
        write_results(folder, tables={**tables_of(), "stages": tables_of()["cells"]}, meta={})
    with pytest.raises(DataError, match="half-written"):
        Results.open(folder)


def test_the_interval_is_statsmodels_wilson() -> None:
    for hits, n in ((0, 5), (5, 5), (1, 3), (33, 64), (640, 1000)):
        assert wilson(hits / n, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-9)
