"""One unit: what is published, what a failure leaves, and what stands in the record."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest

from ftsec_ray.code_versions import stage_code
from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault, StageError
from ftsec_ray.execute import stage_job
from ftsec_ray.execute.unit import code_of, run_unit, short_text
from ftsec_ray.plan.stage import Stage
from ftsec_ray.store import Store
from tests.schedule.engine_runners import Bench, stage_of, write


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


@pytest.fixture
def session(store):
    return Bench(store, None, 0.0)


def chain():
    first = stage_of("first")
    second = stage_of("second", first)
    return [first, second, stage_of("third", second)]


def test_all_stages_of_a_unit_are_published_in_order(store, session):
    stages = chain()
    verdicts = run_unit(stages, store, session, write)
    assert [v.status for v in verdicts] == ["done"] * 3
    assert store.done() == {stage.digest for stage in stages}


def test_the_record_says_what_ran_where_and_at_what_cost(store, session):
    stage = stage_of("first")
    run_unit([stage], store, session, write, attempt=2)
    record = store.record(stage.digest)
    assert (record["kind"], record["params"], record["inputs"], record["seed"]) == (
        "finetune",
        {"name": "first"},
        [],
        0,
    )
    assert (record["tokens"], record["notes"], record["attempt"]) == (7, {"seen": 0}, 2)
    assert record["code"] == stage_code("finetune")
    assert record["wall_s"] > 0
    assert record["cpu_s"] >= 0
    assert record["peak_bytes"] > 2**20
    assert record["host"]
    assert {"python", "torch", "transformers", "peft", "ray"} <= set(record["versions"])
    assert record["versions"]["torch"]


def test_what_is_done_is_not_run_again(store, session):
    stage = stage_of("first")
    run_unit([stage], store, session, write)
    verdicts = run_unit([stage], store, session, lambda *a: pytest.fail("ran again"))
    assert [v.status for v in verdicts] == ["cached"]


def test_a_failed_stage_has_a_verdict_and_the_rest_of_its_unit_does_not_run(store, session):
    first = stage_of("first")
    second = stage_of("second", first, fail=True)
    third = stage_of("third", second)
    verdicts = run_unit([first, second, third], store, session, write)
    assert [v.status for v in verdicts] == ["done", "failed", "upstream_failed"]
    assert store.done() == {first.digest}
    failure = store.failures()[second.digest]
    assert failure["error_code"] == "stage"
    assert "told to fail" in failure["error"]
    assert failure["attempt"] == 1
    assert failure["host"]
    assert list((store.root / "staging").iterdir()) == []


def test_success_clears_an_old_verdict_and_the_work_folder(store, session):
    stage = stage_of("first")
    store.write_verdict(stage.digest, {"error": "old"})
    (store.workdir(stage.digest) / "step_1").write_text("x")
    run_unit([stage], store, session, write)
    assert store.failures() == {}
    assert not (store.root / "work" / stage.digest).exists()


def test_a_failure_keeps_the_work_folder_for_the_next_attempt(store, session):
    stage = stage_of("first", fail=True)
    (store.workdir(stage.digest) / "step_1").write_text("x")
    run_unit([stage], store, session, write)
    assert (store.root / "work" / stage.digest / "step_1").exists()


def test_a_damaged_input_asks_for_its_producer_and_is_no_failure(store, session):
    first, second, _ = chain()
    run_unit([first], store, session, write)
    (store.fetch(first.digest) / "out.json").write_text("{}")
    fresh = Store.open(store.uri)
    verdicts = run_unit([second], fresh, Bench(fresh, None, 0.0), write)
    assert [(v.status, v.damaged) for v in verdicts] == [("retry", first.digest)]
    assert fresh.failures() == {}


def test_an_error_that_nobody_raised_on_purpose_keeps_the_end_of_its_traceback(store, session):
    def broken(stage, out, session):
        return {}["missing"]

    verdict = run_unit([stage_of("first")], store, session, broken)[0]
    assert verdict.error_code == "KeyError"
    assert "KeyError: 'missing'" in verdict.error
    assert len(verdict.error.splitlines()) <= 6


def test_an_interrupt_is_not_taken_for_a_failure(store, session):
    def interrupted(stage, out, session):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_unit([stage_of("first")], store, session, interrupted)
    assert store.failures() == {}
    assert list((store.root / "staging").iterdir()) == []


def test_a_stage_that_does_not_fit_runs_once_more_with_half_the_rows_at_a_time(store):
    session = Bench(store, None, 0.0)
    session.runtime = Runtime(micro_batch=8, eval_batch=64)
    seen = []

    def greedy(stage, out, session):
        seen.append((session.runtime.micro_batch, session.runtime.eval_batch, list(out.iterdir())))
        (out / "half_written").write_text("x")
        if session.runtime.micro_batch > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        (out / "half_written").rename(out / "whole")

    stage = stage_of("first")
    assert run_unit([stage], store, session, greedy)[0].status == "done"
    assert seen == [(8, 64, []), (4, 32, [])]
    assert store.record(stage.digest)["micro_batch"] == 4
    assert session.runtime.micro_batch == 8
    assert list(store.record(stage.digest)["files"]) == ["whole"]


def test_a_stage_that_never_fits_fails_as_out_of_memory(store):
    session = Bench(store, None, 0.0)
    session.runtime = Runtime()
    calls = []

    def greedy(stage, out, session):
        calls.append(session.runtime.micro_batch)
        raise MemoryError

    verdict = run_unit([stage_of("first")], store, session, greedy)[0]
    assert (verdict.status, verdict.error_code) == ("failed", "oom")
    assert calls == [None, 4]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "oom",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (StageError("loss is not a number", float("inf")), "stage"),
        (ValueError("x"), "ValueError"),
    ],
)
def test_errors_have_short_codes(error, code):
    assert code_of(error) == code
    assert short_text(error)


def test_a_runner_is_found_by_its_import_path(store, session):
    verdicts = run_unit([stage_of("first")], store, session, "tests.schedule.engine_runners:write")
    assert verdicts[0].status == "done"


def test_a_runner_that_does_not_exist_is_an_environment_fault(store, session):
    with pytest.raises(EnvironmentFault, match="no_such_module:run"):
        run_unit([stage_of("first")], store, session, "no_such_module:run")


def test_measurements_that_are_no_json_fail_the_stage_and_publish_nothing(store, session):
    verdict = run_unit(
        [stage_of("first")], store, session, lambda *a: {"notes": {"loss": float("nan")}}
    )[0]
    assert verdict.status == "failed"
    assert store.done() == set()
    assert (
        json.loads((store.root / "verdicts" / f"{verdict.digest}.json").read_text())["status"]
        == "failed"
    )


def test_what_a_job_and_its_hooks_warn_of_is_in_the_notes_once_and_sorted(tmp_path, monkeypatch):
    session = SimpleNamespace(
        task=lambda digest: None, runtime=Runtime(), workdir=lambda digest: tmp_path
    )
    stage = Stage("d", "made_up", None, None, (("task", "t"),), {}, {}, "cpu", 1.0)

    def run(job):
        job.context().warn("of a hook")
        job.warn("of the engine")
        job.context().warn("of a hook")
        return {"notes": {"rows": 1}, "tokens": 2}

    monkeypatch.setattr(stage_job, "runner_of", lambda kind: run)
    assert stage_job.run_stage(stage, tmp_path, session) == {
        "notes": {"rows": 1, "warnings": ["of a hook", "of the engine"]},
        "tokens": 2,
    }
    monkeypatch.setattr(stage_job, "runner_of", lambda kind: lambda job: {"tokens": 2})
    assert stage_job.run_stage(stage, tmp_path, session) == {"tokens": 2}
