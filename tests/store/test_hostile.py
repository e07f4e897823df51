"""What stands in a store that harm was done to: a bad record costs its own stage and a warning, a
stray file nothing, and a store that takes no writes is still read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from ftsec_ray import durable
from ftsec_ray.errors import EnvironmentFault, StoreError
from ftsec_ray.store import DamagedArtifact, Store, disk
from ftsec_ray.store.object_store import RemoteStore
from ftsec_ray.store.record import RECORD_LIMIT, record_of, verdict_of
from ftsec_ray.store.work_folders import WorkFolders

GOOD, BAD = "1" * 32, "2" * 32
RECORD = {"kind": "score", "wall_s": 1.5, "attempt": 1, "notes": {}, "where": {}}


@pytest.fixture(autouse=True)
def fresh_warnings():
    disk.warn_once.cache_clear()


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    """How to open a store of two artifacts, and the path of the record of the second."""

    def opened():
        if request.param == "local":
            return Store.open(tmp_path / "store")
        system = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
        return RemoteStore(system, "store", uri="test://store", cache=tmp_path / "cache")

    store = opened()
    for digest in (GOOD, BAD):
        folder = store.scratch(digest)
        (folder / "metrics.json").write_text("{}")
        store.publish(digest, folder, RECORD)
    return opened, tmp_path / "store" / "artifacts" / BAD[:2] / BAD / "record.json"


TEXTS = {
    "spaces": " \n",
    "a list": "[]",
    "null": "null",
    "a text": '"x"',
    "half": '{"digest": "' + BAD,
    "deep": "[" * 200_000,
    "deep mapping": '{"a":' * 100_000,
    "no UTF-8": b"\xff\xfe{}",
    "zeros": b"\0" * 512,
    "larger than any record": b" " * (RECORD_LIMIT + 1),
    "of another artifact": json.dumps({**RECORD, "digest": GOOD}),
    "of none": json.dumps(RECORD),
}
FIELDS = [
    {"wall_s": float("nan")},
    {"cpu_s": float("inf")},
    {"gpu_s": -float("inf")},
    {"wall_s": -1},
    {"wall_s": "long"},
    {"wall_s": True},
    {"cost_s": [1]},
    {"attempt": 1.5},
    {"tokens": 2**64},
    {"peak_bytes": -1},
    {"flops": "x"},
    {"kind": 3},
    {"kind": "craft"},
    {"kind": "\x1b[31mscore"},
    {"method": ["x"]},
    {"host": 3},
    {"code": {}},
    {"resource": 4},
    {"where": None},
    {"where": [1]},
    {"params": "x"},
    {"versions": []},
    {"notes": "x"},
    {"notes": {"info": "x"}},
    {"notes": {"info": {"parameters": "many"}}},
    {"notes": {"warnings": 3}},
    {"notes": {"filter_tpr": "x"}},
    {"notes": {"serve_template_hash": 3}},
    {"digest": 3},
]


def costs_its_own_stage(opened, path, caplog):
    store = opened()
    caplog.clear()
    done, records = store.sound({GOOD: "score", BAD: "score"})
    assert done == set(records) == {GOOD}
    assert not store.has(BAD)
    assert store.done() == {GOOD}
    (warning,) = caplog.messages
    assert warning.startswith("warning: a damaged artifact was moved aside")
    assert BAD in warning
    assert "\x1b" not in warning
    folder = store.scratch(BAD)
    store.publish(BAD, folder, RECORD)
    assert opened().sound({BAD: "score"})[0] == {GOOD, BAD}, "it is made again"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_record_that_is_none_costs_its_own_stage(place, text, caplog):
    opened, path = place
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    costs_its_own_stage(opened, path, caplog)


@pytest.mark.parametrize("change", FIELDS, ids=repr)
def test_a_record_whose_fields_no_reader_takes_costs_its_own_stage(place, change, caplog):
    opened, path = place
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    costs_its_own_stage(opened, path, caplog)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000])
def test_numbers_that_are_no_numbers_are_refused_wherever_they_are(place, number, caplog):
    opened, path = place
    path.write_text(path.read_text().replace('"notes": {}', f'"notes": {{"x": [{number}]}}'))
    costs_its_own_stage(opened, path, caplog)


def test_the_warning_says_where_what_and_how_to_mend(tmp_path, caplog):
    store = Store.open(tmp_path)
    store.publish(BAD, store.scratch(BAD), RECORD)
    path = tmp_path / "artifacts" / BAD[:2] / BAD
    (path / "record.json").write_text('{"digest": "' + BAD + '", "wall_s": -3}')
    assert store.records({BAD}) == {}
    (aside,) = (tmp_path / "quarantine").iterdir()
    (warning,) = caplog.messages
    for part in (f"'{path}'", "wall_s: -3, which is not a number >= 0", f"'{aside}'"):
        assert part in warning


MAKERS = {
    "a pipe": os.mkfifo,
    "a link to an endless file": lambda path: path.symlink_to("/dev/zero"),
    "a link to a secret": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": lambda path: path.mkdir(),
    "nothing in it": lambda path: path.touch(),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_no_plain_file_is_no_record(tmp_path, make, caplog):
    store = Store.open(tmp_path)
    for digest in (GOOD, BAD):
        store.publish(digest, store.scratch(digest), RECORD)
    path = tmp_path / "artifacts" / BAD[:2] / BAD / "record.json"
    path.unlink()
    make(path)
    assert store.sound({GOOD: "score", BAD: "score"})[0] == {GOOD}
    assert not store.has(BAD)
    assert any(BAD in one and "runs again" in one for one in caplog.messages)
    with pytest.raises(DamagedArtifact):
        store.record(BAD)
    store.publish(BAD, store.scratch(BAD), RECORD)
    assert store.done() == {GOOD, BAD}


STRAYS = ["README", "zz\x1b[31m/x", "11/not a digest\n", f"22/{GOOD}", "11/" + "A" * 32]


@pytest.mark.parametrize("name", STRAYS, ids=repr)
def test_what_is_no_artifact_is_left_out_with_a_warning(place, name, caplog):
    opened, path = place
    stray = path.parents[2] / name
    stray.parent.mkdir(parents=True, exist_ok=True)
    if name == "README":
        stray.write_text("x")
    else:
        stray.mkdir()
        (stray / "record.json").write_text("{}")
    caplog.clear()
    store = opened()
    assert store.done() == store.done() == {GOOD, BAD}
    (warning,) = caplog.messages
    assert "not an artifact" in warning
    assert "\x1b" not in warning
    assert stray.exists()


def test_a_pipe_or_a_loop_among_the_artifacts_holds_nobody_up(tmp_path):
    store = Store.open(tmp_path)
    store.publish(GOOD, store.scratch(GOOD), RECORD)
    os.mkfifo(tmp_path / "artifacts" / "fifo")
    (tmp_path / "artifacts" / "loop").symlink_to(tmp_path / "artifacts")
    (tmp_path / "artifacts" / "11" / BAD).symlink_to(tmp_path / "artifacts" / "11" / GOOD)
    (tmp_path / "verdicts").mkdir()
    os.mkfifo(tmp_path / "verdicts" / f"{BAD}.json")
    assert store.done() == {GOOD}
    assert store.failures() == {}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"where": 3, "wall_s": NaN}', None),
        ('{"where": 3, "resource": [2], "wall_s": -4, "attempt": 1.5, "error": 7}', {}),
        ('{"wall_s": 1e999}', None),
        ('{"wall_s": 2, "where": {"sweep": "a"}}', {"wall_s": 2, "where": {"sweep": "a"}}),
    ],
)
def test_fields_of_a_verdict_that_no_reader_takes_count_as_absent(text, kept):
    wanted = None if kept is None else {"error": None, "error_code": None, **kept}
    assert verdict_of(text) == wanted


def test_a_right_record_is_right():
    text = json.dumps({**RECORD, "digest": GOOD, "method": None, "seed": 2**63, "x": {"y": [1.5]}})
    assert record_of(text, GOOD) == json.loads(text)


# A store that may only be read.


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A store with a damaged artifact, of which nothing can be changed."""
    store = Store.open(tmp_path)
    for digest in (GOOD, BAD):
        store.publish(digest, store.scratch(digest), RECORD)
    path = tmp_path / "artifacts" / BAD[:2] / BAD / "record.json"
    path.write_text("{}")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    for name in ("mkdir", "rename", "write_text", "unlink"):
        monkeypatch.setattr(f"pathlib.Path.{name}", refuse)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    return Store.open(tmp_path)


def test_a_store_that_may_only_be_read_still_tells_what_it_holds(read_only, caplog):
    assert read_only.sound({GOOD: "score", BAD: "score"})[0] == {GOOD}
    assert read_only.done() == {GOOD}
    assert not read_only.has(BAD)
    assert read_only.fetch(GOOD).is_dir()
    assert read_only.failures() == {}
    (warning,) = caplog.messages
    assert "an artifact counts as missing" in warning
    assert "cannot move it" in warning


def test_a_store_that_may_only_be_read_takes_no_work(read_only):
    with pytest.raises(EnvironmentFault, match=r"cannot write to .*: Read-only(.|\n)*--store"):
        read_only.check_writable()
    for call in (read_only.scratch, read_only.workdir, read_only.drop_verdict):
        with pytest.raises(StoreError, match=r"cannot write to .*: Read-only(.|\n)*are kept"):
            call(GOOD)
    with pytest.raises(StoreError, match="Read-only"):
        read_only.write_verdict(GOOD, {"error": "e"})


def test_another_users_damaged_artifact_is_told_before_any_work(tmp_path, monkeypatch):
    store = Store.open(tmp_path)
    store.publish(BAD, store.scratch(BAD), RECORD)
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(f"{BAD}/record.json"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(durable.os, "open", refuse)
    assert store.sound({BAD: "score"}) == (set(), {})
    assert (tmp_path / "artifacts" / BAD[:2] / BAD).is_dir(), "what may be sound is not moved"
    store.check_writable({GOOD})
    with pytest.raises(
        EnvironmentFault, match=r"this user cannot write(.|\n)*owner(.|\n)*chmod -R g\+rwX"
    ):
        store.check_writable({BAD})


def test_a_folder_of_the_store_that_another_user_keeps_is_told(tmp_path, monkeypatch):
    store = Store.open(tmp_path)
    store.publish(GOOD, store.scratch(GOOD), RECORD)
    monkeypatch.setattr(disk.os, "access", lambda path, _: "artifacts/11" not in str(path))
    with pytest.raises(EnvironmentFault, match=r"artifacts/11 \(owner \w+, mode \d+\)"):
        store.check_writable()


# Two users, and a power loss.


def modes(root):
    return {path: stat.S_IMODE(path.lstat().st_mode) for path in root.rglob("*")}


def test_a_store_that_its_group_shares_stays_so_whatever_the_umask(tmp_path):
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(0o2775)
    before = os.umask(0o077)
    try:
        store = Store.open(root)
        folder = store.scratch(GOOD)
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_text("x")
        store.publish(GOOD, folder, RECORD)
        store.write_verdict(BAD, {"error": "e"})
        store.workdir(BAD)
        store.leave_work(BAD)
    finally:
        os.umask(before)
    for path, mode in modes(root).items():
        wanted = 0o2070 if path.is_dir() else 0o060
        assert mode & wanted == wanted, f"{path}: {mode:o}"


def test_a_store_of_one_user_follows_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        store = Store.open(tmp_path / "store")
        store.publish(GOOD, store.scratch(GOOD), RECORD)
    finally:
        os.umask(before)
    assert all(mode & 0o077 == 0 for mode in modes(tmp_path / "store").values())


def test_a_work_folder_that_another_user_keeps_is_done_without(tmp_path, monkeypatch):
    folders = WorkFolders(tmp_path / "work")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(folders, "_open", refuse)
    mine = folders.take(GOOD)
    assert mine.name.startswith(f"{GOOD}.")
    assert mine.is_dir()


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that a power loss needs: the files, their folders, the name, the folder that has
    it.
    """
    store, seen = Store.open(tmp_path / "store"), []
    folder = store.scratch(GOOD)
    (folder / "weights.bin").write_text("x")
    real = os.fsync

    def note(descriptor):
        seen.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    real_rename = durable.Path.rename

    def rename(self, target):
        seen.append(f"rename {target}")
        return real_rename(self, target)

    monkeypatch.setattr(durable.os, "fsync", note)
    monkeypatch.setattr(durable.Path, "rename", rename)
    store.publish(GOOD, folder, RECORD)
    store.write_verdict(BAD, {"error": "e"})
    final = tmp_path / "store" / "artifacts" / GOOD[:2] / GOOD
    at = seen.index(f"rename {final}")
    assert {str(folder / "weights.bin"), str(folder / "record.json"), str(folder)} <= {*seen[:at]}
    assert seen[at + 1] == str(final.parent)
    verdicts = tmp_path / "store" / "verdicts"
    at = seen.index(f"rename {verdicts / BAD}.json")
    assert seen[at - 1].startswith(str(verdicts / f".{BAD}"))
    assert seen[at + 1] == str(verdicts)


def test_a_filesystem_without_sync_is_used_as_it_is(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(durable.os, "fsync", refuse)
    durable.put_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBADF, errno.EPERM, errno.EIO])
def test_a_text_that_has_its_name_is_written_unless_its_folder_lost_that(
    tmp_path, monkeypatch, number
):
    real = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(durable.os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            durable.put_text(tmp_path / "a", "x")
    else:
        durable.put_text(tmp_path / "a", "x")
        assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE])
def test_an_artifact_that_is_out_of_reach_for_a_moment_is_read_the_next_time(
    tmp_path, monkeypatch, caplog, number
):
    store = Store.open(tmp_path)
    store.publish(BAD, store.scratch(BAD), RECORD)
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(f"{BAD}/record.json"):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "open", refuse)
        with pytest.raises(DamagedArtifact, match="its record cannot be read"):
            store.fetch(BAD)
    assert "another user" not in caplog.text
    assert store.fetch(BAD).is_dir()
    assert set(store.sound({BAD: "score"})[1]) == {BAD}


def test_a_full_disk_leaves_no_part_of_a_text(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    store = Store.open(tmp_path)
    with pytest.raises(StoreError, match="no space left"):
        store.write_verdict(GOOD, {"error": "e"})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
