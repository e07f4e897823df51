"""The environment of worker processes: the same on every executor that starts some."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.schedule import execution
from ftsec_ray.schedule.execution import execute
from ftsec_ray.schedule.jobs import hand_over
from ftsec_ray.schedule.ray_session import worker_environment
from ftsec_ray.store import Store
from tests.schedule.engine_runners import local_ray, plan_of, runs, stage_of
from tests.schedule.test_execute import SESSION

VARIABLE = "FTSEC_TEST_OF_THE_ENVIRONMENT"


@pytest.fixture(scope="module")
def cluster():
    with local_ray(num_cpus=1):
        yield


def test_a_node_may_take_long_to_boot_unless_the_user_says_otherwise(monkeypatch):
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.delenv(name, raising=False)
    assert worker_environment()[name] == "1800"
    monkeypatch.setenv(name, "77")
    assert worker_environment()[name] == "77"


def test_limits_that_are_set_here_reach_workers_and_jobs_but_nothing_that_is_no_count(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FTSEC_MAX_DATA_ROWS", "7000000")
    monkeypatch.setenv("FTSEC_MAX_SECRET", "hf_secret")
    specs: list[WorkerSpec] = []

    def run(_dispatcher, spec, *_, **__):
        specs.append(spec)

    monkeypatch.setattr(execution, "load_executor", lambda _: run)
    plan = plan_of([stage_of("one", log=str(tmp_path))])
    execute(plan, Store.open(tmp_path / "store"), executor="local", session=SESSION)
    assert specs[0].environment["FTSEC_MAX_DATA_ROWS"] == "7000000"
    assert "FTSEC_MAX_SECRET" not in specs[0].environment

    asked: dict[str, object] = {}
    client = SimpleNamespace(submit_job=lambda **given: asked.update(given))
    hand_over(SimpleNamespace(client=client), ["true"], tmp_path, submission_id="a", name="a")
    assert asked["runtime_env"]["env_vars"] == {"FTSEC_MAX_DATA_ROWS": "7000000"}


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("executor", ["tune", "actors"])
def test_workers_start_with_the_variables_of_the_run_and_without_cloud_keys(
    tmp_path, monkeypatch, executor
):
    monkeypatch.setattr(execution, "worker_environment", lambda: {VARIABLE: "given"})
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-driver")
    report = execute(
        plan_of([stage_of("one", log=str(tmp_path))]),
        Store.open(tmp_path / "store"),
        executor=executor,
        runner="tests.schedule.engine_runners:environment",
        session=SESSION,
    )
    assert report.is_complete
    assert runs(tmp_path, VARIABLE) == ["given"]
    assert runs(tmp_path, "AWS_SESSION_TOKEN") == ["none"]
    assert VARIABLE not in os.environ
