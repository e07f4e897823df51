"""Results that go to a URI: whole, `run.json` last, and with a local copy that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from ftsec_ray.errors import StoreError
from ftsec_ray.results.remote_results import local_results, send_results


def test_a_path_is_where_results_are_and_a_uri_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_results("some/results") == Path("some/results")
    assert local_results("file:///some/results") == Path("/some/results")
    one, two = local_results("s3://bucket/one"), local_results("s3://bucket/two")
    assert one != two
    assert one.is_relative_to(tmp_path)


def test_all_files_arrive_under_the_name_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, bucket = tmp_path / "small", tmp_path / "bucket"
    for name in ("run.json", "report.html", "cells/part-0.parquet", ".run.json.1.tmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    bucket.mkdir()

    class Bucket:
        from_uri = staticmethod(
            lambda uri: (SubTreeFileSystem(str(bucket), LocalFileSystem()), "x")
        )

    monkeypatch.setattr("pyarrow.fs.FileSystem", Bucket)
    assert send_results(folder, "s3://bucket/x/?region=eu") == "s3://bucket/x/small?region=eu"
    found = {
        path.relative_to(bucket).as_posix(): path.read_text()
        for path in bucket.rglob("*")
        if path.is_file()
    }
    assert found == {
        f"x/small/{name}": name for name in ("run.json", "report.html", "cells/part-0.parquet")
    }
    assert (bucket / "x/small/run.json").stat().st_mtime_ns >= (
        bucket / "x/small/report.html"
    ).stat().st_mtime_ns


def test_a_uri_that_nothing_serves_says_where_the_results_are(tmp_path: Path):
    (tmp_path / "small").mkdir()
    with pytest.raises(StoreError, match="small"):
        send_results(tmp_path / "small", "nosuch://bucket/x")
