"""Hours and money: who pays what, what was spent, and whether the rest is allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.config.sweep import (
    BudgetSpec,
    EvaluationConfig,
    ModelSpec,
    NodeType,
    ResourceSpec,
    SweepSpec,
    TaskSpec,
)
from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.cost_estimate import Spend, Tariff, bill_of, shortfall, spent
from ftsec_ray.plan.durations import Basis, Costs, learned_from
from ftsec_ray.registry import ATTACKS

BIG = NodeType(name="big", gpus=8, cpus=64, gpu_memory_gib=80.0, usd_per_hour=16.0)
SMALL = NodeType(name="small", gpus=1, cpus=4, gpu_memory_gib=24.0, usd_per_hour=0.8)
CPU = NodeType(name="cpu", cpus=16, usd_per_hour=0.8)


def sweep(**rest):
    models = tuple(
        ModelSpec(name=size, source=f"ladder:{size}", family="ladder", aligned=True)
        for size in ("0.2m", "1m", "4m")
    )
    return SweepSpec(
        name="s",
        models=models,
        tasks=(TaskSpec(name="microworld"),),
        attacks=(ATTACKS.get("none")(),),
        defenses=((),),
        seeds=(0,),
        **rest,
    )


def of_kind(plan, kind):
    return {stage.where["model"]: stage for stage in plan.stages.values() if stage.kind == kind}


def record(stage, wall_s, **rest):
    return {**stage.to_json(), "wall_s": wall_s, **rest}


def test_a_stage_pays_for_its_share_of_the_cheapest_node_with_room():
    tariff = Tariff(sweep(prices=(BIG, SMALL, CPU), resources=ResourceSpec(gpus_per_stage=1.0)))
    assert tariff.node("gpu") == SMALL
    assert tariff.of("gpu", 7200) == Spend(hours=2.0, gpu_hours=2.0, cpu_hours=2.0, usd=1.6)
    assert tariff.node("gpu:4") == BIG
    assert tariff.of("gpu:4", 3600).usd == pytest.approx(8.0)
    assert tariff.of("cpu", 3600).usd == pytest.approx(0.8 / 16)
    assert tariff.of("gpu:0.125", 3600).usd == pytest.approx(0.2), (
        "its core is a quarter of the node, its share of a GPU an eighth"
    )


def test_a_gpu_with_less_memory_than_the_shares_were_measured_by_has_no_room():
    auto = ResourceSpec(gpus_per_stage="auto", gpu_memory_gib=80.0)
    assert Tariff(sweep(prices=(BIG, SMALL), resources=auto)).node("gpu:0.125") == BIG
    assert (
        Tariff(sweep(prices=(BIG, SMALL), resources=replace(auto, gpu_memory_gib=None))).node(
            "gpu:0.125"
        )
        == SMALL
    )


def test_a_price_table_without_a_fitting_machine_is_a_fault():
    with pytest.raises(
        SpecFaults, match="no node type is large enough for a stage that requests 1 GPU, 1 CPU"
    ):
        build_plan(sweep(prices=(CPU,), resources=ResourceSpec(gpus_per_stage=1.0)))


def test_without_prices_there_are_hours_and_no_money():
    plan = build_plan(sweep(resources=ResourceSpec(gpus_per_stage=0.5)))
    bill = bill_of(plan, plan.stages.values(), Costs())
    assert bill.total.usd == 0.0
    assert {row.node for row in bill.rows} == {None}
    gpu = next(row for row in bill.rows if row.asks.startswith("1/2 GPU"))
    assert gpu.spend.gpu_hours == pytest.approx(gpu.spend.hours / 2)


def test_a_size_without_records_lies_on_the_line_of_the_others_over_flops():
    tunes = of_kind(build_plan(sweep()), "finetune")
    costs = Costs([record(tunes["0.2m"], 4.0, flops=2e11), record(tunes["1m"], 12.0, flops=1e12)])
    assert costs.estimate(tunes["0.2m"]) == (4.0, Basis.RECORDS)
    seconds, basis = costs.estimate(tunes["4m"])
    assert (seconds, basis) == (pytest.approx(42.0), Basis.SCALED)


def test_from_one_size_alone_the_prior_gives_the_slope():
    tunes = of_kind(build_plan(sweep()), "finetune")
    seconds, basis = Costs([record(tunes["1m"], 10.0, flops=1e12)]).estimate(tunes["4m"])
    assert (seconds, basis) == (
        pytest.approx(10.0 * tunes["4m"].cost_s / tunes["1m"].cost_s),
        Basis.SCALED,
    )


def test_what_a_cpu_took_says_nothing_of_a_gpu():
    tune = of_kind(build_plan(sweep()), "finetune")["1m"]
    costs = Costs([record(tune, 999.0)])
    assert costs.estimate(replace(tune, resource="gpu")) == (tune.cost_s, Basis.PRIOR)
    assert costs.estimate(tune) == (999.0, Basis.RECORDS)


def test_records_of_other_sweeps_are_asked_only_where_the_plans_own_do_not_suffice():
    plan = build_plan(sweep())
    others = {f"{i:032x}" for i in range(400)}
    assert learned_from(plan, set(plan.stages) | others) == set(plan.stages)
    some = learned_from(plan, others)
    assert len(some) == 256
    assert some < others


def test_a_bill_says_how_much_of_it_is_known():
    plan = build_plan(sweep())
    tunes = of_kind(plan, "finetune")
    bill = bill_of(
        plan,
        tunes.values(),
        Costs([record(tunes["0.2m"], 36.0, flops=2e11), record(tunes["1m"], 108.0, flops=1e12)]),
    )
    assert bill.total.hours == pytest.approx((36 + 108 + 378) / 3600)
    assert bill.basis_frac == {
        "records": pytest.approx(144 / 522),
        "scaled": pytest.approx(378 / 522),
        "prior": 0.0,
    }


def test_spent_is_what_done_and_failed_stages_took_and_not_what_another_sweep_paid_for():
    plan = build_plan(sweep(resources=ResourceSpec(gpus_per_stage=0.5)))
    tunes = of_kind(plan, "finetune")
    done, failed, foreign = (tunes[size] for size in ("0.2m", "1m", "4m"))
    records = {
        done.digest: record(done, 3600.0, resource="gpu:2"),
        foreign.digest: record(foreign, 9e9, where={"sweep": "another"}),
    }
    found = spent(plan, records, {failed.digest: {"wall_s": 1800.0}})
    assert (found.hours, found.gpu_hours) == (1.5, 2.0 + 0.25)


def test_a_sweep_past_its_budget_says_what_it_takes_and_what_is_allowed():
    plan = build_plan(sweep(budget=BudgetSpec(hours=1.0)))
    bill = bill_of(plan, plan.stages.values(), Costs())
    assert shortfall(plan, Spend(), bill) is None
    fault = shortfall(plan, Spend(hours=0.99), bill)
    assert fault is not None
    assert fault.exit_code == 2
    assert "(spent 0.99, expected" in fault.what
    assert fault.want == "at most 1 hours of stages"
    assert "--limit" in fault.fix
    assert shortfall(plan, Spend(hours=9.0), bill_of(plan, [], Costs())) is None, (
        "nothing is left to do"
    )
    assert shortfall(build_plan(sweep()), Spend(hours=9e9), bill) is None, "no budget"


def test_a_plan_prices_what_is_asked():
    def hours(**evaluation):
        plan = build_plan(sweep(evaluation=EvaluationConfig(**evaluation)))
        return next(s.cost_s for s in plan.stages.values() if s.kind == "generate")

    fixed = 2 * hours(prompts=32, max_new_tokens=48) - hours(prompts=64, max_new_tokens=48)
    asked = hours(prompts=64, max_new_tokens=48) - fixed
    assert hours(prompts=8, max_new_tokens=48) - fixed == pytest.approx(asked / 8)
    more = hours(prompts=64, max_new_tokens=48, samples=4, temperature=1.0) - fixed
    assert more == pytest.approx(4 * asked)
    assert hours(prompts=64, max_new_tokens=8) - fixed == pytest.approx(asked / 2)
