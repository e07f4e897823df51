"""The environment of worker processes: the same on every executor that starts some."""

from __future__ import annotations

import os

import pytest

from ftsec_ray.schedule import execution
from ftsec_ray.schedule.execution import execute
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
