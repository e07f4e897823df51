"""Worker groups in a plan: when a model is dealt out, over how many processes, by which ZeRO stage,
and what is refused.
"""

from __future__ import annotations

from itertools import product

import pytest

from ftsec_ray.config.strategy import DeepSpeedConfig, StrategyConfig
from ftsec_ray.config.sweep import (
    AlignSpec,
    ModelSpec,
    NodeType,
    ResourceSpec,
    SweepSpec,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.context import WorkerGroup
from ftsec_ray.errors import SpecFaults
from ftsec_ray.execute.dist_worker import worker_group_of
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.cost_estimate import Tariff
from ftsec_ray.plan.decode import training_of
from ftsec_ray.plan.memory import guessed_shape, memory_gib
from ftsec_ray.registry import ATTACKS, DEFENSES
from ftsec_ray.training.zero import BUCKET, LIVE

FULL = TrainingConfig(adapter="full", max_length=128)


def hub(size, **rest):
    return ModelSpec(name=f"m-{size}", source=f"owner/m-{size}", family="m", aligned=True, **rest)


def plan_of(
    *models,
    defenses=(),
    training=FULL,
    strategy="auto",
    above=None,
    prices=(),
    resources=(),
    **deepspeed,
):
    stacks = tuple((DEFENSES.get(name)(),) for name in defenses)
    spec = SweepSpec(
        name="s",
        models=models,
        tasks=(TaskSpec(name="microworld"),),
        attacks=(ATTACKS.get("none")(),),
        defenses=((), *stacks),
        seeds=(0,),
        prices=prices,
        training=training,
        resources=ResourceSpec(**{"gpus_per_stage": "auto", "eval_batch": 8, **dict(resources)}),
        strategy=StrategyConfig(
            strategy=strategy, deepspeed_above=above, deepspeed=DeepSpeedConfig(**deepspeed)
        ),
    )
    return build_plan(spec)


def of_kind(plan, kind):
    return [stage for stage in plan.stages.values() if stage.kind == kind]


def test_the_memory_table_by_hand():
    """Every entry once more, as bytes of a model of 2e9 weights in four processes."""
    P, n, T, rows = 2e9, 4, 256, 2
    shape = guessed_shape(int(P))
    width, depth, mlp, words = shape.width, shape.depth, shape.mlp, shape.vocabulary
    assert width == pytest.approx((100 * P / 12) ** (1 / 3))
    assert (depth, mlp) == pytest.approx((width / 100, 8 / 3 * width))
    # norms: input and what their weight multiplies, in float32; in bf16: six inputs of linear layers
    # as wide as the stream, queries, keys, values, the attention's output, and four of the MLP's
    # width; logits of the slice that stands at a time
    acts = rows * T * depth * (2 * 8 * width + 2 * 10 * width + 2 * 4 * mlp) + 12 * min(
        rows * T * words, 2**26
    )
    live = min(P, LIVE + words * width) * 6
    buckets = 3 * 4 * BUCKET
    by_hand = {
        (0, False, False): 6 * P + 4 * P + 8 * P,
        (1, False, False): 6 * P + 4 * P + 12 * P / n + buckets,
        (2, False, False): 6 * P + 4 * P / n + 12 * P / n + buckets,
        (3, False, False): 4 * P / n + live + 4 * P / n + 12 * P / n + buckets,
        (1, True, False): 6 * P + 4 * P + buckets,
        (2, True, False): 6 * P + buckets,
        (3, True, False): 4 * P / n + live + buckets,
        (3, True, True): live + buckets,
    }
    for (stage, optimizer, parameters), held in by_hand.items():
        found = memory_gib(
            int(P),
            "full",
            T,
            rows,
            stage,
            n,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
        )
        assert found == pytest.approx((held + acts) / 2**30 + 1.0), (stage, optimizer, parameters)


def test_a_process_alone_is_stage_0_and_an_adapter_has_little_to_split():
    assert memory_gib(10**9, "full", 8, 1) == memory_gib(10**9, "full", 8, 1, 0, 8)
    full, lora = (
        [memory_gib(10**10, adapter, 8, 1, stage, 8) for stage in range(4)]
        for adapter in ("full", "lora")
    )
    assert full == sorted(full, reverse=True)
    assert lora[0] - lora[2] < 1.0
    assert lora[3] < lora[2] / 3


def test_auto_is_one_process_as_long_as_that_fits():
    plan = plan_of(hub("1b"), hub("5b"))
    found = {stage.where["model"]: stage for stage in of_kind(plan, "finetune")}
    assert found["m-1b"].resource == "gpu:0.5"
    assert "worker_group" not in found["m-1b"].where
    worker_group = worker_group_of(found["m-5b"])
    assert found["m-5b"].resource == f"group:{worker_group.workers}"
    assert {stage.resource for stage in of_kind(plan, "generate")} == {
        "gpu",
        "gpu:0.5",
    }, "what does not train stays in one process"


def test_a_worker_group_is_the_smallest_that_fits():
    plan = plan_of(hub("5b"))
    (stage,) = of_kind(plan, "finetune")
    worker_group = worker_group_of(stage)
    assert worker_group.workers > 1

    def gib(workers, zero, micro_batch):
        return memory_gib(5 * 10**9, "full", 128, micro_batch, zero, workers)

    assert gib(worker_group.workers, worker_group.zero_stage, worker_group.micro_batch) <= 80
    assert all(gib(worker_group.workers // 2, zero, 1) > 80 for zero in range(4))
    assert all(gib(worker_group.workers, zero, 1) > 80 for zero in range(worker_group.zero_stage))
    assert worker_group.micro_batch <= 16 // worker_group.workers, "a step has 16 rows"


def test_the_sweep_says_stage_workers_offload_and_micro_batch():
    (stage,) = of_kind(
        plan_of(
            hub("1b"),
            strategy="deepspeed",
            zero_stage=3,
            workers=4,
            offload="parameters",
            micro_batch=2,
        ),
        "finetune",
    )
    assert worker_group_of(stage) == WorkerGroup(
        workers=4, zero_stage=3, micro_batch=2, offload_optimizer=True, offload_parameters=True
    )
    assert stage.resource == "group:4"


def test_a_number_of_weights_or_a_word_decides_where_the_sweep_says_so():
    assert {
        stage.where["model"]: stage.resource
        for stage in of_kind(plan_of(hub("1b"), hub("135m"), above=5e8), "finetune")
    } == {"m-1b": "group:1", "m-135m": "gpu:0.125"}
    assert (
        of_kind(
            plan_of(hub("135m"), strategy="deepspeed", resources={"gpus_per_stage": 2.0}),
            "finetune",
        )[0].resource
        == "group:2"
    )
    assert (
        of_kind(
            plan_of(hub("135m"), strategy="deepspeed", resources={"gpus_per_stage": 0.0}),
            "finetune",
        )[0].resource
        == "group:2cpu"
    )
    assert (
        of_kind(plan_of(hub("70b"), resources={"gpus_per_stage": 1.0}), "finetune")[0].resource
        == "gpu"
    ), "a number goes before the arithmetic"


def test_single_refuses_what_does_not_fit_and_names_the_way_out():
    with pytest.raises(SpecFaults, match=r"m-5b.*needs about [0-9]+ GiB in one process") as caught:
        plan_of(hub("5b"), strategy="single")
    assert "training.strategy: auto" in str(caught.value)


def test_a_model_that_no_worker_group_holds_is_a_fault_with_the_worker_group_that_came_nearest():
    with pytest.raises(
        SpecFaults,
        match=r"training model 'm-5b' needs about [0-9]+ GiB on each of 2 GPUs at ZeRO stage 3",
    ) as caught:
        plan_of(
            hub("5b"),
            workers=2,
            resources={"gpu_memory_gib": 40.0, "eval_batch": 1, "cache_gib": 0.0},
        )
    assert "offload: optimizer" in str(caught.value)
    plan_of(hub("5b"), workers=2, offload="parameters")


def test_a_model_that_no_gpu_can_run_is_still_a_fault():
    with pytest.raises(SpecFaults, match="a stage that does not train of model 'm-70b'"):
        plan_of(hub("70b"))


def test_what_trains_is_dealt_out_and_nothing_else():
    model = hub("5b", align=AlignSpec(max_length=64, batch_size=8))
    plan = plan_of(
        model,
        defenses=["vaccine", "weight_statistics", "shrink"],
        resources={"gpu_memory_gib": 100.0},
    )
    worker_groups = {
        stage.kind for stage in plan.stages.values() if stage.resource.startswith("group")
    }
    assert worker_groups == {"finetune", "align", "prepare", "bank"}
    assert all(
        ("worker_group" in stage.where) == stage.resource.startswith("group")
        for stage in plan.stages.values()
    )
    for unit in plan.units(set()):
        assert len({stage.resource for stage in unit.stages}) == 1


def test_the_rungs_of_the_ladder_are_made_in_one_process():
    plan = plan_of(
        ModelSpec(name="l", source="ladder:1m", family="ladder", aligned=True), strategy="deepspeed"
    )
    assert {stage.kind: stage.resource.split(":")[0] for stage in plan.stages.values()} == {
        "task": "cpu",
        "source": "gpu",
        "align": "gpu",
        "finetune": "group",
        "generate": "gpu",
        "score": "cpu",
    }


def test_a_method_keeps_auto_to_the_stages_that_it_works_with():
    plan = plan_of(
        hub("5b"),
        defenses=["lisa"],
        resources={"gpu_memory_gib": 60.0, "eval_batch": 1, "cache_gib": 0.0},
    )
    found = {
        stage.method: (worker_group_of(stage).workers, worker_group_of(stage).zero_stage)
        for stage in of_kind(plan, "finetune")
    }
    assert found == {None: (2, 3), "lisa": (4, 2)}


@pytest.mark.parametrize("name", ["lisa", "vaccine"])
def test_a_method_under_a_stage_that_it_does_not_work_with_is_refused_by_name_with_the_way_out(
    name,
):
    with pytest.raises(
        SpecFaults, match=rf"defense '{name}' does not support ZeRO stage 3"
    ) as caught:
        plan_of(hub("1b"), defenses=[name], strategy="deepspeed", zero_stage=3)
    text = str(caught.value)
    assert "0, 1, 2" in text
    assert f"exclude {{model: m-1b, defense: {name}}}" in text


def test_a_method_that_keeps_a_model_from_fitting_is_named():
    with pytest.raises(SpecFaults, match="defense 'lisa' supports only ZeRO stage 0, 1, 2"):
        plan_of(
            hub("5b"),
            defenses=["lisa"],
            resources={"gpu_memory_gib": 30.0, "cache_gib": 0.0, "eval_batch": 1},
        )


def test_no_digest_knows_how_a_tune_is_dealt_out():
    plans = [plan_of(hub("1b"), defenses=["lisa", "vaccine"])]
    plans += [
        plan_of(
            hub("1b"),
            defenses=["lisa", "vaccine"],
            strategy="deepspeed",
            zero_stage=stage,
            workers=workers,
        )
        for stage, workers in product((0, 2), (2, 4))
    ]
    assert len({plan.digest for plan in plans}) == 1
    assert len({tuple(plan.stages) for plan in plans}) == 1
    assert len({stage.resource for plan in plans for stage in of_kind(plan, "finetune")}) == 3
    assert {training_of(stage) for plan in plans for stage in of_kind(plan, "finetune")} == {FULL}


def test_a_worker_group_pays_for_all_its_gpus_on_nodes_that_need_not_hold_it_whole():
    nodes = (NodeType(name="two", gpus=2, cpus=16, gpu_memory_gib=80.0, usd_per_hour=4.0),)
    plan = plan_of(
        hub("1b"), strategy="deepspeed", workers=4, prices=nodes, resources={"cpus_per_stage": 2.0}
    )
    spend = Tariff(plan.spec).of("group:4", 3600.0)
    assert (spend.gpu_hours, spend.cpu_hours, spend.usd) == (4.0, 8.0, 8.0)
    assert Tariff(plan.spec).asks("group:4") == "4 GPU of 80 GiB, 8 CPU in a worker group of 4"
