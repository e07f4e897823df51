"""Two real processes at work on one store: whole sweeps that overlap, and one work folder that both
want.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ftsec_ray.identity import digest
from ftsec_ray.store import Store, work_folders
from tests.s3_server import BUCKET
from tests.schedule.engine_runners import plan_of, runs, stage_of

ROOT = Path(__file__).parents[2]
ONE = "1" * 32

SWEEPER = """
import json, sys, time
from pathlib import Path
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store, work_folders
from tests.store.test_rivals import stages_of
from tests.schedule.engine_runners import plan_of

uri, cache, log, name, folder = sys.argv[1:]
store = Store.open(uri, cache=Path(cache))
plan = plan_of(stages_of(Path(log), name))
Path(folder, name).touch()
while len(list(Path(folder).iterdir())) < 2:
    time.sleep(0.01)
report = execute(plan, store, executor="local", runner="tests.schedule.engine_runners:write", session="tests.schedule.engine_runners:Bench")
print(json.dumps({"complete": report.is_complete, "done": list(report.done), "cached": list(report.cached), "stages": list(plan.stages)}))
"""


def stages_of(log, name):
    """A trunk that both sweeps have, and branches of which each has half of the other's and two of
    its own.
    """
    base = stage_of("base", log=str(log), sleep=0.02)
    middle = [stage_of(f"middle{i}", base, log=str(log), sleep=0.02) for i in range(4)]
    shared = [stage_of(f"end{i}", one, log=str(log), sleep=0.02) for i, one in enumerate(middle)]
    own = [
        stage_of(f"{name}{i}", one, log=str(log), sleep=0.02) for i, one in enumerate(middle[:2])
    ]
    return [base, *middle, *shared, *own]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_sweeps_at_once_on_one_store_lose_and_double_nothing(kind, request, tmp_path):
    if kind == "s3":
        request.getfixturevalue("s3")
    uri = str(tmp_path / "store") if kind == "local" else f"s3://{BUCKET}/{tmp_path.name}"
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SWEEPER,
                uri,
                str(tmp_path / "cache"),
                str(tmp_path),
                name,
                str(meeting),
            ],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    reports = [json.loads(out) for out, _ in said]
    wanted = {
        stage.digest: stage for name in ("left", "right") for stage in stages_of(tmp_path, name)
    }
    for report in reports:
        assert report["complete"]
        assert Counter(report["done"] + report["cached"]) == Counter(report["stages"]), (
            "every stage once"
        )
    store = Store.open(uri, cache=tmp_path / "fresh")
    assert store.done() == set(wanted)
    assert store.failures() == {}
    made = {one: json.loads((store.fetch(one) / "out.json").read_text()) for one in wanted}
    for one, stage in wanted.items():
        given = [(store.fetch(source) / "out.json").read_text() for _, source in stage.inputs]
        assert made[one] == {"name": stage.params["name"], "given": digest(given)}
    ran = Counter(runs(tmp_path))
    assert set(ran) == {stage.params["name"] for stage in wanted.values()}
    assert max(ran.values()) <= 2
    held = tmp_path / "store" if kind == "local" else tmp_path / "cache"
    assert [path.name for path in (held / "staging").glob("*")] == []
    assert plan_of(list(wanted.values())).needed(store.done()) == []


HOLDER = """
import sys, time
from pathlib import Path
from ftsec_ray.store import Store, work_folders

store = Store.open(sys.argv[1])
folder = store.workdir("1" * 32)
(folder / "step-00000001").mkdir()
print(folder, flush=True)
sys.stdin.read()
if sys.argv[2] == "drop":
    store.drop_work("1" * 32)
if sys.argv[2] == "leave":
    store.leave_work("1" * 32)
    print("left", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    processes = []

    def start(what):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "store"), what],
            cwd=ROOT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        processes.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_of_two_processes_that_want_one_work_folder_the_second_gets_its_own(holder, tmp_path):
    process, theirs = holder("drop")
    store = Store.open(tmp_path / "store")
    mine = store.workdir(ONE)
    assert mine != theirs
    assert [path.name for path in mine.iterdir()] == ["step-00000001"], (
        "a copy of what is there to go on from"
    )
    assert store.workdir(ONE) == mine, "the same one again"
    (mine / "step-00000009").mkdir()
    store.drop_work(ONE)
    assert not mine.exists()
    assert (theirs / "step-00000001").exists(), "the other one is at work there"
    process.communicate("")
    assert not theirs.exists()
    assert list((tmp_path / "store" / "work").iterdir()) == []


def test_a_checkpoint_that_goes_while_it_is_copied_is_left_out(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for place in ("step-00000001", "0/step-00000002", ".step-00000003.part"):
        (source / place).mkdir(parents=True)
        (source / place / "state.json").write_text(place)
    target.mkdir()
    whole = shutil.copytree

    def racing(step, aside):
        if step.name == "step-00000002":
            step.rename(step.with_name(".old"))
        return whole(step, aside)

    monkeypatch.setattr(work_folders.shutil, "copytree", racing)
    work_folders.copy_steps(source, target)
    assert [
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()
    ] == ["step-00000001/state.json"]


def test_the_work_folder_of_a_killed_process_is_taken_over_with_its_checkpoints(holder, tmp_path):
    process, theirs = holder("nothing")
    process.send_signal(signal.SIGKILL)
    process.wait()
    mine = Store.open(tmp_path / "store").workdir(ONE)
    assert mine == theirs
    assert (mine / "step-00000001").exists()


def test_a_worker_that_lives_on_leaves_the_work_folder_of_a_stage_that_failed_in_it(
    holder, tmp_path
):
    process, theirs = holder("leave")
    process.stdin.close()
    assert process.stdout.readline() == "left\n"
    store = Store.open(tmp_path / "store")
    assert store.workdir(ONE) == theirs
    assert (theirs / "step-00000001").exists()
    store.drop_work(ONE)
    assert not theirs.exists()


def test_a_work_folder_of_its_own_that_a_dead_process_left_is_removed(tmp_path):
    store = Store.open(tmp_path / "store")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    from ftsec_ray.store.disk import own_name

    left = tmp_path / "store" / "work" / own_name(ONE).replace(f".{os.getpid()}.", f".{dead.pid}.")
    left.mkdir(parents=True)
    kept = store.workdir(ONE)
    store.drop_leftovers()
    assert not left.exists()
    assert kept.exists()
