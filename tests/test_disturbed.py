"""Whole sweeps of a tiny model on a store that fails, and two at once on one store: the tables are
those of an undisturbed one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ftsec_ray
from ftsec_ray.store import Store
from tests.final_tables import assert_same_tables
from tests.s3_server import BUCKET, s3_server
from tests.test_end_to_end import artifacts, sweep, world  # noqa: F401 - `world` is a fixture

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small(world):  # noqa: F811
    return sweep(
        world,
        attacks=["none", {"badnets": {"rate": 0.3}}],
        defenses=["none", "shrink", "self_reminder"],
    )


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, ftsec_ray.run(
        small, store=folder / "store", results=folder / "results", executor="local"
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_ray_over_a_bucket_that_fails_one_request_in_twenty_ends_with_the_same_tables(
    small, undisturbed, tmp_path, monkeypatch
):
    with s3_server() as server:
        server.fail_rate = 0.05
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        uri = f"s3://{BUCKET}/disturbed"
        results = ftsec_ray.run(small, store=uri, results=tmp_path / "results", workers=2)
        assert server.failures > 10
        server.calm()
        assert_same_tables(results, undisturbed[1])
        store, calm = (
            Store.open(uri, cache=tmp_path / "fresh"),
            Store.open(undisturbed[0] / "store"),
        )
        assert store.done() == calm.done()
        assert store.failures() == {}
        for digest in calm.done():
            assert _files(store.fetch(digest)) == _files(calm.fetch(digest))


def _files(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "record.json"
    }


def test_two_sweeps_at_once_on_one_store_end_with_the_tables_of_each_alone(
    small, undisturbed, tmp_path
):
    processes = []
    for name in ("left", "right"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**small, "name": name}))
        command = [
            sys.executable,
            "-m",
            "ftsec_ray",
            "run",
            str(tmp_path / f"{name}.yaml"),
            "--store",
            str(tmp_path / "store"),
            "--results",
            str(tmp_path / "results"),
            "--executor",
            "local",
        ]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for name in ("left", "right"):
        assert_same_tables(ftsec_ray.open_results(tmp_path / "results" / name), undisturbed[1])
    assert artifacts(tmp_path / "store") == artifacts(undisturbed[0] / "store")
    assert list((tmp_path / "store" / "staging").iterdir()) == []
    assert list((tmp_path / "store" / "work").iterdir()) == []


@pytest.mark.slow
def test_a_sweep_under_a_time_limit_that_nothing_reaches_leaves_the_same_bytes(
    small, undisturbed, tmp_path
):
    results = ftsec_ray.run(
        {**small, "resources": {"timeout_s": 250}},
        store=tmp_path / "store",
        results=tmp_path / "results",
        executor="local",
    )
    assert_same_tables(results, undisturbed[1])
    assert artifacts(tmp_path / "store") == artifacts(undisturbed[0] / "store")
