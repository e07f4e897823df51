"""The store on S3 over HTTP: what is counted as done, what rivals and readers see, what a listing
costs, and the faults.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.fs import (
    FileSelector,
    FileSystem,
    FileSystemHandler,
    LocalFileSystem,
    PyFileSystem,
    SubTreeFileSystem,
)

from ftsec_ray import api
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import StoreError
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import DamagedArtifact, Store, mirror, object_store, retry
from ftsec_ray.store.object_io import ObjectIO
from ftsec_ray.store.object_store import RemoteStore
from tests.cli import toy
from tests.final_tables import assert_same_tables
from tests.s3_server import BUCKET
from tests.schedule.engine_runners import plan_of, runs, stage_of

ONE = "1" * 32
ROOT = Path(__file__).parents[2]
SWEEP = {
    "name": "disturbed",
    "models": ["ladder:0.2m", "ladder:1m"],
    "task": "microworld",
    "attacks": ["none", "badnets", "badedit"],
    "defenses": ["none", "shrink"],
    "seeds": 2,
}


@pytest.fixture
def place(tmp_path):
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def store(s3, place, tmp_path):
    return Store.open(place, cache=tmp_path / "cache")


def fresh(store, name="other"):
    """The same store from a machine that has nothing in its cache."""
    return Store.open(store.uri, cache=store.cache.parent / name)


def publish(store, digest=ONE, *, parts=1, text="w"):
    folder = store.scratch(digest)
    for part in range(parts):
        (folder / f"part{part}").write_text(text)
    store.publish(digest, folder, {"by": text})


def keys(s3, store):
    return [
        key.removeprefix(f"{store.uri.rsplit('/', 1)[-1]}/")
        for key in s3.keys(store.uri.rsplit("/", 1)[-1])
        if not key.endswith("/")
    ]


# What is done.


def test_an_upload_that_is_killed_before_its_record_is_not_done_and_its_files_are_removed_later(
    s3, store, monkeypatch
):
    code = f"""
import os, signal
from pathlib import Path
from ftsec_ray.store import Store
from ftsec_ray.store.object_io import ObjectIO
store = Store.open({store.uri!r}, cache=Path({str(store.cache)!r}))
folder = store.scratch({ONE!r})
(folder / "a").write_text("x")
ObjectIO.write = lambda self, key, text: os.kill(os.getpid(), signal.SIGKILL)
store.publish({ONE!r}, folder, {{}})
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=False, cwd=ROOT, env=dict(os.environ)
        ).returncode
        == -signal.SIGKILL
    )
    assert len(keys(s3, store)) == 1
    assert store.done() == set()
    assert not store.has(ONE)
    with pytest.raises(DamagedArtifact, match="not in the store"):
        store.fetch(ONE)
    assert len(list((store.cache / "staging").iterdir())) == 1
    store.drop_leftovers()
    assert len(keys(s3, store)) == 1, "it may be an upload that goes on"
    assert list((store.cache / "staging").iterdir()) == [], "its process is dead"
    publish(store, text="whole")
    assert (store.fetch(ONE) / "part0").read_text() == "whole"
    monkeypatch.setattr(object_store, "LEFTOVER_AGE_S", -1.0)
    store.drop_leftovers()
    left = keys(s3, store)
    assert sorted(key.split("/")[0] for key in left) == ["artifacts", "files"]
    assert (fresh(store).fetch(ONE) / "part0").read_text() == "whole"


def test_a_record_whose_writer_was_interrupted_is_empty_and_not_done(s3, store):
    with suppress(KeyboardInterrupt), store._calls._fs.open_output_stream(store._key(ONE)):
        raise KeyboardInterrupt  # leaving the block closes the stream, which makes an object
    assert any(key.endswith(f"{ONE}/record.json") for key in keys(s3, store))
    assert store.done() == set()
    assert not store.has(ONE)
    with pytest.raises(DamagedArtifact, match="empty"):
        store.record(ONE)
    publish(store)
    assert store.done() == {ONE}


def test_two_writers_at_once_end_with_one_whole_artifact(s3, store, monkeypatch):
    """Both are past the last look at whether the other was first, the worst case."""
    barrier = threading.Barrier(2)
    real = ObjectIO.write
    monkeypatch.setattr(
        ObjectIO, "write", lambda self, key, text: (barrier.wait(), real(self, key, text))
    )
    rivals = [
        threading.Thread(
            target=publish, args=(fresh(store, name),), kwargs={"parts": 3, "text": name}
        )
        for name in ("left", "right")
    ]
    [rival.start() for rival in rivals]
    [rival.join() for rival in rivals]
    monkeypatch.undo()
    assert store.done() == {ONE}
    assert len([key for key in keys(s3, store) if key.endswith("record.json")]) == 1
    folder = store.fetch(ONE)
    assert {(folder / f"part{part}").read_text() for part in range(3)} == {store.record(ONE)["by"]}
    monkeypatch.setattr(object_store, "LEFTOVER_AGE_S", -1.0)
    store.drop_leftovers()
    assert len(keys(s3, store)) == 1 + 3, "the files of the other one are gone"
    assert (fresh(store).fetch(ONE) / "part2").exists()


def test_a_reader_during_a_publication_sees_nothing_or_everything(s3, store):
    s3.delay_s = 0.02
    seen, stop = Counter(), threading.Event()

    def read(index):
        turn = 0
        while not stop.is_set():
            reader = fresh(store, f"reader{index}.{turn}")
            turn += 1
            if not reader.has(ONE):
                seen["nothing"] += 1
            else:
                folder = reader.fetch(ONE)
                seen[
                    (
                        "everything"
                        if {(folder / f"part{p}").read_text() for p in range(8)} == {"w"}
                        else "torn"
                    )
                ] += 1

    readers = [threading.Thread(target=read, args=(index,)) for index in range(3)]
    [reader.start() for reader in readers]
    publish(store, parts=8)
    deadline = time.monotonic() + 30
    while not seen["everything"] and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    [reader.join() for reader in readers]
    assert seen["nothing"]
    assert seen["everything"]
    assert seen["torn"] == 0


def test_a_damaged_object_is_noticed_and_its_stage_runs_again(s3, store, tmp_path):
    options = {
        "executor": "local",
        "runner": "tests.schedule.engine_runners:write",
        "session": "tests.schedule.engine_runners:Bench",
    }
    base = stage_of("base", log=str(tmp_path))
    first, second = (
        stage_of("first", base, log=str(tmp_path)),
        stage_of("second", base, log=str(tmp_path)),
    )
    assert execute(plan_of([base, first]), store, **options).is_complete
    key = next(
        key
        for key in s3.keys(tmp_path.name)
        if f"/{base.digest}/" in key and key.endswith("out.json")
    )
    size = len(s3.backend().get_object(BUCKET, key).value)
    s3.backend().put_object(BUCKET, key, b"y" * size)
    other = fresh(store)
    assert execute(plan_of([base, first, second]), other, **options).is_complete
    assert runs(tmp_path) == ["base", "first", "base", "second"]
    assert fresh(store, "third").done() == {base.digest, first.digest, second.digest}
    assert (fresh(store, "third").fetch(base.digest) / "out.json").read_text().startswith("{")
    assert any(key.startswith("quarantine/") for key in keys(s3, store))


def test_an_artifact_made_again_while_it_is_judged_is_not_put_aside(s3, store, monkeypatch):
    publish(store, text="first")
    key = next(key for key in s3.keys(store.uri.rsplit("/", 1)[-1]) if key.endswith("part0"))
    s3.backend().put_object(BUCKET, key, b"spoil")
    reader, real = fresh(store), RemoteStore._copy_down

    def slow(self, digest, record, folder):
        fault = real(self, digest, record, folder)
        if record["by"] == "first":  # meanwhile another worker finds the damage and repairs it
            store.put_aside(ONE, "spoilt")
            publish(store, text="again")
        return fault

    monkeypatch.setattr(RemoteStore, "_copy_down", slow)
    assert (reader.fetch(ONE) / "part0").read_text() == "again"
    assert store.done() == {ONE}


@pytest.mark.parametrize("payload", ["../../../../x", "", None, "A" * 12, ["x"]])
def test_a_record_cannot_name_files_elsewhere(s3, store, payload):
    publish(store)
    record = {**store.record(ONE), "payload": payload}
    store._calls.write(store._key(ONE), json.dumps(record))
    with pytest.raises(DamagedArtifact, match="not the record of an artifact"):
        fresh(store).fetch(ONE)
    assert store.done() == set()


# Step checkpoints.


def checkpoint(folder, step, text):
    part = folder / f".step-{step:08d}.part"
    part.mkdir(parents=True)
    (part / "state.json").write_text(text)
    part.rename(folder / f"step-{step:08d}")


def sent(s3, store, step, *, timeout=60):
    deadline = time.monotonic() + timeout
    while not any(
        key.startswith(f"work/{ONE}/") and key.endswith(f"step-{step:08d}/record.json")
        for key in keys(s3, store)
    ):
        assert time.monotonic() < deadline, keys(s3, store)
        time.sleep(0.02)


def test_a_stage_goes_on_from_its_checkpoint_on_another_machine(s3, store, monkeypatch):
    monkeypatch.setattr(mirror, "POLL_S", 0.02)
    checkpoint(store.workdir(ONE), 100, "a hundred steps")
    sent(s3, store, 100)
    checkpoint(store.workdir(ONE), 200, "two hundred steps")
    checkpoint(store.workdir(ONE) / "member", 50, "a member of a bank")
    sent(s3, store, 200)
    sent(s3, store, 50)
    store.leave_work(ONE)  # the first machine is gone
    there = fresh(store).workdir(ONE)
    assert [path.name for path in there.glob("step-*")] == ["step-00000200"]
    assert (there / "step-00000200" / "state.json").read_text() == "two hundred steps"
    assert (there / "member" / "step-00000050" / "state.json").read_text() == "a member of a bank"


def test_the_checkpoints_of_a_finished_stage_are_deleted(s3, store, monkeypatch):
    monkeypatch.setattr(mirror, "POLL_S", 0.02)
    checkpoint(store.workdir(ONE), 100, "x")
    sent(s3, store, 100)
    store.leave_work(ONE)
    store.drop_work(ONE)
    assert keys(s3, store) == []
    assert list(fresh(store).workdir(ONE).iterdir()) == []


def test_a_damaged_checkpoint_is_none(s3, store, monkeypatch):
    monkeypatch.setattr(mirror, "POLL_S", 0.02)
    checkpoint(store.workdir(ONE), 100, "x")
    sent(s3, store, 100)
    store.leave_work(ONE)
    s3.backend().put_object(
        BUCKET, f"{store.uri.rsplit('/', 1)[-1]}/work/{ONE}/step-00000100/state.json", b"y"
    )
    assert list(fresh(store).workdir(ONE).iterdir()) == []


# What it costs.


def fill(s3, store, count, files=3):
    backend, prefix = s3.backend(), store.uri.rsplit("/", 1)[-1]
    digests = [f"{index:032x}"[::-1] for index in range(count)]
    for digest in digests:
        record = json.dumps(
            {"digest": digest, "payload": "0" * 12, "files": {}, "kind": "finetune"}
        ).encode()
        backend.put_object(BUCKET, f"{prefix}/artifacts/{digest[:2]}/{digest}/record.json", record)
        for index in range(files):
            backend.put_object(
                BUCKET, f"{prefix}/files/{digest[:2]}/{digest}/{'0' * 12}/part{index}", b"x"
            )
    return digests


def test_what_is_done_costs_one_request_for_a_thousand_artifacts(s3, store):
    digests = fill(s3, store, 2_500)
    s3.requests.clear()
    assert store.done() == set(digests)
    assert [method for method, _ in s3.requests] == ["GET"] * 3
    s3.requests.clear()
    some = set(digests[:20])
    assert set(store.records(some)) == some
    assert len(s3.requests) <= 2 * 20


def test_records_are_read_once_until_others_take_their_place(s3, store):
    digests = fill(s3, store, 20)
    kinds = dict.fromkeys(digests, "toy")
    kinds = {digest: store.record(digest)["kind"] for digest in kinds}
    first = store.sound(kinds)
    s3.requests.clear()
    assert store.sound(kinds) == first
    assert len(s3.requests) <= 2, "a listing alone"
    other = fresh(store)
    other.put_aside(digests[0], "a test")
    assert store.sound(kinds)[0] == set(digests[1:])
    publish(other, digests[0], text="made again")
    assert store.sound(kinds)[1][digests[0]]["files"] != first[1][digests[0]]["files"]


def test_an_artifact_costs_few_requests(s3, store):
    s3.requests.clear()
    publish(store, parts=2)
    assert Counter(method for method, _ in s3.requests) == {
        "PUT": 3,
        "HEAD": 2,
        "GET": 2,
    }, "two files, the record, two looks at whether it is there"
    reader = fresh(store)
    s3.requests.clear()
    reader.fetch(ONE)
    reader.fetch(ONE)
    assert len(s3.requests) == 2 * 3


# Where it is.


def test_an_endpoint_can_be_given_in_the_uri(s3, store, monkeypatch):
    publish(store)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    other = Store.open(
        f"{store.uri}?endpoint_override={s3.host}&scheme=http&region=us-east-1", cache=store.cache
    )
    assert other.done() == {ONE}


def test_a_bucket_that_does_not_exist_is_told_before_any_work(s3, tmp_path):
    with pytest.raises(StoreError, match="no such bucket") as caught:
        Store.open("s3://not-made-by-anyone/x", cache=tmp_path).done()
    assert "not-made-by-anyone" in caught.value.fix


def test_an_unknown_key_of_the_query_is_refused(s3):
    with pytest.raises(StoreError, match="retries"):
        Store.open(f"s3://{BUCKET}/x?retries=7")


# Faults.


def run_toy(store, folder, monkeypatch):
    monkeypatch.setattr("ftsec_ray.schedule.execution.execute", toy.execute)
    toy.ran.clear()
    plan = api.make_plan(load_sweep(SWEEP))
    outcome = api.run_plan(plan, store, folder, executor="local")
    assert outcome.report.is_complete
    return plan, outcome.results


def check_same(store, plan, results, undisturbed):
    assert_same_tables(results, undisturbed)
    assert len(toy.ran) == len(plan.stages), "no stage ran twice"
    assert store.done() == set(plan.stages)
    assert store.failures() == {}
    assert all((store.fetch(digest) / "toy.txt").is_file() for digest in plan.stages)


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    return run_toy(Store.open(tmp_path / "calm"), tmp_path / "results" / "calm", monkeypatch)[1]


def test_a_server_that_fails_one_request_in_twenty_changes_nothing(
    s3, store, undisturbed, tmp_path, monkeypatch
):
    s3.fail_rate = 0.05
    plan, results = run_toy(store, tmp_path / "results" / "s3", monkeypatch)
    assert s3.failures > 20
    check_same(fresh(store), plan, results, undisturbed)
    assert len([key for key in keys(s3, store) if key.endswith("record.json")]) == len(plan.stages)


class Flaky(FileSystemHandler):
    """A filesystem that fails one call in twenty with an OSError, in the middle of writing too, by
    a seeded generator.
    """

    def __init__(self, inner, rate=0.05, seed=0, error=errno.EIO):
        self.inner, self.rate, self.rng, self.error, self.failures, self.lock = (
            inner,
            rate,
            random.Random(seed),
            error,
            0,
            threading.Lock(),
        )

    def maybe(self):
        with self.lock:
            if self.rng.random() < self.rate:
                self.failures += 1
                raise OSError(self.error, os.strerror(self.error))

    def get_type_name(self):
        return "flaky"

    def normalize_path(self, path):
        return path

    def create_dir(self, path, recursive):
        self.maybe()
        self.inner.create_dir(path, recursive=recursive)

    def get_file_info_selector(self, selector):
        self.maybe()
        return self.inner.get_file_info(selector)

    def open_output_stream(self, path, metadata=None):
        self.maybe()
        stream, maybe = self.inner.open_output_stream(path), self.maybe

        class Sink:
            closed = False

            def write(self, data):
                stream.write(bytes(data)[: len(data) // 2])
                maybe()
                stream.write(bytes(data)[len(data) // 2 :])
                return len(data)

            def flush(self):
                pass

            def close(self):
                if not self.closed:
                    self.closed = True
                    stream.close()

            def readable(self):
                return False

            def writable(self):
                return True

            def seekable(self):
                return False

        return pa.PythonFile(Sink(), mode="w")

    def open_append_stream(self, path, metadata=None):
        raise NotImplementedError

    def __eq__(self, other):
        return self is other

    __hash__ = None


def _passed_on(name):
    def call(self, *args, **kwargs):
        self.maybe()
        return getattr(self.inner, name)(*args, **kwargs)

    return call


for _name, _inner in (
    ("get_file_info", "get_file_info"),
    ("delete_dir", "delete_dir"),
    ("delete_file", "delete_file"),
    ("delete_dir_contents", "delete_dir_contents"),
    ("move", "move"),
    ("copy_file", "copy_file"),
    ("open_input_stream", "open_input_stream"),
    ("open_input_file", "open_input_file"),
    ("delete_root_dir_contents", "delete_dir_contents"),
):
    setattr(Flaky, _name, _passed_on(_inner))
Flaky.__abstractmethods__ = frozenset()


def flaky_store(tmp_path, **faults):
    (tmp_path / "disk").mkdir()
    handler = Flaky(SubTreeFileSystem(str(tmp_path / "disk"), LocalFileSystem()), **faults)
    return handler, RemoteStore(
        PyFileSystem(handler), "sweeps", uri="test://sweeps", cache=tmp_path / "cache"
    )


def test_a_filesystem_that_fails_one_call_in_twenty_changes_nothing(
    tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    handler, store = flaky_store(tmp_path)
    plan, results = run_toy(store, tmp_path / "results" / "flaky", monkeypatch)
    assert handler.failures > 20
    check_same(
        RemoteStore(handler.inner, "sweeps", uri="test://sweeps", cache=tmp_path / "cache2"),
        plan,
        results,
        undisturbed,
    )
    found = handler.inner.get_file_info(FileSelector("sweeps/artifacts", recursive=True))
    assert len([info for info in found if info.base_name == "record.json"]) == len(plan.stages)


def test_a_store_that_never_answers_is_given_up_after_a_bounded_number_of_tries(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    handler, store = flaky_store(tmp_path, rate=1.0)
    with pytest.raises(StoreError, match="cannot access the store"):
        store.has(ONE)
    assert handler.failures == retry.ATTEMPTS


@pytest.mark.parametrize("error", [errno.EACCES, errno.EINVAL, errno.ENOSPC])
def test_an_error_that_would_come_again_is_not_tried_again(tmp_path, error):
    handler, store = flaky_store(tmp_path, rate=1.0, error=error)
    with pytest.raises((StoreError, OSError)):
        store.has(ONE)
    assert handler.failures == 1


def test_a_refusal_of_the_server_is_not_tried_again(s3, store, monkeypatch):
    s3.fail_rate = 1.0
    s3.rng.choice = lambda statuses: "403 Forbidden"
    s3.requests.clear()
    with pytest.raises(StoreError, match="ACCESS_DENIED"):
        store.has(ONE)
    assert len(s3.requests) == 1


def test_waits_grow_are_drawn_at_random_and_have_a_limit(monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    for _ in range(50):
        with pytest.raises(ConnectionResetError):
            retry.retried(lambda: (_ for _ in ()).throw(ConnectionResetError("gone")))
    by_try = [waits[index :: retry.ATTEMPTS - 1] for index in range(retry.ATTEMPTS - 1)]
    assert all(
        0 <= wait <= retry.FIRST_WAIT_S * 2**index
        for index, few in enumerate(by_try)
        for wait in few
    )
    assert max(by_try[0]) < max(by_try[-1]) <= retry.LONGEST_WAIT_S
    assert len(set(by_try[0])) > 40


def test_a_full_disk_of_the_cache_says_so_and_leaves_the_store_as_it_was(s3, store, monkeypatch):
    publish(store)
    reader = fresh(store)

    def full(self, key, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ObjectIO, "_receive", full)
    with pytest.raises(StoreError, match="no space left") as caught:
        reader.fetch(ONE)
    assert str(reader.cache) in caught.value.what
    assert list((reader.cache / "staging").iterdir()) == []
    monkeypatch.undo()
    assert store.done() == {ONE}, "a full cache is no damage"
    assert (reader.fetch(ONE) / "part0").read_text() == "w"


def test_a_full_disk_under_the_work_and_staging_folders_says_so(s3, store, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    for act in (store.scratch, store.workdir):
        with pytest.raises(StoreError, match="no space left"):
            act(ONE)


def test_doctor_says_whether_a_remote_store_answers(s3, store):
    from ftsec_ray.cli.doctor import examine

    publish(store)
    found = {finding.what: finding for finding in examine(store.uri)}
    assert (found["store"].state, found["store"].found) == (
        "ok",
        f"{store.uri} can be read and holds 1 artifacts",
    )
    found = {finding.what: finding for finding in examine("s3://user:planted@bucket/x")}
    assert found["store"].state == "missing"
    assert "planted" not in str([finding.as_json() for finding in found.values()])


def test_the_filesystem_is_made_without_a_request(s3, place):
    s3.requests.clear()
    assert isinstance(Store.open(place)._calls._fs, FileSystem)
    assert s3.requests == []
