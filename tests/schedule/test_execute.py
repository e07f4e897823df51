"""Whole runs without Ray: what is done, what failed, what is done again; and the
executors by name.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import replace

import pytest

import ftsec_ray
from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.errors import EnvironmentFault, SpecError
from ftsec_ray.schedule.execution import execute, runtime_of
from ftsec_ray.schedule.executors import EXECUTORS, load_executor
from ftsec_ray.store import Store
from tests.schedule.engine_runners import plan_of, runs, stage_of

RUNNER, SESSION = "tests.schedule.engine_runners:write", "tests.schedule.engine_runners:Bench"


def run(plan, store, **rest):
    return execute(
        plan, store, **{"executor": "local", "runner": RUNNER, "session": SESSION, **rest}
    )


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


def tree(folder):
    """base -> left, right -> two ends; `left` may fail."""
    base = stage_of("base", log=str(folder))
    left, right = stage_of("left", base, log=str(folder)), stage_of("right", base, log=str(folder))
    return [
        base,
        left,
        right,
        stage_of("left_a", left, log=str(folder)),
        stage_of("left_b", left, log=str(folder)),
        stage_of("right_a", right, log=str(folder)),
    ]


def test_every_needed_stage_is_done_once(store, tmp_path):
    plan = plan_of(tree(tmp_path))
    events = []
    report = run(plan, store, on_event=events.append)
    assert sorted(report.done) == sorted(plan.stages)
    assert report.is_complete
    assert sorted(runs(tmp_path)) == ["base", "left", "left_a", "left_b", "right", "right_a"]
    assert (
        [event.kind for event in events].count("started")
        == [event.kind for event in events].count("finished")
        == 5
    )
    assert {digest for event in events for digest in event.stages} == set(plan.stages)
    assert set(report.attempts.values()) == {1}


def test_a_second_run_does_nothing(store, tmp_path):
    plan = plan_of(tree(tmp_path))
    run(plan, store)
    for executor in EXECUTORS:
        report = run(
            plan, store, executor=executor, on_event=lambda event: pytest.fail("something ran")
        )
        assert report.done == ()
        assert sorted(report.cached) == sorted(plan.stages)
    assert len(runs(tmp_path)) == 6


def test_nothing_to_run_starts_no_ray(store, tmp_path):
    import subprocess
    from pathlib import Path

    plan = plan_of([stage_of("one")])
    run(plan, store)
    code = (
        "import sys; from ftsec_ray.schedule.execution import execute; from ftsec_ray.store import"
        " Store; from tests.schedule.engine_runners import plan_of, stage_of; r ="
        f" execute(plan_of([stage_of('one')]), Store.open({store.uri!r})); print(len(r.cached),"
        " 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout.split() == ["1", "False", "False"]


def test_a_failure_stops_its_descendants_and_nobody_else(store, tmp_path):
    stages = tree(tmp_path)
    bad = stage_of("left", stages[0], log=str(tmp_path), fail=True)
    plan = plan_of(
        [stages[0], bad, stages[2], stage_of("left_a", bad), stage_of("left_b", bad), stages[5]]
    )
    events = []
    report = run(plan, store, on_event=events.append)
    assert set(report.failed) == {bad.digest}
    assert report.failed[bad.digest].error_code == "stage"
    assert len(report.upstream_failed) == 2
    assert sorted(runs(tmp_path)) == ["base", "right", "right_a"]
    assert not report.is_complete
    assert next(event.error for event in events if event.kind == "failed").startswith(
        "[stage] told to fail"
    )
    assert {
        event.kind: set(event.upstream_failed) for event in events if event.upstream_failed
    } == {"failed": set(report.upstream_failed)}
    assert set(store.failures()) == {bad.digest}


def test_a_failed_stage_is_tried_again_by_the_next_run(store, tmp_path):
    bad = stage_of("bad", fail=True, log=str(tmp_path))
    plan = plan_of([bad])
    run(plan, store)
    run(plan, store)
    assert runs(tmp_path, "began") == ["bad", "bad"]


def test_an_artifact_damaged_since_the_last_run_is_made_again(store, tmp_path):
    stages = tree(tmp_path)
    run(plan_of(stages[:3]), store)
    (store.fetch(stages[1].digest) / "out.json").write_text("{}")
    events = []
    report = run(plan_of(stages), Store.open(store.uri), on_event=events.append)
    assert report.is_complete
    assert runs(tmp_path).count("left") == 2
    assert runs(tmp_path).count("base") == 1
    assert "requeued" in [event.kind for event in events]
    assert Store.open(store.uri).done() == {stage.digest for stage in stages}


def test_an_artifact_that_is_gone_with_its_ancestors_is_made_again(store, tmp_path):
    import shutil

    stages = tree(tmp_path)
    run(plan_of(stages[:3]), store)
    (store.fetch(stages[1].digest) / "out.json").write_text("{}")
    shutil.rmtree(store.fetch(stages[0].digest))
    fresh = Store.open(store.uri)
    report = run(plan_of(stages), fresh)
    assert report.is_complete
    assert sorted(runs(tmp_path)) == sorted(
        ["base", "left", "right", "base", "left", "left_a", "left_b", "right_a"]
    )


def test_an_artifact_damaged_within_the_run_is_made_again(store, tmp_path):
    base = stage_of("base", log=str(tmp_path))
    first, second = (
        stage_of("first", base, cost_s=5.0, log=str(tmp_path)),
        stage_of("second", base, log=str(tmp_path)),
    )

    def damage(event):
        if event.kind == "finished" and event.unit == first.digest:
            (store.root / "artifacts" / base.digest[:2] / base.digest / "out.json").unlink()
            store._verified.clear()

    report = run(plan_of([base, first, second]), store, on_event=damage)
    assert report.is_complete
    assert runs(tmp_path) == ["base", "first", "base", "second"]


def test_an_unknown_executor_is_refused_with_the_names_of_those_there_are(store, tmp_path):
    for refused in (
        lambda: run(plan_of([stage_of("one")]), store, executor="slurm"),
        lambda: ftsec_ray.run(
            "sweeps/quickstart.yaml",
            store=store.uri,
            results=tmp_path / "results",
            executor="slurm",
        ),
    ):
        with pytest.raises(SpecError, match="'slurm'") as caught:
            refused()
        assert caught.value.want == "tune | actors | local"


def test_every_executor_of_the_table_is_a_function_of_the_same_arguments():
    arguments = {
        name: list(inspect.signature(load_executor(name)).parameters) for name in EXECUTORS
    }
    assert set(map(tuple, arguments.values())) == {
        ("dispatcher", "spec", "resources", "address", "workers")
    }
    assert list(arguments) == ["tune", "actors", "local"]


def test_an_executor_that_cannot_be_imported_says_which_are_left(store, monkeypatch):
    gone = replace(EXECUTORS["tune"], function="ray.no_such_module:run")
    monkeypatch.setitem(EXECUTORS, "tune", gone)
    with pytest.raises(EnvironmentFault, match="'tune' cannot be imported") as caught:
        run(plan_of([stage_of("one")]), store, executor="tune")
    assert caught.value.fix == "run with --executor actors or local"


def test_the_runtime_comes_from_the_sweep(tmp_path):
    plan = plan_of([stage_of("one")])
    resources = ResourceSpec(
        gpus_per_stage=0.5, micro_batch=4, eval_batch=8, checkpoint_every_s=5.0
    )
    runtime = runtime_of(replace(plan, spec=replace(plan.spec, resources=resources)))
    assert (
        runtime.device,
        runtime.micro_batch,
        runtime.eval_batch,
        runtime.checkpoint_every_s,
    ) == ("cuda", 4, 8, 5.0)


def contents(store):
    """Digest of every file of every artifact but the records, which hold times."""
    artifacts = store.root / "artifacts"
    return {
        str(path.relative_to(artifacts)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(artifacts.rglob("*"))
        if path.is_file() and path.name != "record.json"
    }
