"""Opening results: whole ones as tables, all others with what is wrong."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from statsmodels.stats.proportion import proportion_confint

from ftsec_ray import api, schema
from ftsec_ray.errors import DataError, EnvironmentFault, StoreError
from ftsec_ray.measured import wilson
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.results import read
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import table_schema, write_results
from tests.results import toy
from tests.results.toy import META, whole


def tables_of(count: int = 3) -> dict[str, pa.Table]:
    cells = [
        {
            **dict.fromkeys(schema.cells().names),
            "cell": f"c{i}",
            "status": "done",
            "defenses": ["onion"],
            "seed": i,
        }
        for i in range(count)
    ]
    metrics = [
        {"cell": f"c{i}", "metric": name, "value": i / 10, "n": 8, "ci_low": 0.0, "ci_high": 1.0}
        for i in reversed(range(count))
        for name in ("cacc", "asr")
        if (i, name) != (1, "asr")
    ]
    return whole(
        {
            "cells": pa.Table.from_pylist(cells, schema.cells()),
            "metrics": pa.Table.from_pylist(metrics, schema.metrics()),
            "generations": schema.generations().empty_table(),
            "stages": schema.stages().empty_table(),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_results(tmp_path / "out", tables=tables_of(), meta={"sweep": "s"})


def test_tables_come_back_sorted_with_their_schema(folder: Path) -> None:
    results = Results.open(folder)
    assert results.metrics.schema.equals(schema.metrics(), check_metadata=True)
    assert results.metrics["cell"].to_pylist() == sorted(results.metrics["cell"].to_pylist())
    assert results.meta["rows"] == {
        "cells": 3,
        "metrics": 5,
        "generations": 0,
        "stages": 0,
        "comparisons": 0,
        "searches": 0,
        "lengths": 0,
    }


def test_the_wide_table_has_one_row_per_cell_and_null_where_nothing_was_measured(
    folder: Path,
) -> None:
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
    with pytest.raises(DataError, match="incomplete"):
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
    with pytest.raises(DataError, match=r"metrics/part-0.parquet is not an undamaged Parquet file"):
        Results.open(folder)


@pytest.mark.parametrize("name", ["cells", "metrics", "generations", "comparisons"])
def test_rows_that_are_damaged_behind_a_whole_footer_are_named(tmp_path: Path, name: str) -> None:
    toy.results_of(tmp_path, {("poison", stack, 0): {"asr": "1100"} for stack in ("none", "guard")})
    path = tmp_path / name / "part-0.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(DataError, match=rf"the rows of .*{name}/part-0.parquet cannot be read"):
        Results.open(tmp_path).table(name)


def test_parquet_of_others_beside_a_table_is_named(folder: Path) -> None:
    pq.write_table(tables_of(1)["cells"], folder / "cells" / "mine.parquet")
    with pytest.raises(DataError, match=r"the table 'cells' holds files[\s\S]*mine.parquet"):
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


@pytest.mark.parametrize("version", [None, 1, "0", "1.5", "newest", "", ["1"]])
def test_a_schema_version_that_is_none_is_refused(folder: Path, version: object) -> None:
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, "schema": version}))
    with pytest.raises(DataError, match="schema version that this ftsec_ray does not know"):
        Results.open(folder)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> str:
    """The schema as a later version may have it: one more column of cells, and one more table;
    returns the version before it.
    """
    now = schema.SCHEMA_VERSION
    new = str(int(now) + 1)
    extra = schema._schema("extra", [schema._field("cell", pa.string(), nullable=False)], since=new)
    cells = schema.cells().append(schema._field("judged_by", pa.string(), "name", since=new))
    real = read.table_schema
    monkeypatch.setattr(schema, "SCHEMA_VERSION", new)
    monkeypatch.setattr(read, "TABLES", (*read.TABLES, "extra"))
    monkeypatch.setattr(
        read, "table_schema", lambda name: {"extra": extra, "cells": cells}.get(name) or real(name)
    )
    return now


def all_tables() -> dict[str, pa.Table]:
    return {**tables_of(), "lengths": schema.lengths().empty_table()}


def by_hand(folder: Path, tables: dict[str, pa.Table], version: str) -> Path:
    """A results folder written without the package."""
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(table, folder / name / "part-0.parquet")
    (folder / "run.json").write_text(
        json.dumps(
            {"schema": version, "rows": {name: table.num_rows for name, table in tables.items()}}
        )
    )
    return folder


def test_results_of_an_older_version_open_with_null_and_nothing_where_something_came_later(
    tmp_path: Path, later: str
) -> None:
    results = Results.open(by_hand(tmp_path / "old", all_tables(), later))
    assert results.cells.column_names == [*schema.cells().names, "judged_by"]
    assert results.cells["judged_by"].to_pylist() == [None] * 3
    assert results.cells["cell"].to_pylist() == ["c0", "c1", "c2"]
    assert results.metrics.num_rows == 5
    assert (results.table("extra").num_rows, results.table("extra").column_names) == (0, ["cell"])
    assert results.to_polars("cells")["judged_by"].null_count() == 3
    assert results.wide().num_rows == 3


def test_older_results_must_still_be_whole_and_newer_ones_may_not_lack_what_came(
    tmp_path: Path, later: str
) -> None:
    lacks = {**tables_of(), "cells": tables_of()["cells"].drop_columns(["seed"])}
    with pytest.raises(DataError, match="seed: int64"):
        Results.open(by_hand(tmp_path / "lacks", lacks, later))
    with pytest.raises(DataError, match="judged_by: string"):
        Results.open(by_hand(tmp_path / "claims", tables_of(), schema.SCHEMA_VERSION))
    grown = tables_of()["cells"].append_column("judged_by", pa.nulls(3, pa.string()))
    with pytest.raises(DataError, match="'extra' is missing"):
        Results.open(
            by_hand(tmp_path / "half", {**all_tables(), "cells": grown}, schema.SCHEMA_VERSION)
        )


OLD = {
    "1": ("cells", "metrics", "generations", "stages"),
    "2": ("cells", "metrics", "generations", "stages", "comparisons"),
}
"""Version -> its tables."""


@pytest.mark.parametrize("version", OLD)
def test_results_from_before_null_verdicts_were_counted_open_without_their_number(
    tmp_path: Path, version: str
) -> None:
    new = toy.tables_of(
        {
            ("poison", stack, seed): {"asr": said, "cacc": "1111"}
            for stack, said in (("none", "111?"), ("guard", "00??"))
            for seed in (0, 1)
        }
    )
    held = {name: schema.as_of(table_schema(name), version) for name in OLD[version]}
    assert held["metrics"].names == ["cell", "metric", "value", "n", "ci_low", "ci_high"]
    old = {name: whole(new, META)[name].select(held[name].names) for name in OLD[version]}
    results = Results.open(by_hand(tmp_path / "old", old, version))
    assert results.metrics.schema.equals(schema.metrics())
    assert set(results.metrics["n_null"].to_pylist()) == {None}
    assert set(results.aggregated["n_null"].to_pylist()) == {None}
    assert {(row["n_null"], row["n_null_against"]) for row in results.comparisons.to_pylist()} == {
        (None, None)
    }
    assert results.wide(intervals=True)["asr_n_null"].to_pylist() == [None] * 4
    assert "null verdicts" in grid_markdown(results)
    assert {one.verdict for one in api.check_claims(results)} <= {"not tested", "undecided"}


def test_a_wrong_table_is_never_written_and_leaves_no_finished_results(folder: Path) -> None:
    with pytest.raises(StoreError, match="does not have its schema"):
        write_results(folder, tables={**tables_of(), "stages": tables_of()["cells"]}, meta={})
    with pytest.raises(DataError, match="incomplete"):
        Results.open(folder)


def test_a_disk_that_takes_no_more_is_told_and_nothing_half_written_counts(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        EnvironmentFault, match=r"cannot be written to .*file/out[\s\S]*ftsec report SWEEP"
    ):
        write_results(tmp_path / "file" / "out", tables=tables_of(), meta={})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (500, hard)
    )  # a write beyond it fails in the kernel, as on a full disk
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            write_results(folder, tables=tables_of(), meta={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(DataError, match="incomplete"):
        Results.open(folder)
    write_results(folder, tables=tables_of(), meta={})
    assert Results.open(folder).cells.num_rows == 3


def test_the_interval_is_statsmodels_wilson() -> None:
    for hits, n in ((0, 5), (5, 5), (1, 3), (33, 64), (640, 1000)):
        assert wilson(hits / n, n) == pytest.approx(
            proportion_confint(hits, n, method="wilson"), abs=1e-9
        )
