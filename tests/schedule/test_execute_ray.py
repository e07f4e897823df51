"""Runs on Ray, by both executors that use it: the same bytes as in process, and what deaths of
workers and of the driver cost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import actors_executor, cluster_capacity, trials
from ftsec_ray.schedule.execution import execute
from ftsec_ray.schedule.executors import EXECUTORS
from ftsec_ray.schedule.scheduler import MAX_ATTEMPTS
from ftsec_ray.store import Store
from tests.schedule.engine_runners import local_ray, plan_of, runs, stage_of
from tests.schedule.test_execute import RUNNER, SESSION, contents, tree

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    with local_ray(num_cpus=3):
        yield


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


@pytest.fixture(params=[name for name, one in EXECUTORS.items() if one.uses_ray])
def executor(request):
    return request.param


TWIN_IS_SLOW = pytest.mark.parametrize(
    "executor", ["tune", pytest.param("actors", marks=pytest.mark.slow)], indirect=True
)
"""Of the tests that take longest: under the other executor in the slow tier."""


@pytest.fixture
def run(executor):
    def call(plan, store, **rest):
        return execute(
            plan, store, **{"executor": executor, "runner": RUNNER, "session": SESSION, **rest}
        )

    return call


@pytest.mark.usefixtures("cluster")
def test_the_bytes_are_those_of_the_local_executor(run, store, tmp_path):
    plan = plan_of(tree(tmp_path))
    events = []
    report = run(plan, store, on_event=events.append)
    here = Store.open(tmp_path / "local")
    execute(plan, here, executor="local", runner=RUNNER, session=SESSION)
    assert report.is_complete
    assert contents(store) == contents(here)
    assert len(contents(store)) == 6
    assert sorted(runs(tmp_path)) == sorted(
        ["base", "left", "right", "left_a", "left_b", "right_a"] * 2
    )
    assert sorted(event.kind for event in events) == ["finished"] * 5 + ["started"] * 5


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_within_a_unit_costs_that_unit_only(run, store, tmp_path):
    base = stage_of("base", log=str(tmp_path))
    victim = stage_of("victim", base, log=str(tmp_path), die_once=str(tmp_path / "died"))
    others = [stage_of(f"other{i}", base, log=str(tmp_path)) for i in range(4)]
    events = []
    report = run(
        plan_of([base, victim, *others, stage_of("end", victim, log=str(tmp_path))]),
        store,
        on_event=events.append,
    )
    assert report.is_complete
    assert (tmp_path / "died").exists()
    assert sorted(runs(tmp_path)) == [
        "base",
        "end",
        "other0",
        "other1",
        "other2",
        "other3",
        "victim",
    ]
    assert runs(tmp_path, "began").count("victim") == 2
    assert [event.kind for event in events].count("requeued") == 1
    assert store.done() == {stage for stage in report.done}


@pytest.mark.usefixtures("cluster")
def test_a_unit_that_kills_every_worker_fails_after_three_and_stops_nobody_else(
    run, store, tmp_path
):
    deadly = stage_of("deadly", log=str(tmp_path), die=True)
    report = run(
        plan_of([deadly, stage_of("after", deadly), stage_of("beside", log=str(tmp_path))]), store
    )
    assert runs(tmp_path, "began").count("deadly") == MAX_ATTEMPTS
    assert runs(tmp_path) == ["beside"]
    assert report.failed[deadly.digest].error_code == "worker_lost"
    assert report.failed[deadly.digest].error.startswith(
        f"the worker died in all {MAX_ATTEMPTS} attempts; last error: The actor died unexpectedly"
    )
    assert "OOM killer" in report.failed[deadly.digest].error, (
        "what Ray says of it, among that what it may have been"
    )
    assert len(report.upstream_failed) == 1
    assert store.failures()[deadly.digest]["error_code"] == "worker_lost"


@pytest.mark.usefixtures("cluster")
def test_a_failing_unit_is_a_verdict_and_not_a_retry(run, store, tmp_path):
    bad = stage_of("bad", log=str(tmp_path), fail=True)
    report = run(
        plan_of([bad, stage_of("after", bad), stage_of("beside", log=str(tmp_path))]), store
    )
    assert runs(tmp_path, "began").count("bad") == 1
    assert report.failed[bad.digest].error_code == "stage"
    assert runs(tmp_path) == ["beside"]


@pytest.mark.usefixtures("cluster")
def test_an_artifact_damaged_before_the_run_is_made_again(run, store, tmp_path):
    stages = tree(tmp_path)
    run(plan_of(stages[:3]), store)
    (store.fetch(stages[1].digest) / "out.json").write_text("{}")
    report = run(plan_of(stages), Store.open(store.uri))
    assert report.is_complete
    assert runs(tmp_path).count("left") == 2
    assert runs(tmp_path).count("base") == 1


@TWIN_IS_SLOW
@pytest.mark.usefixtures("cluster")
def test_units_of_two_resource_classes_run_side_by_side(run, store, tmp_path, monkeypatch):
    """A half-CPU class stands for the GPU that this machine lacks."""
    monkeypatch.setattr(
        cluster_capacity,
        "bundles_of",
        lambda spec, classes: {"cpu": {"CPU": 1.0}, "gpu": {"CPU": 0.5}},
    )
    stages = []
    for i in range(12):
        before = [stages[-1]] if i % 3 else []
        stage = stage_of(f"s{i}", *before, log=str(tmp_path))
        stages.append(replace(stage, resource="gpu" if i % 2 else "cpu"))
    report = run(plan_of(stages), store)
    assert report.is_complete
    assert len(runs(tmp_path)) == 12


@pytest.mark.usefixtures("cluster")
def test_no_more_units_run_at_a_time_than_the_sweep_allows(run, store, tmp_path):
    running, most = set(), 0

    def watch(event):
        nonlocal most
        (running.add if event.kind == "started" else running.discard)(event.unit)
        most = max(most, len(running))

    log = str(tmp_path)
    stages = [stage_of(f"s{i}", log=log, until_begun=2, sleep=0.3) for i in range(8)]
    report = run(plan_of(stages), store, workers=2, on_event=watch)
    assert report.is_complete
    assert most == 2


@pytest.mark.usefixtures("cluster")
def test_workers_that_cannot_open_end_the_run_with_the_reason(run, store):
    plan = plan_of([stage_of(f"s{i}") for i in range(4)])
    with pytest.raises(
        EnvironmentFault, match=r"cannot import tests.schedule.engine_runners:absent"
    ):
        run(plan, store, runner="tests.schedule.engine_runners:absent")
    assert store.done() == set()


@pytest.mark.usefixtures("cluster")
def test_a_class_that_fits_on_no_node_is_refused_and_not_waited_for(run, store):
    plan = plan_of([stage_of("big")])
    huge = replace(plan, spec=replace(plan.spec, resources=ResourceSpec(cpus_per_stage=4096)))
    with pytest.raises(
        EnvironmentFault, match="this machine is too small for a unit of resource class 'cpu'"
    ):
        run(huge, store)


@pytest.mark.usefixtures("cluster")
def test_workers_that_do_not_come_are_asked_for_anew_and_nothing_is_lost(
    run, executor, store, tmp_path, monkeypatch
):
    asked = []

    def stalled_once(quiet_s, *, is_running):
        asked.append(is_running)
        return len(asked) == 1

    for place in (trials, actors_executor):
        monkeypatch.setattr(place, "is_stalled", stalled_once)
    monkeypatch.setattr(
        cluster_capacity.ClusterCapacity, "has_capacity", lambda capacity, classes: True
    )
    report = run(
        plan_of([stage_of(f"s{i}", log=str(tmp_path), sleep=0.5) for i in range(6)]), store
    )
    assert asked
    assert report.is_complete
    assert sorted(set(runs(tmp_path))) == [f"s{i}" for i in range(6)]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("executor", ["tune"], indirect=True)
def test_tune_forgets_trials_that_have_ended_and_nothing_is_lost(run, store, tmp_path, monkeypatch):
    import gc
    import itertools
    import weakref

    from ray.tune.experiment import Trial

    gc.collect()
    before = weakref.WeakSet(
        one for one in gc.get_objects() if isinstance(one, Trial)
    )  # of tests that went before
    known, turns, forget = [], itertools.count(1), trials.OldestFirst._forget

    def counted(self, controller):
        forget(self, controller)
        if next(turns) % 10 == 0:
            gc.collect()
            known.append(
                sum(isinstance(one, Trial) and one not in before for one in gc.get_objects())
            )

    monkeypatch.setattr(trials, "KEPT_TRIALS", 8)
    monkeypatch.setattr(trials.OldestFirst, "_forget", counted)
    bad = stage_of("bad", log=str(tmp_path), fail=True)
    victim = stage_of("victim", log=str(tmp_path), die_once=str(tmp_path / "died"))
    report = run(
        plan_of([bad, victim, *(stage_of(f"s{i}", log=str(tmp_path)) for i in range(60))]), store
    )
    assert set(report.failed) == {bad.digest}
    assert len(report.done) == len(runs(tmp_path)) == 61
    assert len(known) > 5
    assert max(known) - min(known) <= 2 * 8 + 2 * 3 + 2, (
        "those kept by Tune and by the queue, those at work and those that wait"
    )


def drive(executor, store, folder, script):
    """Write a script that runs a stage and 16 more that need it, two at a time."""
    script.write_text(
        "import sys\nfrom ftsec_ray.schedule.execution import execute\nfrom ftsec_ray.store import"
        " Store\nfrom tests.schedule.engine_runners import plan_of, stage_of\nbase ="
        f" stage_of('base', log={str(folder)!r})\nstages = [base] + [stage_of(f's{{i}}', base,"
        f" log={str(folder)!r}, sleep=0.4) for i in range(16)]\nreport = execute(plan_of(stages),"
        f" Store.open({store.uri!r}), workers=2, executor={executor!r}, runner={RUNNER!r},"
        f" session={SESSION!r})\nprint(len(report.done), len(report.cached), report.is_complete,"
        " 'ray.tune' in sys.modules)\n"
    )
    return [sys.executable, str(script)], {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def wait_for_units(folder, count, driver):
    deadline = time.monotonic() + 200
    while len(runs(folder)) < count and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)
    assert len(runs(folder)) >= count


def test_an_interrupt_ends_the_run_and_all_of_its_workers(store, tmp_path):
    command, environment = drive("actors", store, tmp_path, tmp_path / "drive.py")
    driver = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_units(tmp_path, 3, driver)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert said.strip().endswith("KeyboardInterrupt"), said
    assert driver.returncode != 0
    workers = {line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()}
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert 3 <= len(store.done()) < 17


@TWIN_IS_SLOW
def test_a_killed_driver_loses_what_was_in_flight_and_the_resumed_run_has_the_bytes_of_one_in_one_go(
    executor, store, tmp_path, monkeypatch
):
    command, environment = drive(executor, store, tmp_path, tmp_path / "drive.py")
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_units(tmp_path, 5, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    finished = set(runs(tmp_path))
    assert 4 <= len(store.done()) < 17
    (tmp_path / "log.txt").rename(
        tmp_path / "first.txt"
    )  # its workers may end what they began before they notice
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    ran, cached, is_complete, has_tune = again.stdout.split()
    assert (has_tune == "True") == (executor == "tune"), "the other one does without"
    assert is_complete == "True"
    assert int(ran) + int(cached) == len(store.done()) == 17
    assert int(cached) >= len(finished) - 2, "two may have been on their way into the store"
    began_again = [name for name in runs(tmp_path, "began") if name in finished]
    assert len(began_again) <= 2, "what was done is not done again"
    assert int(ran) <= 17 - len(finished) + 2
    base = stage_of("base", log=str(tmp_path))
    stages = [base, *(stage_of(f"s{i}", base, log=str(tmp_path), sleep=0.4) for i in range(16))]
    whole = Store.open(tmp_path / "local")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    execute(plan_of(stages), whole, executor="local", runner=RUNNER, session=SESSION)
    assert contents(store) == contents(whole), "those of a run in one go"
