"""The store, on a local disk, behind a `pyarrow.fs` filesystem and on S3: publishing, damage, full
disks, rivals.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, LocalFileSystem, SubTreeFileSystem

from ftsec_ray.errors import StoreError
from ftsec_ray.store import DamagedArtifact, Store
from ftsec_ray.store import local_store as local_module
from ftsec_ray.store.object_store import RemoteStore
from tests.s3_server import BUCKET

ONE, TWO = "1" * 32, "ab" * 16


@pytest.fixture(params=["local", "remote", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store.open(tmp_path / "store")
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Store.open(f"s3://{BUCKET}/{tmp_path.name}", cache=tmp_path / "cache")
    (tmp_path / "bucket").mkdir()
    filesystem = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    return RemoteStore(filesystem, "sweeps/a", uri="test://sweeps/a", cache=tmp_path / "cache")


def again(store):
    """The same store as another process sees it: nothing verified, nothing cached."""
    if isinstance(store, RemoteStore):
        return RemoteStore(
            store._calls._fs, store._root, uri=store.uri, cache=store.cache.parent / "cache2"
        )
    return Store.open(store.uri)


def publish(store, digest=ONE, text="weights", **record):
    folder = store.scratch(digest)
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_text(text)
    (folder / "meta.json").write_text("{}")
    store.publish(digest, folder, {"kind": "finetune", **record})
    return folder


class S3Object:
    """An object with the few methods of a path that the tests use."""

    def __init__(self, filesystem, key):
        self.filesystem, self.key = filesystem, key

    def read_text(self):
        return self.filesystem.open_input_stream(self.key).read().decode()

    def write_text(self, text):
        with self.filesystem.open_output_stream(self.key) as sink:
            sink.write(text.encode())

    def unlink(self):
        self.filesystem.delete_file(self.key)


def stored_files(store, name):
    if isinstance(store, RemoteStore) and store.uri.startswith("s3:"):
        found = store._calls._fs.get_file_info(
            FileSelector(store._root, recursive=True, allow_not_found=True)
        )
        return [
            S3Object(store._calls._fs, info.path)
            for info in found
            if info.is_file and info.base_name == name
        ]
    root = store.root if not isinstance(store, RemoteStore) else store.cache.parent / "bucket"
    return sorted(root.rglob(name))


def test_a_published_artifact_is_done_and_comes_back_with_its_record(store):
    folder = publish(store, seed=3)
    assert store.done() == {ONE}
    assert store.has(ONE)
    assert not store.has(TWO)
    assert (store.fetch(ONE) / "model" / "weights.bin").read_text() == "weights"
    record = store.record(ONE)
    assert (record["digest"], record["kind"], record["seed"]) == (ONE, "finetune", 3)
    assert record["files"]["model/weights.bin"]["bytes"] == 7
    assert sorted(record["files"]) == ["meta.json", "model/weights.bin"]
    assert not folder.exists(), "the scratch folder is consumed"
    assert store.read_json(ONE, "meta.json") == {}


def test_an_empty_store_has_nothing_done_and_no_failures(store):
    assert store.done() == set()
    assert store.failures() == {}


def test_a_changed_file_is_noticed_put_aside_and_counts_as_absent(store):
    publish(store)
    stored_files(store, "weights.bin")[0].write_text("weighty")  # the same length
    other = again(store)
    with pytest.raises(
        DamagedArtifact, match=r"the content of model/weights.bin has changed"
    ) as caught:
        other.fetch(ONE)
    assert caught.value.got == ONE
    assert caught.value.code == "store.damaged"
    assert other.done() == set()
    publish(other)
    assert (other.fetch(ONE) / "model" / "weights.bin").read_text() == "weights"


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_missing_or_short_file_is_named(store, damage):
    publish(store)
    path = stored_files(store, "weights.bin")[0]
    path.unlink() if damage == "missing" else path.write_text("we")
    with pytest.raises(DamagedArtifact, match=r"weights.bin (is missing|has 2 bytes instead of 7)"):
        again(store).fetch(ONE)


def test_a_record_that_is_no_json_makes_the_artifact_absent(store):
    publish(store)
    stored_files(store, "record.json")[0].write_text("{")
    other = again(store)
    with pytest.raises(DamagedArtifact, match=ONE):
        other.fetch(ONE)
    assert other.done() == set()


def test_a_record_cannot_point_outside_of_its_artifact(store, tmp_path):
    publish(store)
    (tmp_path / "secret").write_text("s")
    path = stored_files(store, "record.json")[0]
    record = json.loads(path.read_text())
    record["files"] = {"../../../../secret": {"bytes": 1, "sha256": "0" * 64}}
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedArtifact, match="outside of it"):
        again(store).fetch(ONE)


def test_fetching_what_is_not_there_says_so(store):
    with pytest.raises(DamagedArtifact, match="not in the store"):
        store.fetch(TWO)


@pytest.mark.parametrize("bad", ["../../etc", "A" * 32, "1" * 31, "", "1" * 32 + "/..", "g" * 32])
def test_only_digests_become_paths(store, bad):
    for act in (store.has, store.fetch, store.scratch, store.workdir, store.record):
        with pytest.raises(StoreError, match="not the digest of an artifact"):
            act(bad)


def test_links_are_not_published(store, tmp_path):
    folder = store.scratch(ONE)
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="only regular files and folders"):
        store.publish(ONE, folder, {})
    assert store.done() == set()


def test_the_second_publisher_discards_its_copy(store):
    publish(store, text="first")
    publish(again(store), text="second")
    assert (store.fetch(ONE) / "model" / "weights.bin").read_text() == "first"
    assert len(stored_files(store, "weights.bin")) == 1


def test_of_many_publishers_at_once_one_wins_whole(store):
    barrier = threading.Barrier(6)

    def rival(index):
        folder = store.scratch(ONE)
        for part in range(3):
            (folder / f"part{part}").write_text(f"{index}" * 1000)
        barrier.wait()
        store.publish(ONE, folder, {"by": index})

    threads = [threading.Thread(target=rival, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    folder = again(store).fetch(ONE)
    texts = {(folder / f"part{part}").read_text() for part in range(3)}
    assert len(texts) == 1
    assert texts.pop()[0] == str(store.record(ONE)["by"])


def test_a_full_disk_says_so_and_leaves_nothing_half_published(store, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = store.scratch(ONE)
    (folder / "weights.bin").write_text("w")
    if isinstance(store, RemoteStore):
        monkeypatch.setattr(store._calls, "send", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StoreError, match="no space left on the disk") as caught:
        store.publish(ONE, folder, {})
    monkeypatch.undo()
    assert "bytes free of" in str(caught.value.got)
    assert store.done() == set()
    assert stored_files(store, "weights.bin") == []
    publish(store)
    assert store.done() == {ONE}


def test_a_full_disk_while_copying_from_elsewhere_says_so_too(tmp_path, monkeypatch):
    store = Store.open(tmp_path / "store")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "big").write_text("x")

    def full(*args, **kwargs):
        raise local_module.shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])

    monkeypatch.setattr(local_module.shutil, "copytree", full)
    with pytest.raises(StoreError, match="no space left on the disk"):
        store.publish(ONE, tmp_path / "made", {})
    assert store.done() == set()
    assert list((tmp_path / "store" / "staging").iterdir()) == []


def test_a_verdict_stays_until_the_stage_succeeds(store):
    store.write_verdict(
        ONE, {"digest": ONE, "error_code": "stage", "error": "nan", "attempt": 1, "host": "h"}
    )
    assert store.failures()[ONE]["error"] == "nan"
    publish(store)
    assert store.failures() == {}
    store.drop_verdict(ONE)
    store.drop_verdict(ONE)
    assert store.failures() == {}


def test_a_work_folder_survives_until_it_is_dropped(store):
    (store.workdir(ONE) / "step_100").write_text("x")
    assert (again(store).workdir(ONE) / "step_100").exists() or isinstance(store, RemoteStore)
    assert (store.workdir(ONE) / "step_100").exists()
    store.drop_work(ONE)
    assert list(store.workdir(ONE).iterdir()) == []


def test_an_artifact_is_checked_once_per_process(store, monkeypatch):
    publish(store)
    other = again(store)
    other.fetch(ONE)
    monkeypatch.setattr("ftsec_ray.store.record.sha256", lambda path: pytest.fail("hashed again"))
    assert other.fetch(ONE).is_dir()


def test_a_folder_without_a_record_is_no_artifact_and_blocks_none(tmp_path):
    store = Store.open(tmp_path / "store")
    ruin = tmp_path / "store" / "artifacts" / ONE[:2] / ONE
    ruin.mkdir(parents=True)
    (ruin / "half").write_text("x")
    assert store.done() == set()
    publish(store)
    assert (store.fetch(ONE) / "meta.json").exists()
    assert not (store.fetch(ONE) / "half").exists()


def test_ten_thousand_artifacts_are_listed(tmp_path):
    store = Store.open(tmp_path / "store")
    expected = set()
    for i in range(10_000):
        digest = f"{i:032x}"[::-1]
        folder = tmp_path / "store" / "artifacts" / digest[:2] / digest
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
        expected.add(digest)
    assert store.done() == expected


def test_a_publisher_that_is_killed_leaves_nothing_done(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from ftsec_ray.store import Store
from ftsec_ray.store import local_store
store = Store.open({str(tmp_path / "store")!r})
folder = store.scratch({ONE!r})
(folder / "a").write_text("x")
Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
store.publish({ONE!r}, folder, {{}})
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
    )
    assert ended.returncode == -9
    store = Store.open(tmp_path / "store")
    assert store.done() == set()
    publish(store)
    assert store.done() == {ONE}


def test_what_a_dead_publisher_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    store = Store.open(tmp_path / "store")
    mine = store.scratch(ONE)
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    left = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    elsewhere = mine.with_name(f"{TWO}.otherhost.{dead.pid}.x")
    left.mkdir()
    elsewhere.mkdir()
    store.drop_leftovers()
    assert mine.exists()
    assert elsewhere.exists()
    assert not left.exists()


def test_a_uri_that_no_filesystem_serves_is_refused():
    with pytest.raises(StoreError, match="cannot open this store"):
        Store.open("gopher://x/y")


def test_a_file_uri_is_a_local_store(tmp_path):
    assert Store.open(f"file://{tmp_path}/s").uri == str(tmp_path / "s")
