"""Worker group units: counted by what their workers occupy, run in processes of this machine and
under Ray, and their failures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.execute.dist_worker import GroupOrder
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.schedule.capacity import fixed_capacity, growing_capacity, request_of, share_of
from ftsec_ray.schedule.execution import execute
from ftsec_ray.schedule.scheduler import Node, Scheduler
from ftsec_ray.store import Store
from tests.schedule.engine_runners import local_ray, plan_of, runs, stage_of
from tests.schedule.group_runners import group_stage
from tests.schedule.test_execute import SESSION

RUNNER = "tests.schedule.group_runners:meet"
BUNDLES = {
    "cpu": {"CPU": 1.0},
    "gpu": {"CPU": 1.0, "GPU": 1.0},
    "group:4": {"CPU": 4.0, "GPU": 4.0},
}


def run(plan, store, **rest):
    return execute(
        plan,
        store,
        **{"executor": "local", "runner": RUNNER, "session": SESSION, "runtime": Runtime(), **rest},
    )


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


def test_worker_groups_are_counted_by_what_their_workers_occupy():
    free_slots = fixed_capacity(BUNDLES, {"CPU": 16.0, "GPU": 8.0})
    assert free_slots({}) == {"cpu": 16, "gpu": 8, "group:4": 2}
    assert free_slots({"group:4": 1}) == {"cpu": 12, "gpu": 4, "group:4": 1}
    assert free_slots({"group:4": 1, "gpu": 1}) == {"cpu": 11, "gpu": 3, "group:4": 0}
    assert free_slots({"group:4": 2}) == {"cpu": 8, "gpu": 0, "group:4": 0}
    (trial,) = request_of("group:4", BUNDLES["group:4"], {"CPU": 16.0, "GPU": 8.0})
    assert trial.keys().isdisjoint({"CPU", "GPU"}), "it leaves all cores to the workers"
    assert share_of("group:4", BUNDLES["group:4"]) == {"CPU": 1.0, "GPU": 1.0}


def test_beside_a_worker_group_nothing_waits_for_more_than_a_growing_cluster_has():
    have = {"CPU": 8.0, "GPU": 8.0}
    free_slots = growing_capacity({"cpu": 24, "gpu": 24, "group:4": 2}, BUNDLES, lambda: have)
    assert free_slots({"gpu": 8}) == {"cpu": 24, "gpu": 16, "group:4": 2}
    assert free_slots({"gpu": 8, "group:4": 1}) == {"cpu": 0, "gpu": 0, "group:4": 0}
    assert free_slots({"gpu": 2, "group:4": 1})["gpu"] == 2
    have.update(CPU=16.0, GPU=16.0)
    assert free_slots({"gpu": 8, "group:4": 1})["gpu"] == 4, "what the cluster has now"


def test_small_units_do_not_keep_a_worker_group_from_its_turn():
    nodes = [
        Node(id="long", cost_s=9.0, resource="group:2cpu"),
        *(Node(id=f"s{i}", resource="cpu") for i in range(3)),
        Node(id="first", cost_s=20.0, resource="cpu"),
    ]
    scheduler = Scheduler(nodes)
    free_slots = fixed_capacity({"cpu": {"CPU": 1.0}, "group:2cpu": {"CPU": 2.0}}, {"CPU": 2.0})

    def ask():
        taken: dict[str, int] = {}
        for node in nodes:
            if scheduler.state(node.id).value == "running":
                taken[node.resource] = taken.get(node.resource, 0) + 1
        return scheduler.next_ready(free_slots(taken))

    assert ask() == "first"
    assert ask() is None, "a core is free, but the worker group is next and needs two"
    scheduler.complete("first")
    assert ask() == "long"
    assert ask() is None
    scheduler.complete("long")
    assert {ask(), ask()} == {"s0", "s1"}


def test_while_a_worker_group_runs_small_units_use_what_is_left():
    nodes = [
        Node(id="a", cost_s=9.0, resource="group:2cpu"),
        Node(id="b", cost_s=8.0, resource="group:2cpu"),
        Node(id="s", resource="cpu"),
    ]
    scheduler = Scheduler(nodes)
    assert scheduler.next_ready({"cpu": 3, "group:2cpu": 1}) == "a"
    assert scheduler.next_ready({"cpu": 1, "group:2cpu": 0}) == "s"


def test_an_order_survives_the_way_to_another_process():
    order = GroupOrder(
        stages=(group_stage("a", fail=True),),
        worker=WorkerSpec(
            store="file:///s",
            runtime=Runtime(micro_batch=3),
            cache_gib=1.0,
            runner=RUNNER,
            session=SESSION,
            environment={"NAME": "value"},
        ),
        attempt=2,
        threads=1,
        halvings=1,
    )
    assert GroupOrder.from_json(order.to_json()) == order
    assert order.runtime_of(order.stages[0]).micro_batch == 2
    assert order.runtime_of(order.stages[0]).worker_group.micro_batch == 2


def test_a_worker_group_runs_its_unit_once_and_publishes_once(store, tmp_path):
    first = group_stage("first", log=str(tmp_path))
    report = run(
        plan_of(
            [
                first,
                group_stage("second", first, log=str(tmp_path)),
                stage_of("other", log=str(tmp_path)),
            ]
        ),
        store,
    )
    assert report.is_complete
    assert len(store.done()) == 3
    assert json.loads((store.fetch(first.digest) / "out.json").read_text())["sum"] == 3.0
    record = store.record(first.digest)
    assert record["where"]["worker_group"] == {"workers": 2, "zero_stage": 0, "micro_batch": 4}
    assert (record["micro_batch"], record["notes"]["total"]) == (4, 3.0)
    for rank in (0, 1):
        assert runs(tmp_path, f"ran-{rank}") == ["first", "second"]
    assert runs(tmp_path, "alone") == ["other"]
    assert list((tmp_path / "store" / "work").glob("*")) == []


@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_process_is_a_verdict_whichever_it_is(store, tmp_path, at):
    bad, crash = (
        group_stage("bad", log=str(tmp_path), fail=True, at=at),
        group_stage("crash", log=str(tmp_path), crash=True, at=at),
    )
    report = run(plan_of([bad, group_stage("after", bad), crash]), store)
    assert {one.error_code for one in report.failed.values()} == {"stage", "ValueError"}
    assert store.failures()[bad.digest]["error_code"] == "stage"
    assert "told to fail" in store.failures()[bad.digest]["error"]
    assert len(report.upstream_failed) == 1
    assert runs(tmp_path, "began-0") == runs(tmp_path, "began-1"), "once each"
    assert sorted(runs(tmp_path, "began-0")) == ["bad", "crash"]


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_memory_that_does_not_suffice_in_one_process_halves_the_rows_of_all(store, tmp_path, at):
    small = group_stage("small", log=str(tmp_path), most_rows=2, at=at)
    report = run(plan_of([small]), store)
    assert report.is_complete
    assert store.record(small.digest)["micro_batch"] == 2
    assert runs(tmp_path, "began-1") == ["small", "small"]
    never = group_stage("never", log=str(tmp_path), most_rows=1, at=at)
    assert run(plan_of([never]), store).failed[never.digest].error_code == "oom"


def test_a_process_that_dies_is_no_verdict_and_the_unit_is_tried_again(store, tmp_path):
    once = group_stage("once", log=str(tmp_path), die_once=str(tmp_path / "died"), at=1)
    events = []
    assert run(plan_of([once]), store, on_event=events.append).is_complete
    assert [event.kind for event in events] == ["started", "requeued", "started", "finished"]
    assert store.record(once.digest)["attempt"] == 2
    always = group_stage(
        "always", log=str(tmp_path), die_once=str(tmp_path / "no" / "such" / "marker")
    )
    assert run(plan_of([always]), store).failed[always.digest].error_code == "FileNotFoundError"


def test_without_deepspeed_a_plan_with_worker_groups_does_not_start(store, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"ftsec-ray\[deepspeed\]"):
        run(plan_of([group_stage("a")]), store)


def test_the_processes_of_a_worker_group_end_with_the_one_that_started_them(tmp_path):
    stage = group_stage("sleeper", log=str(tmp_path), sleep=60.0)
    code = (
        "import sys; from tests.schedule.engine_runners import plan_of; from"
        " tests.schedule.group_runners import group_stage\nfrom ftsec_ray.schedule.execution"
        " import execute; from ftsec_ray.store import Store; from ftsec_ray.context import"
        f" Runtime\nexecute(plan_of([group_stage('sleeper', log={str(tmp_path)!r}, sleep=60.0)]),"
        f" Store.open({str(tmp_path / 'store')!r}),\n        executor='local', runner={RUNNER!r},"
        f" session={SESSION!r}, runtime=Runtime())\n"
    )
    assert stage.digest
    driver = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 200
        while len(pids(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(pids(tmp_path)) == 2
    finally:
        driver.kill()
        driver.wait()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def pids(folder):
    path = folder / "log.txt"
    return (
        {int(line.split()[2]) for line in path.read_text().splitlines() if line.startswith("began")}
        if path.exists()
        else set()
    )


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.ray
class TestUnderRay:
    """A cluster of two cores: room for one worker group of two, or for two small units."""

    @pytest.fixture(scope="class")
    def cluster(self):
        with local_ray(num_cpus=2):
            yield

    @pytest.mark.usefixtures("cluster")
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize(
        ("executor", "address"),
        [
            ("tune", None),
            pytest.param("actors", None, marks=pytest.mark.slow),
            *(
                pytest.param(name, "of a cluster that may grow", marks=pytest.mark.slow)
                for name in ("tune", "actors")
            ),
        ],
    )
    def test_worker_groups_and_small_units_share_a_cluster_with_room_for_one_worker_group(
        self, store, tmp_path, executor, address
    ):
        base = stage_of("base", log=str(tmp_path))
        worker_groups = [group_stage(f"wide{i}", base, log=str(tmp_path)) for i in range(2)]
        small = [stage_of(f"small{i}", base, log=str(tmp_path), sleep=0.2) for i in range(4)]
        report = run(
            plan_of(
                [base, *worker_groups, *small, stage_of("end", worker_groups[0], log=str(tmp_path))]
            ),
            store,
            executor=executor,
            address=address,
        )
        assert report.is_complete
        assert sorted(runs(tmp_path, "ran-1")) == ["wide0", "wide1"]
        assert sorted(runs(tmp_path, "alone")) == ["base", "end", *(f"small{i}" for i in range(4))]
        assert {
            json.loads((store.fetch(worker_group.digest) / "out.json").read_text())["sum"]
            for worker_group in worker_groups
        } == {3.0}

    @pytest.mark.usefixtures("cluster")
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("executor", ["tune", pytest.param("actors", marks=pytest.mark.slow)])
    def test_failures_and_deaths_of_a_worker_group_are_what_they_are_without_ray(
        self, store, tmp_path, executor
    ):
        bad = group_stage("bad", log=str(tmp_path), fail=True, at=1)
        once = group_stage("once", log=str(tmp_path), die_once=str(tmp_path / "died"), at=1)
        report = run(plan_of([bad, once]), store, executor=executor)
        assert {digest: one.error_code for digest, one in report.failed.items()} == {
            bad.digest: "stage"
        }
        assert store.record(once.digest)["attempt"] == 2
        assert runs(tmp_path, "began-0").count("bad") == 1


def test_a_unit_of_two_sorts_of_worker_group_is_two_units():
    first = group_stage("first")
    plan = plan_of(
        [
            first,
            replace(group_stage("second", first), resource="group:3cpu"),
            stage_of("third", first),
        ]
    )
    assert len(plan.units(set())) == 3
