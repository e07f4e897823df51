"""What of a plan is left to do, how chains fuse, and what the summary says."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray.config.sweep import ModelSpec
from ftsec_ray.plan.durations import Costs, parameters_of, prior_s
from ftsec_ray.plan.graph import fuse
from ftsec_ray.plan.show import duration, render, summarize
from tests.schedule.engine_runners import plan_of, stage_of


def diamond():
    base = stage_of("base")
    left, right = stage_of("left", base), stage_of("right", base)
    return [base, left, right, stage_of("end", left, right)]


def test_everything_is_needed_of_an_empty_store_and_nothing_of_a_full_one():
    stages = diamond()
    plan = plan_of(stages)
    assert plan.needed(set()) == stages
    assert plan.needed({stages[-1].digest}) == [], "a done stage needs no ancestors"


def test_an_ancestor_is_needed_only_by_what_is_not_done():
    base, left, right, end = diamond()
    plan = plan_of([base, left, right, end])
    assert plan.needed({left.digest}) == [base, right, end]
    assert plan.needed({left.digest, right.digest}) == [end]


def test_a_private_chain_is_one_unit():
    a = stage_of("a")
    b = stage_of("b", a)
    c = stage_of("c", b)
    (unit,) = plan_of([a, b, c]).units(set())
    assert [stage.params["name"] for stage in unit.stages] == ["a", "b", "c"]
    assert (unit.id, unit.needs) == (c.digest, ())


def test_a_shared_stage_is_a_unit_of_its_own():
    base, left, right, end = diamond()
    units = plan_of([base, left, right, end]).units(set())
    assert [len(unit.stages) for unit in units] == [1, 1, 1, 1]
    assert units[3].needs == (left.digest, right.digest)


def test_what_a_unit_waits_for_anyway_does_not_keep_a_stage_from_joining():
    task = stage_of("task")
    tune = stage_of("finetune", task)
    other = stage_of("other", task)
    evaluate = stage_of("generate", tune, task)
    units = plan_of([task, tune, other, evaluate]).units(set())
    assert [[stage.params["name"] for stage in unit.stages] for unit in units] == [
        ["task"],
        ["finetune", "generate"],
        ["other"],
    ]
    assert units[1].needs == (task.digest,)


def test_stages_of_two_resource_classes_do_not_fuse():
    a = stage_of("a")
    b = stage_of("b", a)
    other = type(b)(
        b.digest, b.kind, b.method, b.seed, b.inputs, b.params, b.where, "gpu", b.cost_s
    )
    assert [unit.resource for unit in plan_of([a, other]).units(set())] == ["cpu", "gpu"]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_units_hold_every_stage_once_and_wait_for_nothing_that_waits_for_them(size, seed):
    rng = random.Random(seed)
    stages = []
    for i in range(size):
        stages.append(stage_of(f"s{i}", *rng.sample(stages, min(len(stages), rng.randint(0, 3)))))
    units = fuse(stages)
    assert sorted(stage.digest for unit in units for stage in unit.stages) == sorted(
        stage.digest for stage in stages
    )
    done: set[str] = set()
    waiting = list(units)
    while waiting:
        ready = [unit for unit in waiting if set(unit.needs) <= done]
        assert ready, "units wait for each other"
        for unit in ready:
            for stage in unit.stages:
                assert {given for _, given in stage.inputs} <= done
                done.add(stage.digest)
        waiting = [unit for unit in waiting if unit not in ready]


def test_the_summary_counts_what_is_done_and_what_sharing_saves():
    base, left, right, end = diamond()
    lone = stage_of("lone", base, cost_s=30.0)
    plan = plan_of([base, left, right, end, lone])
    summary = summarize(plan, {base.digest})
    assert (summary.cells, summary.stages, summary.done, summary.to_run, summary.naive_runs) == (
        2,
        5,
        1,
        4,
        6,
    )
    assert summary.shared_frac == pytest.approx(1 / 6)
    assert summary.work_s == pytest.approx(33.0)
    assert summary.critical_path_s == pytest.approx(30.0)
    assert json.loads(json.dumps(summary.to_json()))["kinds"][0]["naive"] == 6
    assert "saves 17% of 6 stage runs" in render(summary)


def test_durations_are_learned_from_records_of_like_stages():
    stage, other = stage_of("a", cost_s=2.0), stage_of("b", cost_s=10.0)
    costs = Costs(
        [
            {"kind": "finetune", "method": None, "wall_s": wall, "cost_s": 2.0}
            for wall in (6.0, 8.0, 100.0)
        ]
    )
    assert costs(stage) == pytest.approx(8.0)
    assert costs(other) == pytest.approx(40.0)
    assert costs.is_learned
    assert not Costs().is_learned
    assert Costs()(other) == 10.0
    assert "from records" in render(summarize(plan_of([stage]), set(), costs=costs))


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("ladder:0.2m", 200_000),
        ("ladder:12m-base", 12_000_000),
        ("owner/SmolLM2-135M-Instruct", 135_000_000),
        ("models/llama-3.2-1.5b.gguf", 1_500_000_000),
        ("owner/gpt", 1_000_000_000),
        ("meta-llama/Llama-3.2-1B", 1_000_000_000),
        ("microsoft/Phi-3-mini-4k-instruct", 1_000_000_000),
        ("mistralai/Mixtral-8x7B-v0.1", 56_000_000_000),
    ],
)
def test_the_size_of_a_model_is_read_from_its_name(source, parameters):
    assert parameters_of(ModelSpec(name="m", source=source, family="f", aligned=True)) == parameters


def test_a_declared_size_goes_before_the_name():
    assert (
        parameters_of(ModelSpec(name="m", source="x-7b", family="f", aligned=True, parameters=5))
        == 5
    )


def test_a_larger_model_costs_more_and_a_gpu_less():
    assert (
        prior_s((1.0, 4.0), 12_000_000, "cpu")
        > prior_s((1.0, 4.0), 1_000_000, "cpu")
        > prior_s((1.0, 4.0), 1_000_000, "gpu")
    )


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_read_as_people_write_them(seconds, text):
    assert duration(seconds) == text
