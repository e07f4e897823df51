"""Small files of rows that are large in memory: each is refused by a limit that the error names."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray.config.sweep import SourceSpec
from ftsec_ray.data.raw_files import holds_more
from ftsec_ray.data.records import read_records
from ftsec_ray.data.sources import read_source
from ftsec_ray.errors import DataError


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_records(str(path))
    return str(caught.value)


def equal_rows(path: Path, value: object, rows: int) -> Path:
    """A Parquet file that says a value once and a number of rows of it."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    pq.write_table(pa.table({"prompt": column}), path, dictionary_pagesize_limit=2**24)
    return path


def test_a_gzip_unpacks_to_so_many_times_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("ftsec_ray.data.raw_files._FREE_BYTES", 1000)
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"x\n" * 2**21))
    told = fault(file)
    assert "too large when unpacked" in told
    assert "set the environment variable FTSEC_MAX_DATA_RATIO" in told
    monkeypatch.setenv("FTSEC_MAX_DATA_RATIO", "2000")
    monkeypatch.setenv("FTSEC_MAX_DATA_ROWS", "3000000")
    assert len(read_records(str(file))) == 2**21


@pytest.mark.parametrize(
    ("name", "text", "variable"),
    [
        ("a.txt", "a\n" * 101, "ROWS"),
        ("a.jsonl", '{"a": 1}\n' * 101, "ROWS"),
        ("a.json", "[" + '"a",' * 100 + '"a"]', "ROWS"),
        ("a.csv", "a\n" + "1\n" * 101, "ROWS"),
        ("a.json", "[" + "[]," * 1000 + "[]]", "VALUES"),
        ("a.jsonl", '{"a":[' + "{}," * 1000 + "{}]}", "VALUES"),
        ("a.csv", "," * 1001, "VALUES"),
        ("a.tsv", "a\t" * 1001, "VALUES"),
        ("a.csv", ",".join(f"c{i}" for i in range(21)), "COLUMNS"),
        ("a.jsonl", "\n".join(f'{{"k{i}": 1}}' for i in range(21)), "COLUMNS"),
        ("a.txt", "x" * 20_001, "BYTES"),
    ],
)
def test_a_text_of_too_much_is_refused_with_the_variable_that_raises_the_limit(
    tmp_path, monkeypatch, name, text, variable
):
    for what, most in (("ROWS", 100), ("VALUES", 1000), ("COLUMNS", 20), ("BYTES", 20_000)):
        monkeypatch.setenv(f"FTSEC_MAX_DATA_{what}", str(most))
    (tmp_path / name).write_text(text)
    told = fault(tmp_path / name)
    assert f"set the environment variable FTSEC_MAX_DATA_{variable}" in told
    assert "at most" in told


def test_equal_rows_of_a_parquet_file_count_as_they_would_be_unpacked(tmp_path):
    large = equal_rows(tmp_path / "large.parquet", "x" * 900_000, 4_000)
    assert large.stat().st_size < 2_000_000
    assert "set the environment variable FTSEC_MAX_DATA_BYTES" in fault(large)
    many = equal_rows(tmp_path / "many.parquet", "x", 2_000_001)
    assert many.stat().st_size < 20_000
    assert "set the environment variable FTSEC_MAX_DATA_ROWS" in fault(many)
    few = equal_rows(tmp_path / "few.parquet", "hello", 3_000)
    assert read_records(str(few)) == [{"prompt": "hello"}] * 3_000


def test_one_row_with_a_list_of_equal_values_is_counted_by_its_values(tmp_path, monkeypatch):
    monkeypatch.setenv("FTSEC_MAX_DATA_VALUES", "1000")
    pq.write_table(pa.table({"a": [[0] * 5000]}), tmp_path / "a.parquet")
    assert "set the environment variable FTSEC_MAX_DATA_VALUES" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize("depth", [101, 800])
def test_rows_that_are_nested_too_deep_are_refused(tmp_path, depth):
    (tmp_path / "a.jsonl").write_text('{"prompt":' + "[" * depth + "]" * depth + "}\n")
    assert "nested too deep" in fault(tmp_path / "a.jsonl")


def test_what_is_no_plain_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    for name in ("a.jsonl", "b.txt"):
        assert "not a regular file" in fault(tmp_path / name)


def test_a_page_of_comments_is_looked_at_once(tmp_path):
    (tmp_path / "a.csv").write_text("<!--a-->" * 40 + "x\n")
    assert "only a header" in fault(tmp_path / "a.csv"), "not read in 2**40 ways"


def test_a_plan_takes_a_packed_file_for_large_by_what_it_unpacks_to(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b"x" * 64 * 1001))
    assert packed.stat().st_size < 1000
    assert (holds_more(packed, 1000), holds_more(packed, 1001)) == (True, False)
    rows = equal_rows(tmp_path / "a.parquet", "x", 1001)
    assert (holds_more(rows, 1000), holds_more(rows, 1001)) == (True, False)
    packed.write_bytes(b"no archive")
    assert not holds_more(packed, 1)


NESTED = {
    "conversations": pa.array([[{"role": "user", "content": f"a{i % 3}"}] for i in range(300)]),
    "map": pa.array([[("a", f"b{i % 3}")] for i in range(300)], pa.map_(pa.string(), pa.string())),
    "pairs": pa.array([["a", f"b{i % 3}"] for i in range(300)], pa.list_(pa.string(), 2)),
}


@pytest.mark.parametrize("form", NESTED)
def test_nested_texts_in_several_row_groups_are_read(tmp_path, form):
    pq.write_table(pa.table({"a": NESTED[form]}), tmp_path / "a.parquet", row_group_size=100)
    read = [record["a"] for record in read_records(str(tmp_path / "a.parquet"))]
    assert read == NESTED[form].to_pylist()


@pytest.mark.parametrize("form", ["map", "pairs"])
def test_nested_texts_of_a_parquet_file_count_as_they_would_be_unpacked(
    tmp_path, monkeypatch, form
):
    large = "x" * 10_000
    kind = NESTED[form].type
    row = [("a", large)] if form == "map" else [large, large]
    pq.write_table(pa.table({"a": pa.array([row] * 500, kind)}), tmp_path / "a.parquet")
    assert len(read_records(str(tmp_path / "a.parquet"))) == 500
    monkeypatch.setenv("FTSEC_MAX_DATA_BYTES", "1000000")
    assert "set the environment variable FTSEC_MAX_DATA_BYTES" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps({"a": "x = [1, 2, {}], " * 900 + '\\"[\n'}) + "\n"),
        ("a.json", json.dumps([{"a": ", [ \\ " * 900}])),
        ("a.csv", 'a,b\nx"y,"' + "1,\n" * 900 + '""2,3"\n'),
    ],
)
def test_punctuation_inside_texts_counts_as_no_value(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("FTSEC_MAX_DATA_VALUES", "1000")
    (tmp_path / name).write_text(text)
    assert len(read_records(str(tmp_path / name))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"a": "\\\\"}, ' + "[]," * 2000 + "1]"),
        ("a.csv", 'x"' + "," * 2000),
        ("a.csv", '"x"y"' + "," * 2000),
    ],
)
def test_a_quote_that_opens_no_text_hides_no_values(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("FTSEC_MAX_DATA_VALUES", "1000")
    (tmp_path / name).write_text(text)
    assert "set the environment variable FTSEC_MAX_DATA_VALUES" in fault(tmp_path / name)


def test_few_rows_of_a_large_data_set_are_read_without_the_others(monkeypatch):
    whole = datasets.Dataset.from_dict({"prompt": [f"question {i}" for i in range(500)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    few = SourceSpec(dataset="owner/name", split="train", revision="0" * 40, rows=5, skip=3)
    told = read_source(few, split_name="benign_train").to_pylist()
    monkeypatch.setenv("FTSEC_MAX_DATA_ROWS", "100")
    monkeypatch.setenv("FTSEC_MAX_DATA_BYTES", "1000")
    assert read_source(few, split_name="benign_train").to_pylist() == told
    assert len(told) == 5
    for all_of_it in (replace(few, rows=None), replace(few, where=(("prompt", "question 1"),))):
        with pytest.raises(DataError, match="set the environment variable FTSEC_MAX_DATA_ROWS"):
            read_source(all_of_it, split_name="benign_train")
