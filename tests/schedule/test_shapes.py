"""Shares of a GPU and a budget on Ray, on a cluster that only claims to have a GPU."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace

import pytest

from ftsec_ray.config.sweep import BudgetSpec, ResourceSpec
from ftsec_ray.context import Runtime
from ftsec_ray.execute.unit import StageResult
from ftsec_ray.plan.resources import cpus_of, gpus_of
from ftsec_ray.schedule.capacity import fixed_capacity, request_of, total_of
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.schedule.engine_runners import local_ray, plan_of, runs, stage_of
from tests.schedule.test_execute import RUNNER, SESSION


@pytest.fixture(scope="module")
def cluster():
    with local_ray(num_cpus=3, num_gpus=1):
        yield


def test_classes_take_room_from_each_other():
    bundles = {
        one: {"CPU": 1.0, **({"GPU": gpus_of(one)} if gpus_of(one) else {})}
        for one in ("cpu", "gpu:0.125", "gpu:0.5", "gpu")
    }
    free_slots = fixed_capacity(bundles, {"CPU": 16.0, "GPU": 1.0})
    assert free_slots({}) == {"cpu": 16, "gpu:0.125": 8, "gpu:0.5": 2, "gpu": 1}
    assert free_slots({"gpu:0.5": 1}) == {"cpu": 15, "gpu:0.125": 4, "gpu:0.5": 1, "gpu": 0}
    assert free_slots({"gpu": 1, "cpu": 15}) == {"cpu": 0, "gpu:0.125": 0, "gpu:0.5": 0, "gpu": 0}
    assert fixed_capacity(bundles, {"CPU": 1.0})({}) == dict.fromkeys(bundles, 1), (
        "the first is asked for, so that its lack is told"
    )


def test_a_pipeline_gets_as_many_workers_as_there_is_room_for_and_its_trial_nothing():
    asked = {"CPU": 8.0, "GPU": 2.0}
    assert request_of("gpu", {"CPU": 1.0, "GPU": 1.0}, {}) == [{"CPU": 1.0, "GPU": 1.0}]
    each = {"CPU": 2.0, "GPU": 0.5}
    rooms = [
        {"CPU": 64.0, "GPU": 8.0},
        {"CPU": 4.0, "GPU": 8.0},
        {"CPU": 64.0, "GPU": 0.5},
        {"CPU": 0.0},
    ]
    found = [request_of("data:4:0.5", asked, have) for have in rooms]
    assert found == [[{}, *[each] * count] for count in (4, 2, 1, 4)], (
        "a cluster without any room may grow"
    )
    assert total_of(found[1]) == {"CPU": 4.0, "GPU": 1.0}


def test_while_a_pipeline_waits_for_its_cores_nothing_is_handed_out_that_would_take_one(tmp_path):
    from ftsec_ray.schedule.dispatcher import Dispatcher
    from ftsec_ray.schedule.trials import StageSearcher
    from ftsec_ray.schedule.unit_leases import UnitLeases

    first = stage_of("first", cost_s=2.0)
    stages = [
        first,
        replace(stage_of("wide", first, cost_s=50.0), resource="data:2"),
        *(stage_of(f"s{i}") for i in range(4)),
    ]
    dispatcher = Dispatcher(plan_of(stages), Store.open(tmp_path), set())
    free_slots = fixed_capacity({"cpu": {"CPU": 1.0}, "data:2": {"CPU": 2.0}}, {"CPU": 2.0})
    leases = UnitLeases(dispatcher, free_slots=free_slots, limit=4)
    searcher = StageSearcher(leases, given=frozenset(dispatcher.units))

    def ask(trial):
        given = searcher.suggest(trial)
        return given and dispatcher.units[given["unit"]].stages[-1].params["name"]

    def end(trial):
        stage = dispatcher.units[searcher.live[trial]].stages[-1]
        searcher.on_trial_complete(
            trial,
            {"verdicts": json.dumps([asdict(StageResult(digest=stage.digest, status="done"))])},
        )

    assert [ask("a"), ask("b"), ask("c")] == ["first", "s0", None]
    end("a")
    assert [ask("c"), ask("d")] == [
        "wide",
        None,
    ], "it comes first, though s0 still holds one of the two cores that it needs"
    end("b")
    assert ask("d") is None
    searcher.on_trial_start("c")
    assert ask("d") is None, "it holds both"
    end("c")
    assert [ask("d"), ask("e"), ask("f")] == ["s1", "s2", None]


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("executor", ["tune", "actors"])
def test_stages_of_four_classes_run_in_what_they_ask_for_and_workers_are_used_again(
    tmp_path, executor
):
    kinds = ["cpu", "gpu:0.125", "gpu:0.5", "gpu"]
    base = stage_of("base", log=str(tmp_path))
    stages = [
        base,
        *(
            replace(stage_of(f"s{i}", base, log=str(tmp_path), sleep=0.05), resource=kinds[i % 4])
            for i in range(12)
        ),
    ]
    plan = plan_of(stages)
    plan = replace(plan, spec=replace(plan.spec, resources=ResourceSpec(gpus_per_stage="auto")))
    began = time.monotonic()
    report = execute(
        plan,
        Store.open(tmp_path / "store"),
        executor=executor,
        runner="tests.schedule.engine_runners:placed",
        session=SESSION,
        runtime=Runtime(device="cuda"),
    )
    print(f"13 units of four classes: {time.monotonic() - began:.1f} s")
    assert report.is_complete
    for stage in stages:
        device = "cuda" if gpus_of(stage.resource) else "cpu"
        assert runs(tmp_path, stage.params["name"]) == [
            f"{gpus_of(stage.resource):g}:{cpus_of(stage.resource, plan.spec):g}:{device}"
        ]
    workers = {line.split()[2] for line in (tmp_path / "log.txt").read_text().splitlines()}
    assert len(workers) < len(stages), workers


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("executor", ["tune", "actors"])
def test_a_run_on_ray_stops_at_its_budget_and_ends(tmp_path, executor):
    store = Store.open(tmp_path / "store")
    plan = plan_of([stage_of(f"s{i}", cost_s=0.002, sleep=0.2) for i in range(12)])
    plan = replace(plan, spec=replace(plan.spec, budget=BudgetSpec(hours=0.5 / 3600)))
    report = execute(plan, store, executor=executor, workers=2, runner=RUNNER, session=SESSION)
    assert 1 <= len(report.done) <= 5, "three, and what ran beside the third"
    assert len(report.done) + len(report.unaffordable) == 12
    assert store.done() == set(report.done)
