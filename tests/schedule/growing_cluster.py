"""A cluster that grows for the units of a plan, shrinks when they are done, and cannot grow for
what no node type holds.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import ray

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import cluster_capacity
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.clusters import autoscaling_cluster
from tests.schedule.engine_runners import plan_of, runs, stage_of
from tests.schedule.test_execute import SESSION

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
IDLE_S = 6.0


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    kinds = {
        "plain": {"resources": {"CPU": 1}, "max_workers": 2},
        "card": {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2},
    }
    with autoscaling_cluster(tmp_path_factory.mktemp("a"), kinds, idle_s=IDLE_S) as found:
        yield found


@pytest.fixture
def driver(address):
    """This process as a driver of the cluster."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def alive():
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def run(stages, store, address, *, workers=None, **resources):
    plan = plan_of(stages)
    plan = replace(plan, spec=replace(plan.spec, resources=ResourceSpec(**resources)))
    return execute(
        plan,
        Store.open(store),
        address=address,
        workers=workers,
        runner="tests.schedule.engine_runners:where",
        session=SESSION,
    )


@pytest.mark.usefixtures("driver")
def test_nodes_come_when_the_plan_needs_them_and_leave_when_idle(address, tmp_path):
    assert len(alive()) == 1
    cards = [
        replace(stage_of(f"one{i}", log=str(tmp_path), sleep=0.5), resource="gpu") for i in range(3)
    ]
    first = run(cards, tmp_path / "store", address, workers=1, gpus_per_stage=1.0)
    assert first.is_complete, {verdict.error for verdict in first.failed.values()}
    assert len(set(runs(tmp_path, "one"))) == 1, "one unit at a time needs one node"
    assert not [node for node in alive() if node.get("CPU") and not node.get("GPU")], (
        "no node without a GPU came for units that ask for one"
    )
    more = [
        replace(stage_of(f"many{i}", log=str(tmp_path), sleep=3.0), resource="gpu")
        for i in range(16)
    ]
    assert run(more, tmp_path / "store", address, gpus_per_stage=1.0).is_complete
    assert len(set(runs(tmp_path, "many"))) == 2, (
        "the trials that waited made the cluster grow to its limit"
    )
    assert len(alive()) <= 3
    deadline = time.monotonic() + 120
    while len(alive()) > 1:
        assert time.monotonic() < deadline, alive()
        time.sleep(0.5)


@pytest.mark.usefixtures("driver")
def test_a_unit_that_no_node_type_holds_ends_the_run_after_a_while_with_what_was_asked_and_what_there_is(
    address, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster_capacity, "NO_NODE_S", 4.0)
    monkeypatch.setattr(cluster_capacity, "GROWTH_S", 0.5)
    began = time.monotonic()
    with pytest.raises(
        EnvironmentFault,
        match="large enough for a unit of resource class 'cpu', and no node is being added",
    ) as caught:
        run([stage_of("huge", log=str(tmp_path))], tmp_path / "store", address, cpus_per_stage=64.0)
    assert time.monotonic() - began > 4.0
    assert caught.value.want == "64 CPU on one node"
    assert caught.value.got
    assert runs(tmp_path, "huge") == []
