"""A stage that hangs, one that does not fit, workers killed for their memory, a full disk: under
every executor, through `execute`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.plan.build import build_plan
from ftsec_ray.schedule.execution import execute
from ftsec_ray.schedule.executors import EXECUTORS
from ftsec_ray.store import Store
from tests.schedule.engine_runners import local_ray, plan_of, runs, stage_of
from tests.schedule.test_execute import RUNNER, SESSION, contents

ALL = [
    pytest.param(name, marks=[pytest.mark.ray] if one.uses_ray else [])
    for name, one in EXECUTORS.items()
]
LIMIT_S = 4.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    with local_ray(num_cpus=2):
        yield


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


@pytest.fixture
def run(request, store):
    """Runs stages under an executor with resources, on a Ray that serves all tests of this file."""

    def call(stages, executor, on_event=None, **resources):
        if EXECUTORS[executor].uses_ray:
            request.getfixturevalue("cluster")
        plan = plan_of(stages)
        plan = replace(plan, spec=replace(plan.spec, resources=ResourceSpec(**resources)))
        return execute(
            plan, store, executor=executor, runner=RUNNER, session=SESSION, on_event=on_event
        )

    return call


def hanging(folder):
    """A stage that hangs the first time it is tried, what comes after it, and what has nothing to
    do with it.
    """
    base = stage_of("base", log=str(folder))
    stuck = stage_of("stuck", base, log=str(folder), stuck_once=str(folder / "stuck"))
    return [
        base,
        stuck,
        stage_of("after", stuck, log=str(folder)),
        *(stage_of(f"beside{i}", base, log=str(folder)) for i in range(3)),
    ]


@pytest.mark.parametrize("executor", ALL)
def test_a_stage_over_its_time_fails_as_timeout_stops_nothing_else_and_may_be_tried_again(
    run, store, tmp_path, executor
):
    stages = hanging(tmp_path)
    stuck, after = stages[1:3]
    events = []
    report = run(stages, executor, events.append, timeout_s=LIMIT_S)
    assert {digest: verdict.error_code for digest, verdict in report.failed.items()} == {
        stuck.digest: "timeout"
    }
    verdict = report.failed[stuck.digest]
    assert f"more than {LIMIT_S:g} s" in verdict.error
    assert "resources.timeout_s" in verdict.error
    assert verdict.wall_s >= LIMIT_S
    assert report.upstream_failed == (after.digest,)
    assert store.done() == {stage.digest for stage in stages} - {stuck.digest, after.digest}
    assert store.failures()[stuck.digest]["error_code"] == "timeout"
    assert runs(tmp_path, "began").count("stuck") == 1, "the next attempt would hang as well"
    assert "requeued" not in [event.kind for event in events]
    again = run(stages, executor, timeout_s=LIMIT_S)
    assert again.is_complete
    assert sorted(runs(tmp_path)) == ["after", "base", "beside0", "beside1", "beside2", "stuck"]
    assert store.failures() == {}


@pytest.mark.parametrize("executor", ALL)
def test_a_worker_that_dies_under_a_time_limit_is_no_timeout_and_an_earlier_one_is_not_taken_for_it(
    run, store, tmp_path, executor
):
    stages = [stage_of("stuck", log=str(tmp_path), stuck_once=str(tmp_path / "stuck"), die_on=2)]
    assert set(run(stages, executor, timeout_s=LIMIT_S).failed) == {stages[0].digest}
    events = []
    report = run(stages, executor, events.append, timeout_s=LIMIT_S)
    assert report.is_complete
    assert [event.kind for event in events] == ["started", "requeued", "started", "finished"]
    assert runs(tmp_path, "began") == ["stuck"] * 3


def test_stages_under_a_time_limit_leave_the_same_bytes_and_one_worker_serves_them_all(
    run, store, tmp_path
):
    stages = [
        stage_of("base", log=str(tmp_path)),
        *(stage_of(f"s{i}", log=str(tmp_path)) for i in range(5)),
    ]
    assert run(stages, "local", timeout_s=60.0).is_complete
    workers = {line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()}
    assert len(workers) == 1
    here = Store.open(tmp_path / "here")
    execute(plan_of(stages), here, executor="local", runner=RUNNER, session=SESSION)
    assert contents(store) == contents(here)


def test_a_worker_process_that_cannot_open_says_why(store):
    from ftsec_ray.errors import EnvironmentFault

    plan = plan_of([stage_of("one")])
    plan = replace(plan, spec=replace(plan.spec, resources=ResourceSpec(timeout_s=60.0)))
    with pytest.raises(
        EnvironmentFault, match=r"cannot import tests\.schedule\.engine_runners:absent"
    ):
        execute(
            plan,
            store,
            executor="local",
            runner="tests.schedule.engine_runners:absent",
            session=SESSION,
        )


def test_a_time_limit_is_no_part_of_any_digest():
    sweep = {
        "name": "s",
        "models": ["ladder:0.2m"],
        "task": "microworld",
        "attacks": ["badnets"],
        "defenses": ["none"],
    }
    plain, limited = (
        build_plan(load_sweep({**sweep, **more})) for more in ({}, {"resources": {"timeout_s": 60}})
    )
    assert limited.spec.resources.timeout_s == 60.0
    assert list(plain.stages) == list(limited.stages)
    assert plain.digest == limited.digest


@pytest.mark.parametrize("executor", ALL)
def test_a_stage_that_does_not_fit_is_tried_once_with_half_the_rows_and_fails_as_oom_if_it_never_fits(
    run, store, tmp_path, executor
):
    half, never = (
        stage_of("half", log=str(tmp_path), fits=4),
        stage_of("never", log=str(tmp_path), fits=3),
    )
    after, beside = stage_of("after", never), stage_of("beside", half, log=str(tmp_path))
    report = run([half, never, after, beside], executor, micro_batch=8)
    assert {digest: verdict.error_code for digest, verdict in report.failed.items()} == {
        never.digest: "oom"
    }
    assert report.upstream_failed == (after.digest,)
    assert store.done() == {half.digest, beside.digest}
    assert (store.record(half.digest)["micro_batch"], store.record(half.digest)["attempt"]) == (
        4,
        1,
    )
    assert "micro_batch" not in store.record(beside.digest)
    assert sorted(runs(tmp_path, "began")) == ["beside", "half", "half", "never", "never"]


@pytest.mark.ray
@pytest.mark.parametrize("executor", ["tune", pytest.param("actors", marks=pytest.mark.slow)])
def test_a_worker_that_ray_kills_for_its_memory_ends_as_oom_after_three_attempts(
    tmp_path, executor
):
    """In a process of its own: on that Ray every worker is above the threshold, and none would
    outlive it.
    """
    code = f"""
import ray
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.schedule.engine_runners import local_ray, plan_of, stage_of
with local_ray(num_cpus=1, _system_config={{"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 200}}):
    stage = stage_of("large", log={str(tmp_path)!r}, sleep=60.0)
    report = execute(plan_of([stage]), Store.open({str(tmp_path / "store")!r}), executor={executor!r}, runner={RUNNER!r}, session={SESSION!r})
    verdict = report.failed[stage.digest]
    print(verdict.error_code, verdict.attempt, verdict.error.replace(chr(10), " "))
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    kind, attempt, text = said.stdout.strip().splitlines()[-1].split(" ", 2)
    assert (kind, attempt) == ("oom", "3"), said.stdout
    assert text.startswith("the worker died in all 3 attempts; last error: ")
    assert "memory" in text


FULL = """
import json, subprocess, sys
from pathlib import Path
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.schedule.test_faults import large
from tests.schedule.engine_runners import plan_of
from tests.schedule.test_execute import RUNNER, SESSION, contents

disk, calm, log = map(Path, sys.argv[1:])
store = Store.open(disk / "store")
stages = large(log)
first = execute(plan_of(stages), store, executor="local", runner=RUNNER, session=SESSION)
left = [path.name for path in (disk / "store" / "staging").iterdir()]
subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
again = execute(plan_of(stages), Store.open(disk / "store"), executor="local", runner=RUNNER, session=SESSION)
print(json.dumps({"codes": sorted({one.error_code for one in first.failed.values()}), "failed": len(first.failed), "done": len(first.done),
                  "left": left, "cached": len(again.cached), "complete": again.is_complete,
                  "same": contents(store) == contents(Store.open(calm)), "failures": store.failures()}))
"""


def large(folder):
    """Stages that leave 100 kB each."""
    base = stage_of("base", log=str(folder))
    return [base, *(stage_of(f"s{i}", base, log=str(folder), filler=100_000) for i in range(8))]


def test_a_disk_that_is_full_fails_what_does_not_fit_and_the_next_run_ends_with_the_undisturbed_bytes(
    tmp_path,
):
    """On a real disk of 512 kB, in a mount namespace of its own."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    log.mkdir()
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run(
        [*apart, "mount", "-t", "tmpfs", "none", str(disk)], check=False, capture_output=True
    ).returncode:
        pytest.skip("this kernel lets no user mount a disk of its own")
    calm = Store.open(tmp_path / "calm")
    execute(plan_of(large(log)), calm, executor="local", runner=RUNNER, session=SESSION)
    (log / "log.txt").unlink()
    shell = 'mount -t tmpfs -o size=512k none "$2" && exec "$0" -c "$1" "$2" "$3" "$4"'
    said = subprocess.run(
        [*apart, "sh", "-c", shell, sys.executable, FULL, str(disk), calm.uri, str(log)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(said.stdout)
    assert found["codes"] == ["disk_full"]
    assert found["failed"] >= 3
    assert found["done"] >= 4
    assert found["left"] == []
    assert found["cached"] == found["done"], "what was done is not done again"
    assert found["complete"]
    assert found["same"]
    assert found["failures"] == {}
    assert sorted(runs(log)) == sorted(stage.params["name"] for stage in large(log))
