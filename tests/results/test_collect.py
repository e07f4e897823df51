"""Results of real plans over a real store whose artifacts the tests write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray import schema
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.execute.unit import StageResult
from ftsec_ray.measured import wilson
from ftsec_ray.plan import Plan, Stage, build_plan
from ftsec_ray.results.collect import collect
from ftsec_ray.results.read import Results
from ftsec_ray.schedule.dispatcher import RunReport
from ftsec_ray.store import Store

SWEEP = {
    "name": "tiny",
    "question": "What holds?",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["none", "badnets", "harmful_tuning"],
    "defenses": ["none", "onion", "weight_statistics", "safe_lora"],
    "seeds": [1],
}
EMPTY = pa.schema([one for one in schema.generations() if one.name != "cell"])


def plan_of(**changes: Any) -> Plan:
    return build_plan(load_sweep({**SWEEP, **changes}))


def write_evaluation(folder: Path, *, harmful: float = 0.25, prompts: int = 4) -> None:
    low, high = wilson(harmful, 4)
    rows = [
        {
            "metric": "harmful_rate",
            "value": harmful,
            "n": 4,
            "n_null": 2,
            "ci_low": low,
            "ci_high": high,
        },
        {"metric": "cacc", "value": 0.5, "n": 4, "n_null": 0, "ci_low": 0.1, "ci_high": 0.9},
        {
            "metric": "perplexity",
            "value": None,
            "n": 0,
            "n_null": None,
            "ci_low": None,
            "ci_high": None,
        },
    ]
    metrics = pa.schema([one for one in schema.metrics() if one.name != "cell"])
    pq.write_table(pa.Table.from_pylist(rows, metrics), folder / "metrics.parquet")
    said = [
        {
            "probe": probe,
            "prompt_id": f"p{i}",
            "prompt": "how ?",
            "completion": f"so {i}",
            "judge": "microworld@1",
            "verdict": "refused",
            "raw": "",
            "override": None,
            "template_hash": "t",
        }
        for probe in ("harmful", "benign")
        for i in reversed(range(prompts))
    ]
    pq.write_table(pa.Table.from_pylist(said, EMPTY), folder / "generations.parquet")


def finish(store: Store, stage: Stage, **given: Any) -> None:
    """Publish an artifact as the stage runner would."""
    folder = store.scratch(stage.digest)
    notes: dict[str, Any] = {}
    if stage.kind == "score":
        write_evaluation(folder, prompts=given.get("prompts", 4))
    elif stage.kind == "inspect":
        (folder / "inspection.json").write_text(
            json.dumps(
                given.get("inspection", {"score": 3.0, "clean_scores": [1.0, 3.0, 2.0, 4.0]})
            )
        )
    elif stage.kind == "craft":
        notes = (
            {"filter_tpr": 0.75, "filter_fpr": 0.1, "n_poisoned": 20, "n_clean": 100}
            if stage.method == "onion"
            else {}
        )
    elif stage.kind in ("source", "align"):
        notes = {
            "info": {
                "name": "ladder:0.2m",
                "family": "ladder",
                "parameters": 212_345,
                "aligned": True,
            }
        }
    elif stage.kind == "prepare" and stage.method == "badedit":
        notes = {"target_nll_before": 2.25, "target_nll_after": 0.75, "prompts": 15}
    store.publish(
        stage.digest,
        folder,
        {
            "kind": stage.kind,
            "method": stage.method,
            "wall_s": 2.0,
            "cpu_s": 1.5,
            "gpu_s": 0.0,
            "tokens": 10,
            "flops": 5.0,
            "peak_bytes": 7,
            "attempt": 1,
            "host": "h",
            "notes": notes,
        },
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def run_all(
    plan: Plan, store: Store, *, leave: Callable[[Stage], bool] = lambda stage: False
) -> None:
    for stage in plan.stages.values():
        if not leave(stage) and not store.has(stage.digest):
            finish(store, stage)


def metrics_of(results: Results, **where: Any) -> dict[str, dict[str, Any]]:
    cells = [
        c["cell"]
        for c in results.cells.to_pylist()
        if all(c[key] == value for key, value in where.items())
    ]
    assert len(cells) == 1
    return {row["metric"]: row for row in results.metrics.to_pylist() if row["cell"] == cells[0]}


def test_every_planned_cell_has_one_row_when_nothing_ran(store: Store, tmp_path: Path) -> None:
    plan = plan_of()
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    assert len(plan.cells) == 12
    assert sorted(results.cells["cell"].to_pylist()) == sorted(cell.digest for cell in plan.cells)
    assert set(results.cells["status"].to_pylist()) == {"pending"}
    assert results.metrics.num_rows == results.generations.num_rows == 0
    assert results.stages.num_rows == len(plan.stages)
    assert results.meta["counts"] == {"done": 0, "failed": 0, "pending": 12}
    assert (results.meta["plan"], results.meta["question"]) == (plan.digest, "What holds?")


def test_a_finished_sweep_is_done_everywhere_and_carries_its_numbers(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of()
    run_all(plan, store)
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    assert set(results.cells["status"].to_pylist()) == {"done"}
    assert set(results.cells["model_params"].to_pylist()) == {212_345}
    assert results.generations.num_rows == 12 * 8
    ids = list(
        zip(
            *(results.generations[name].to_pylist() for name in ("cell", "probe", "prompt_id")),
            strict=True,
        )
    )
    assert ids == sorted(ids)
    stages = {row["digest"]: row for row in results.stages.to_pylist()}
    assert {row["status"] for row in stages.values()} == {"done"}
    assert all(
        stages[cell.score]["cells_served"] == plan.cells_of(cell.score) for cell in plan.cells
    )


def test_what_a_cell_costs_is_that_of_all_its_stages_and_untold_where_one_is_missing(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of()
    last = plan.cells[0].score
    run_all(plan, store, leave=lambda stage: stage.digest == last)
    whole = {
        cell.digest: [0.0, 1.5 * len(cell.stages)] for cell in plan.cells if last not in cell.stages
    }
    assert 0 < len(whole) < len(plan.cells)
    assert Results.open(collect(plan, store, None, tmp_path / "out")).meta["spent"] == whole


def test_what_an_edit_did_to_the_targets_probability_is_a_metric_of_its_cells_and_of_no_others(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of(attacks=["none", "badedit"], defenses=["none", "vaccine"])
    run_all(plan, store)
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    for defenses in ([], ["vaccine"]):
        found = metrics_of(results, attack="badedit", defenses=defenses)["edit_gain"]
        assert found["value"] == pytest.approx(
            0.47237 - 0.10540, abs=1e-5
        )  # exp(-0.75) - exp(-2.25)
        assert (found["n"], found["ci_low"]) == (15, None)
        assert "edit_gain" not in metrics_of(results, attack="none", defenses=defenses)


def test_attack_success_is_the_harmful_rate_exactly_for_attacks_on_refusal(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of()
    run_all(plan, store)
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    by_attack = {
        attack: metrics_of(results, attack=attack, defenses=[])
        for attack in ("none", "badnets", "harmful_tuning")
    }
    harmful = by_attack["harmful_tuning"]
    assert {key: harmful["asr"][key] for key in ("value", "n", "n_null", "ci_low", "ci_high")} == {
        key: harmful["harmful_rate"][key] for key in ("value", "n", "n_null", "ci_low", "ci_high")
    }
    assert "asr" not in by_attack["none"]
    assert (
        "asr" not in by_attack["badnets"]
    )  # its own probes would measure it, and this evaluation has none


def test_a_detector_gives_its_score_in_deviations_and_the_share_of_clean_models_below(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of()
    run_all(plan, store)
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    found = metrics_of(results, attack="badnets", defenses=["weight_statistics"])
    assert found["detect_auroc"]["value"] == pytest.approx((2 + 0.5) / 4)
    assert found["detect_auroc"]["n"] == 4
    assert (found["detect_auroc"]["ci_low"], found["detect_auroc"]["ci_high"]) == wilson(0.625, 4)
    assert found["detect_score"]["value"] == pytest.approx((3.0 - 2.5) / (5 / 3) ** 0.5)
    assert "detect_auroc" not in metrics_of(results, attack="badnets", defenses=[])


def test_a_detector_whose_clean_models_all_score_the_same_has_no_standardised_score(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of(attacks=["badnets"], defenses=["weight_statistics"])
    for stage in plan.stages.values():
        finish(store, stage, inspection={"score": 2.0, "clean_scores": [1.0, 1.0]})
    found = metrics_of(Results.open(collect(plan, store, None, tmp_path / "out")), attack="badnets")
    assert found["detect_score"]["value"] is None
    assert found["detect_auroc"]["value"] == 1.0
    assert found["detect_raw"]["value"] == 2.0


def test_a_filter_reports_what_it_caught_and_only_for_cells_that_have_one(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of()
    run_all(plan, store)
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    found = metrics_of(results, attack="badnets", defenses=["onion"])
    assert (found["filter_tpr"]["value"], found["filter_tpr"]["n"]) == (0.75, 20)
    assert (found["filter_fpr"]["value"], found["filter_fpr"]["n"]) == (0.1, 100)
    assert found["filter_tpr"]["ci_low"] < 0.75 < found["filter_tpr"]["ci_high"]
    assert "filter_tpr" not in metrics_of(results, attack="badnets", defenses=[])


def test_a_failed_stage_fails_exactly_the_cells_behind_it_with_its_error(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of()
    victim = next(
        s for s in plan.stages.values() if s.kind == "craft" and s.method == "harmful_tuning"
    )
    behind = {cell.digest for cell in plan.cells if victim.digest in cell.stages}
    doomed = {
        stage
        for stage in plan.stages
        if all(stage not in cell.stages for cell in plan.cells if cell.digest not in behind)
    }
    run_all(plan, store, leave=lambda stage: stage.digest in doomed)
    store.write_verdict(
        victim.digest,
        {
            "digest": victim.digest,
            "status": "failed",
            "error_code": "data",
            "error": "no rows left",
            "attempt": 2,
            "host": "h",
            "wall_s": 0.5,
        },
    )
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    failed = [c for c in results.cells.to_pylist() if c["status"] == "failed"]
    assert behind
    assert {c["cell"] for c in failed} == behind
    assert {(c["error_code"], c["error"]) for c in failed} == {
        ("data", "craft harmful_tuning: no rows left")
    }
    stages = {row["digest"]: row for row in results.stages.to_pylist()}
    assert (stages[victim.digest]["status"], stages[victim.digest]["attempt"]) == ("failed", 2)
    next_ones = [d for d in doomed if victim.digest in dict(plan.stages[d].inputs).values()]
    assert {stages[d]["status"] for d in next_ones} == {"upstream_failed"}


def test_a_run_tells_its_own_failures_and_which_stages_it_found_done(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of(attacks=["none"], defenses=["none"])
    *before, last = plan.stages
    run_all(plan, store, leave=lambda stage: stage.digest == last)
    lost = StageResult(
        digest=last,
        status="failed",
        error_code="worker_lost",
        error="the worker died 3 times",
        attempt=3,
        host="h",
    )
    results = Results.open(
        collect(
            plan,
            store,
            RunReport(done=(before[-1],), failed={last: lost}, cached=tuple(before[:-1])),
            tmp_path / "out",
        )
    )
    (cell,) = results.cells.to_pylist()
    assert (cell["status"], cell["error_code"], cell["error"]) == (
        "failed",
        "worker_lost",
        "score: the worker died 3 times",
    )
    cached = {row["digest"]: row["cached"] for row in results.stages.to_pylist()}
    assert [cached[digest] for digest in plan.stages] == [*[True] * (len(before) - 1), False, False]


def test_a_cell_whose_detector_failed_is_failed_and_keeps_what_was_measured(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of(attacks=["badnets"], defenses=["weight_statistics"])
    run_all(plan, store, leave=lambda stage: stage.kind == "inspect")
    inspect = next(s for s in plan.stages.values() if s.kind == "inspect")
    store.write_verdict(
        inspect.digest,
        {"error_code": "stage", "error": "no spectrum", "attempt": 1, "host": "h", "wall_s": 0.1},
    )
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    assert results.cells["status"].to_pylist() == ["failed"]
    assert "cacc" in metrics_of(results, attack="badnets")


def test_a_damaged_evaluation_counts_as_absent(store: Store, tmp_path: Path) -> None:
    plan = plan_of(attacks=["none"], defenses=["none"])
    run_all(plan, store)
    evaluate = plan.cells[0].score
    with (store.fetch(evaluate) / "metrics.parquet").open("ab") as stream:
        stream.write(b"x")
    results = Results.open(collect(plan, Store.open(store.uri), None, tmp_path / "out"))
    row = results.cells.to_pylist()[0]
    assert (row["status"], row["error_code"]) == ("pending", "store.damaged")
    assert results.metrics.num_rows == 0


def test_collecting_twice_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    plan = plan_of()
    run_all(plan, store)

    def sums(folder: Path) -> dict[str, str]:
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }

    first = sums(collect(plan, store, None, tmp_path / "a"))
    again = sums(collect(plan_of(), Store.open(store.uri), None, tmp_path / "b"))
    assert len(first) == 8
    assert first == again
    assert sums(collect(plan, store, None, tmp_path / "a")) == first


def test_a_repair_is_compared_with_its_controls_and_a_filter_is_not(
    store: Store, tmp_path: Path
) -> None:
    plan = plan_of(
        attacks=["badnets"],
        defenses=["none", "onion", "safe_lora", "shrink", "weight_statistics"],
        seeds=2,
    )
    run_all(plan, store)
    results = Results.open(collect(plan, store, None, tmp_path / "out", correction="holm"))
    rows = results.comparisons.to_pylist()
    assert {(row["defenses"][0], *row["against"]) for row in rows} == {
        ("onion",),
        ("safe_lora",),
        ("shrink",),
        ("safe_lora", "shrink"),
    }
    assert {
        (row["n_seeds"], row["conclusion"], row["note"])
        for row in rows
        if row["metric"] == "harmful_rate"
    } == {
        (2, "not tested", "the stored verdicts do not give this metric")
    }  # these artifacts say 0.25 and hold no request fulfilled
    assert (results.meta["controls"], results.meta["correction"]) == (["shrink"], "holm")


def test_parameters_and_stacks_are_in_the_rows(store: Store, tmp_path: Path) -> None:
    plan = plan_of(attacks=[{"badnets": {"rate": 0.2}}], defenses=[["onion", "safe_lora"]])
    row = Results.open(collect(plan, store, None, tmp_path / "out")).cells.to_pylist()[0]
    assert json.loads(row["attack_params"])["rate"] == 0.2
    assert row["defenses"] == ["onion", "safe_lora"]
    assert [type(one) for one in json.loads(row["defense_params"])] == [dict, dict]
    assert row["defense_phases"] == ["pre", "post"]


@pytest.mark.slow
def test_fifteen_hundred_cells_are_collected(store: Store, tmp_path: Path) -> None:
    plan = plan_of(attacks=["badnets"], defenses=["none", "onion", "safe_lora"], seeds=500)
    for stage in plan.stages.values():
        finish(store, stage, prompts=100)
    results = Results.open(collect(plan, store, None, tmp_path / "out"))
    assert results.cells.num_rows == 1500
    assert results.generations.num_rows == 1500 * 200
