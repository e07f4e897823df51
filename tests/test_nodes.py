"""Whole sweeps on clusters of several nodes: where stages run, and what the deaths of workers,
nodes and drivers cost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import ftsec_ray
from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.plan.build import build_plan
from ftsec_ray.schedule import cluster_capacity
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.clusters import cluster
from tests.final_tables import assert_same_tables
from tests.s3_server import BUCKET, s3_server
from tests.schedule.engine_runners import plan_of, runs, stage_of
from tests.schedule.test_execute import SESSION
from tests.test_end_to_end import artifacts, sweep, world  # noqa: F401 - `world` is a fixture

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with (
        s3_server() as server,
        cluster(tmp_path_factory.mktemp("nodes")) as found,
    ):  # the server first: nodes take its address from the environment
        found.s3 = server
        yield found


def long(world, **changes):  # noqa: F811
    """A tune of 1,500 steps that writes a checkpoint five times a second, and what follows
    from it.
    """
    return sweep(
        world,
        attacks=["none"],
        defenses=["none", "shrink"],
        training={"epochs": 250, "batch_size": 8, "rank": 2},
        resources={"checkpoint_every_s": 0.2},
        **changes,
    )


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, ftsec_ray.run(
        long(world), store=folder / "store", results=folder / "results", executor="local"
    )


def tune_of(world):  # noqa: F811
    return next(
        stage.digest
        for stage in build_plan(ftsec_ray.load(long(world))).stages.values()
        if stage.kind == "finetune"
    )


class Killer(threading.Thread):
    """Kills the worker or the node at work on a stage once it has a checkpoint that others can
    reach, and notes the checkpoints from then on.
    """

    def __init__(self, nodes, digest, what, shared, places):
        super().__init__(daemon=True)
        self.nodes, self.digest, self.what, self.shared, self.places = (
            nodes,
            digest,
            what,
            shared,
            places,
        )
        self.last, self.later, self.fault, self.done = None, [], None, threading.Event()
        self.start()

    def steps(self):
        """The newest checkpoint of every folder: whoever starts over has an older one."""
        newest = {}
        with suppress(FileNotFoundError):  # a folder that goes while it is listed
            for path in sorted(
                path
                for place in self.places
                for path in place.glob(f"**/work/{self.digest}*/step-*")
            ):
                newest[path.parent] = path.name
        return list(newest.values())

    def run(self):
        try:
            while not self.done.wait(0.02):
                if self.last is None:
                    self.try_to_kill()
                else:
                    self.later += self.steps()
        except Exception as fault:
            self.fault = fault

    def try_to_kill(self):
        sent = self.shared()
        held = self.nodes.at_work(self.digest) if sent else None
        if held is not None:
            self.last = sent
            node, worker = held
            if self.what == "worker":
                os.kill(worker.pid, signal.SIGKILL)
            elif self.what == "raylet":
                self.nodes.behead(node)
            else:
                self.nodes.kill(node)


@pytest.mark.parametrize(
    ("what", "kind", "executor"),
    [
        ("node", "s3", "tune"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("worker", "disk", "tune"),
                ("raylet", "disk", "tune"),
                ("node", "disk", "tune"),
                ("node", "disk", "actors"),
                ("worker", "disk", "actors"),
                ("raylet", "disk", "actors"),
                ("node", "s3", "actors"),
            )
        ),
    ],
)
def test_a_tune_whose_worker_or_node_is_killed_goes_on_elsewhere_from_its_checkpoint(
    world, undisturbed, nodes, tmp_path, what, kind, executor
):  # noqa: F811
    nodes.add(2 - len(nodes.nodes))
    digest = tune_of(world)
    store = f"file://{tmp_path}/store" if kind == "disk" else f"s3://{BUCKET}/{tmp_path.name}"

    def on_disk():
        return max(
            (path.name for path in (tmp_path / "store" / "work" / digest).glob("step-*")),
            default=None,
        )

    def in_bucket():
        sent = [
            key.split("/")[-2]
            for key in nodes.s3.keys(f"{tmp_path.name}/work/{digest}")
            if key.endswith("/record.json")
        ]
        return max(sent, default=None)

    places = [tmp_path / "store"] if kind == "disk" else [nodes._folder]
    killer = Killer(nodes, digest, what, on_disk if kind == "disk" else in_bucket, places)
    events = []
    began = time.monotonic()

    def told(event):
        events.append(event)
        print(f"{time.monotonic() - began:6.1f}", event.kind, event.unit[:8], event.error)

    results = ftsec_ray.run(
        long(world),
        store=store,
        results=tmp_path / "results",
        executor=executor,
        address=nodes.address,
        on_event=told,
    )
    killer.done.set()
    killer.join()
    print(killer.last, killer.later[:3], killer.later[-3:])
    assert killer.fault is None
    assert killer.last is not None, "the tune ended before it could be killed"
    assert [event.kind for event in events].count("requeued") >= 1
    assert_same_tables(results, undisturbed[1])
    assert min(killer.later, default=killer.last) >= killer.last, (
        "it went on from its checkpoint and did not start over"
    )


def test_a_killed_driver_comes_back_to_the_cluster_finds_everything_and_repeats_nothing(
    world, undisturbed, nodes, tmp_path
):  # noqa: F811
    nodes.add(2 - len(nodes.nodes))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(long(world)))
    store = Store.open(tmp_path / "store")
    command = [
        sys.executable,
        "-m",
        "ftsec_ray",
        "run",
        str(tmp_path / "sweep.yaml"),
        "--store",
        store.uri,
        "--results",
        str(tmp_path / "results"),
        "--address",
        nodes.address,
    ]
    root = Path(__file__).parents[1]
    given = {
        "cwd": root,
        "env": {**os.environ, "PYTHONPATH": str(root)},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    first = subprocess.Popen(command, **given)
    while not list((store.root / "work" / tune_of(world)).glob("step-*")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = {digest: store.record(digest) for digest in store.done()}
    assert before, "the rows and the model came first"
    again = subprocess.run(command, check=False, timeout=280, **given)
    assert again.returncode == 0, again.stdout
    assert {digest: store.record(digest) for digest in before} == before, (
        "what was done is not done again"
    )
    assert_same_tables(ftsec_ray.open_results(tmp_path / "results" / "tiny"), undisturbed[1])
    assert artifacts(store.root) == artifacts(undisturbed[0] / "store")


def small(stages, **resources):
    plan = plan_of(stages)
    return replace(plan, spec=replace(plan.spec, resources=ResourceSpec(**resources)))


@pytest.mark.parametrize("executor", ["tune", pytest.param("actors", marks=pytest.mark.slow)])
def test_stages_spread_over_the_nodes_and_come_to_a_kind_of_node_by_resources_alone(
    nodes, tmp_path, executor
):
    nodes.add(2 - len(nodes.nodes))
    nodes.add(num_gpus=1)
    card = nodes.nodes[-1]
    plain = [stage_of(f"plain{i}", log=str(tmp_path), sleep=1.0) for i in range(12)]
    cards = [
        replace(stage_of(f"card{i}", log=str(tmp_path), sleep=0.2), resource="gpu")
        for i in range(4)
    ]
    report = execute(
        small([*plain, *cards], gpus_per_stage=1.0),
        Store.open(tmp_path / "store"),
        executor=executor,
        address=nodes.address,
        runner="tests.schedule.engine_runners:where",
        session=SESSION,
    )
    assert report.is_complete
    assert set(runs(tmp_path, "card")) == {card.node_id}
    assert len(set(runs(tmp_path, "plain"))) >= 2
    nodes.remove(card)


@pytest.mark.parametrize("executor", ["tune", pytest.param("actors", marks=pytest.mark.slow)])
def test_a_class_without_a_node_ends_the_run_with_what_it_lacks_once_everything_else_is_done(
    nodes, tmp_path, monkeypatch, executor
):
    monkeypatch.setattr(cluster_capacity, "NO_NODE_S", 2.0)
    monkeypatch.setattr(cluster_capacity, "GROWTH_S", 0.5)
    nodes.add(2 - len(nodes.nodes))
    plain, card = (
        stage_of("plain", log=str(tmp_path)),
        replace(stage_of("card", log=str(tmp_path)), resource="gpu"),
    )
    store = Store.open(tmp_path / "store")
    with pytest.raises(
        EnvironmentFault,
        match="no node of the cluster is large enough for a unit of resource class 'gpu'",
    ) as caught:
        execute(
            small([plain, card], gpus_per_stage=1.0),
            store,
            executor=executor,
            address=nodes.address,
            runner="tests.schedule.engine_runners:write",
            session=SESSION,
        )
    assert caught.value.want == "1 CPU + 1 GPU on one node"
    assert "1 CPU" in caught.value.got
    assert store.done() == {plain.digest}


@pytest.mark.parametrize("executor", ["tune", pytest.param("actors", marks=pytest.mark.slow)])
def test_a_run_takes_the_room_of_nodes_that_come_while_it_is_on(
    nodes, tmp_path, monkeypatch, executor
):
    monkeypatch.setattr(cluster_capacity, "SURPLUS", 1)
    monkeypatch.setattr(cluster_capacity, "GROWTH_S", 0.5)
    nodes.add(1 - len(nodes.nodes))
    for node in nodes.nodes[1:]:
        nodes.remove(node)
    running, most = set(), [0]

    def told(event):
        (running.add if event.kind == "started" else running.discard)(event.unit)
        most.append(len(running))
        if event.kind == "finished" and len(nodes.nodes) == 1:
            assert max(most) <= 1
            nodes.add(num_cpus=4)

    plan = plan_of([stage_of(f"s{i}", log=str(tmp_path), sleep=1.0) for i in range(40)])
    report = execute(
        plan,
        Store.open(tmp_path / "store"),
        executor=executor,
        address=nodes.address,
        runner="tests.schedule.engine_runners:write",
        session=SESSION,
        on_event=told,
    )
    assert report.is_complete
    assert max(most) >= 4, (
        "workers that start are waited for, though units are shorter than their start"
    )
