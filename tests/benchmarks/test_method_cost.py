"""The table of costs: ratios to the twin's fine-tune, from records with chosen times."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray import api
from ftsec_ray.cli import method_costs
from ftsec_ray.cli.method_costs import MeasuredCost, Ratio, costs_of, text_of_costs
from ftsec_ray.registry import ATTACKS, DEFENSES
from ftsec_ray.store import Store
from tests.benchmarks.bench_method_cost import measured, table

SWEEP = {
    "name": "costs",
    "question": "What does each method cost?",
    "models": ["ladder:0.1m"],
    "task": "microworld",
    "attacks": ["none", {"badnets": {"rate": {"grid": [0.1, 0.2]}}}, "prefill"],
    "defenses": ["none", "shrink", "lisa", "weight_statistics"],
    "seeds": 2,
}
CPU_S = {
    "source": 500.0, "align": 300.0, "task": 7.0, "craft": 2.0, "finetune": 8.0, "revise": 1.0,
    "bank": 24.0, "inspect": 4.0, "generate": 6.0, "score": 0.5,
}  # fmt: skip
"""Seconds of a stage without a method; a stage with one takes half of it more."""


def record_of(stage):
    """A record with times from the table, those of seed 1 ten times as long: another machine."""
    cpu = CPU_S[stage.kind] * (1.5 if stage.method else 1.0) * (10.0 if stage.seed == 1 else 1.0)
    peak = {"finetune": 1000, "revise": 3000}.get(stage.kind, 500)
    flops = {"finetune": 100.0, "bank": 300.0}.get(stage.kind, 0.0)
    return {
        "digest": stage.digest, "kind": stage.kind, "method": stage.method, "seed": stage.seed,
        "cpu_s": cpu, "wall_s": 2 * cpu, "peak_bytes": peak,
        "flops": flops * (1.2 if stage.method else 1.0),
    }  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    return api.make_plan(SWEEP)


def filled(folder, plan, *, without=()):
    """A store with records of all stages, and with four answers to a request, two more if the
    stage has a method."""
    store = Store.open(folder)
    for stage in plan.stages.values():
        if stage.digest in without:
            continue
        made = store.scratch(stage.digest)
        if stage.kind == "generate":
            answers = 4 if stage.method is None else 6
            pq.write_table(pa.table({"text": ["x"] * answers}), made / "completions.parquet")
        store.publish(stage.digest, made, record_of(stage))
    return store


def test_a_ratio_counts_what_the_cell_has_and_its_twin_lacks_and_no_more(plan, tmp_path):
    rows, missing = measured(plan, filled(tmp_path, plan))
    found = {(row.method, row.setting): row for row in rows}
    assert missing == 0
    assert {row.seeds for row in rows} == {2}
    assert set(found) == {
        ("badnets", "rate 0.1"), ("badnets", "rate 0.2"), ("prefill", ""), ("shrink", ""),
        ("lisa", ""), ("weight_statistics", ""),
    }  # fmt: skip
    # rows with a method (3), then a fine-tune of them instead of the clean one: 3 / 8
    assert found["badnets", "rate 0.1"].cpu == Ratio(0.375, 0.375, 0.375)
    assert found["badnets", "rate 0.1"].answering is None
    # a fine-tune with a method: 12 instead of 8, 120 FLOP instead of 100
    assert found["lisa", ""].cpu == Ratio(0.5, 0.5, 0.5)
    assert found["lisa", ""].wall == Ratio(0.5, 0.5, 0.5)
    assert found["lisa", ""].flops == pytest.approx(Ratio(0.2, 0.2, 0.2))
    assert found["lisa", ""].peak == Ratio(1.0, 1.0, 1.0)
    # one more stage after the fine-tune: 1.5 / 8, with three times the memory
    assert found["shrink", ""].cpu == Ratio(0.1875, 0.1875, 0.1875)
    assert found["shrink", ""].peak == Ratio(3.0, 3.0, 3.0)
    # nothing before the answers; 9 seconds for 6 answers against 6 for 4
    assert found["prefill", ""].cpu == Ratio(0.0, 0.0, 0.0)
    assert found["prefill", ""].peak is None
    assert found["prefill", ""].answering == Ratio(1.0, 1.0, 1.0)
    # the clean adapters and the look at them count too
    bank = next(s for s in plan.stages.values() if s.kind == "bank")
    looked = next(s for s in plan.stages.values() if s.kind == "inspect")
    seconds = record_of(bank)["cpu_s"] / (10.0 if bank.seed == 1 else 1.0)
    seconds += record_of(looked)["cpu_s"] / (10.0 if looked.seed == 1 else 1.0)
    assert found["weight_statistics", ""].cpu.median == pytest.approx(seconds / 8.0)


def test_a_cell_without_all_records_is_counted_and_not_guessed(plan, tmp_path):
    lost = {s.digest for s in plan.stages.values() if s.method == "lisa" and s.seed == 0}
    rows, missing = measured(plan, filled(tmp_path, plan, without=lost))
    assert missing == 1
    assert [row.seeds for row in rows if row.method == "lisa"] == [1]


def test_the_table_has_one_line_for_each_setting(plan, tmp_path):
    rows, _ = measured(plan, filled(tmp_path, plan))
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {10}
    assert any(line.startswith("| badnets | rate 0.2 | ladder:0.1m | 2 | 0.38 |") for line in lines)


def test_figures_come_back_from_the_file_and_stand_on_the_page_of_their_method(
    plan, tmp_path, monkeypatch
):
    from ftsec_ray.cli.catalogue import page
    from ftsec_ray.registry import ATTACKS

    rows, _ = measured(plan, filled(tmp_path / "store", plan))
    monkeypatch.setattr(method_costs, "FILE", tmp_path / "costs.json")
    method_costs.FILE.write_text(text_of_costs(rows))
    assert [row.text for row in costs_of("attack", "prefill")] == [
        "1.00 x the CPU time per answer (ladder:0.1m, 2 seeds, costs)"
    ]
    assert costs_of("defense", "badnets") == []
    shown = page(ATTACKS, "badnets")["measured_cost"]
    assert [cost["setting"] for cost in shown] == ["rate 0.1", "rate 0.2"]
    assert json.loads(json.dumps(shown))[0]["cpu"] == [0.38, 0.38, 0.38]


def test_the_shipped_figures_are_of_methods_that_exist():
    registries = {"attack": ATTACKS, "defense": DEFENSES}
    for cost in costs_of():
        assert isinstance(cost, MeasuredCost)
        assert cost.method in registries[cost.kind].names()
        assert cost.cpu.low <= cost.cpu.median <= cost.cpu.high
