"""Folders that cannot be written and caches that hold rubbish: the first is told with its fix, the
second is as if it were not there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.identity import cache_folder as module
from ftsec_ray.identity import content
from ftsec_ray.identity.cache_folder import cache_folder
from ftsec_ray.identity.canonical import digest
from ftsec_ray.plan.durations import Costs
from ftsec_ray.store import DamagedArtifact
from ftsec_ray.store.artifact_store import Store
from ftsec_ray.store.disk import check_folder
from ftsec_ray.store.record import verdict_of

ONE = digest("one")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_REMEMBER_BYTES", 0)
    content._hash_known.cache_clear()
    yield tmp_path / "cache" / "ftsec_ray"
    content._hash_known.cache_clear()


def entry_of(cache: Path) -> Path:
    (entry,) = (cache / "content").iterdir()
    return entry


def hash_anew(path: Path) -> str:
    content._hash_known.cache_clear()
    return content.content_hash(path)


RUBBISH = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"sha256": 3}',
    b'{"path": "%s"}',
    b'{"path": "%s", "sha256": "abc"}',
    b'{"path": "elsewhere", "sha256": "' + b"0" * 64 + b'"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_in_the_cache_of_hashes_is_read_over_and_replaced(cache, tmp_path, rubbish):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    right = hash_anew(file)
    entry = entry_of(cache)
    whole = entry.read_bytes()
    entry.write_bytes(rubbish.replace(b"%s", str(file).encode()))
    assert hash_anew(file) == right
    assert entry.read_bytes() == whole
    entry.write_text(json.dumps({"path": str(file), "sha256": "a" * 64}))
    assert hash_anew(file) == "a" * 64, "else the cache is not read at all"


def test_a_cache_that_cannot_be_written_or_is_no_folder_is_done_without(
    cache, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    right = hash_anew(file)
    entry = entry_of(cache)
    entry.unlink()
    entry.mkdir()
    assert hash_anew(file) == right
    entry.rmdir()
    (cache / "content").rmdir()
    (cache / "content").write_text("no folder")
    assert hash_anew(file) == right
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert cache_folder() == tmp_path / "tmp" / f"ftsec_ray-{os.getuid()}"
    assert hash_anew(file) == right
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(module.Path, "home", no_home)
    assert cache_folder().parent == tmp_path / "tmp"


@pytest.mark.parametrize("place", ["file/store", "/proc/store", "file"])
def test_a_place_that_takes_no_files_is_told_with_the_option_that_names_it(tmp_path, place):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentFault, match="--there") as caught:
        check_folder(tmp_path / place, "results", "--there")
    assert str(tmp_path / place) == caught.value.got
    assert caught.value.exit_code == 3
    check_folder(tmp_path / "new" / "folder", "results", "--there")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_store_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ftsec_ray.store.disk.os.scandir", refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot read .*: Permission denied(.|\n)*--store"):
        Store.open(tmp_path).done()


@pytest.mark.parametrize("rubbish", ["", "[]", "[" * 100_000, '{"digest": "other"}'])
def test_rubbish_in_place_of_a_record_is_no_artifact(tmp_path, rubbish):
    store = Store.open(tmp_path)
    store.publish(ONE, store.scratch(ONE), {})
    path = tmp_path / "artifacts" / ONE[:2] / ONE / "record.json"
    path.write_text(rubbish)
    assert store.records({ONE}) == {}
    assert not store.has(ONE)
    assert list((tmp_path / "quarantine").iterdir())


def test_a_folder_in_place_of_a_record_and_a_quarantine_that_takes_nothing_raise_no_other_error(
    tmp_path,
):
    store = Store.open(tmp_path)
    (tmp_path / "quarantine").write_text("no folder")
    (tmp_path / "artifacts" / ONE[:2] / ONE / "record.json").mkdir(parents=True)
    assert store.records({ONE}) == {}
    with pytest.raises(DamagedArtifact):
        store.fetch(ONE)


def test_rubbish_among_the_verdicts_hides_no_cell(tmp_path):
    store = Store.open(tmp_path)
    names = [digest(number) for number in range(4)]
    folder = tmp_path / "verdicts"
    folder.mkdir()
    (folder / f"{names[0]}.json").mkdir()
    (folder / f"{names[1]}.json").write_text("[" * 100_000)
    (folder / f"{names[2]}.json").write_text('{"error": 3, "wall_s": "long", "attempt": true}')
    (folder / f"{names[3]}.json").write_text('{"error": "e", "error_code": "c", "wall_s": 2}')
    assert store.failures() == {
        names[2]: {"error_code": None, "error": None},
        names[3]: {"error_code": "c", "error": "e", "wall_s": 2},
    }
    assert verdict_of("[1]") is None


GOOD = {"kind": "finetune", "wall_s": 6.0, "cost_s": 3.0, "resource": "cpu", "where": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": None, "wall_s": "x"},
        {"wall_s": "x"},
        {"cost_s": [1]},
        {"where": [1]},
        {"where": {"parameters": "many"}},
        {"where": {"parameters": float("inf")}},
        {"flops": "x"},
        {"flops": float("nan")},
        {"wall_s": float("nan")},
        {"wall_s": float("inf")},
        {"cost_s": -1.0},
        {"cost_s": 0},
    ],
    ids=str,
)
def test_records_that_tell_no_time_are_learned_nothing_from(change):
    bad = {**GOOD, **change}
    assert not Costs([bad]).is_learned
    assert Costs([bad, GOOD])._ratio == {("finetune", False): 2.0}
    assert not Costs([{key: value for key, value in GOOD.items() if key != "kind"}]).is_learned
