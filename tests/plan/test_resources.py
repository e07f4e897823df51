"""What stages ask for: memory by arithmetic, few shares of a GPU, one class per model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ftsec_ray.config.sweep import (
    AlignSpec,
    DataSpec,
    ModelSpec,
    NodeType,
    ResourceSpec,
    SourceSpec,
    SweepSpec,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.context import WorkerGroup
from ftsec_ray.errors import SpecError, SpecFaults
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.resources import (
    SHARES,
    Sizing,
    cpus_of,
    data_resource,
    gpus_for,
    gpus_of,
    is_large,
    memory_gib,
    resource_name,
    weight_bytes,
)
from ftsec_ray.plan.shapes import shape_of
from ftsec_ray.plan.stage import workers_of
from ftsec_ray.registry import ATTACKS, DEFENSES

LADDER = ModelSpec(name="small", source="ladder:1m", family="ladder", aligned=True)


def hub(size, **rest):
    return ModelSpec(name=f"m-{size}", source=f"owner/m-{size}", family="m", aligned=True, **rest)


def plan_of(*models, prices=(), training=None, **resources):
    spec = SweepSpec(
        name="s",
        models=models,
        tasks=(TaskSpec(name="microworld"),),
        attacks=(ATTACKS.get("badnets")(),),
        defenses=((), (DEFENSES.get("shrink")(),)),
        seeds=(0,),
        prices=prices,
        training=training or TrainingConfig(),
        resources=ResourceSpec(**{"gpus_per_stage": "auto", **resources}),
    )
    return build_plan(spec)


def classes(plan, model=None):
    return {
        stage.kind: stage.resource
        for stage in plan.stages.values()
        if model is None or stage.where.get("model") == model
    }


def test_full_training_of_a_billion_weights_takes_18_bytes_each_and_an_adapter_6():
    bytes_each = {
        adapter: memory_gib(10**9, adapter, 8, 1) * 2**30 / 10**9 for adapter in ("full", "lora")
    }
    assert bytes_each["full"] == pytest.approx(4 + 4 + 8 + 2, abs=1.2), "and 1 GiB of CUDA"
    assert bytes_each["lora"] == pytest.approx(4 + 2, abs=1.4)


def test_memory_grows_with_rows_length_and_weights():
    small = memory_gib(10**9, "lora", 256, 4)
    assert (
        small
        < memory_gib(10**9, "lora", 512, 4)
        == pytest.approx(memory_gib(10**9, "lora", 256, 8))
    )
    assert small < memory_gib(2 * 10**9, "lora", 256, 4)
    assert small < memory_gib(10**9, "full", 256, 4)


@pytest.mark.parametrize(
    ("gib", "gpus"),
    [(1, 0.125), (10, 0.125), (10.1, 0.25), (40, 0.5), (79, 1), (80.5, 2), (161, 3)],
)
def test_a_share_is_the_smallest_that_suffices_and_there_are_few(gib, gpus):
    assert gpus_for(gib, 80.0) == gpus
    assert gpus in SHARES or float(gpus).is_integer()


@pytest.mark.parametrize("gpus", [0, 0.125, 0.3, 1, 4])
def test_the_name_of_a_class_tells_its_gpus(gpus):
    assert gpus_of(resource_name(gpus)) == gpus


def test_small_models_share_a_gpu_and_large_ones_take_it_whole():
    plan = plan_of(LADDER, hub("1b"))
    assert {
        classes(plan, "small")[kind]
        for kind in ("source", "align", "finetune", "revise", "generate")
    } == {"gpu:0.125"}
    assert {classes(plan, "m-1b")[kind] for kind in ("finetune", "revise", "generate")} == {"gpu"}
    assert classes(plan)["task"] == classes(plan)["craft"] == "cpu"
    assert classes(plan, "m-1b")["source"] == "cpu", "reading weights from a disk needs no GPU"
    assert len({stage.resource for stage in plan.stages.values()}) == 3


def test_all_stages_of_a_cell_share_a_class_so_that_they_stay_one_unit():
    units = plan_of(hub("1b"), training=TrainingConfig(adapter="full")).units(set())
    chains = Counter(tuple(stage.kind for stage in unit.stages) for unit in units)
    assert chains[("revise", "generate")] == 1


def test_the_memory_of_a_gpu_is_the_sweeps_else_the_price_tables_smallest():
    model, small = hub("135m"), {"micro_batch": 1, "eval_batch": 4, "cache_gib": 0.0}
    nodes = (
        NodeType(name="big", gpus=1, cpus=4, gpu_memory_gib=80.0, usd_per_hour=1.0),
        NodeType(name="small", gpus=1, cpus=4, gpu_memory_gib=16.0, usd_per_hour=1.0),
    )
    assert classes(plan_of(model, **small))["finetune"] == "gpu:0.125"
    assert classes(plan_of(model, prices=nodes, **small))["finetune"] == "gpu:0.25"
    assert (
        classes(plan_of(model, prices=nodes, gpu_memory_gib=8.0, **small))["finetune"] == "gpu:0.5"
    )


def test_a_number_of_gpus_goes_before_the_arithmetic():
    assert classes(plan_of(hub("70b"), gpus_per_stage=1.0))["finetune"] == "gpu"
    assert classes(plan_of(LADDER, gpus_per_stage=0.5))["finetune"] == "gpu:0.5"
    assert set(classes(plan_of(hub("70b"), gpus_per_stage=0.0)).values()) == {"cpu"}


def test_a_model_that_fits_on_no_gpu_is_a_fault_with_its_size_and_what_helps():
    with pytest.raises(
        SpecFaults, match=r"model 'm-70b' needs about [0-9]+ GiB in one process, but one GPU has 80"
    ) as caught:
        plan_of(hub("70b"), cache_gib=0.0)
    assert "gpus_per_stage: 1" in str(caught.value)
    assert [place for place, _ in caught.value.faults] == ["m-70b"]


def test_an_alignment_trains_all_weights_and_asks_for_more_than_an_adapter():
    plan = plan_of(
        hub("1b", align=AlignSpec(max_length=64, batch_size=1)),
        micro_batch=1,
        eval_batch=1,
        cache_gib=0.0,
    )
    found = classes(plan)
    assert gpus_of(found["align"]) > gpus_of(found["finetune"])


@pytest.mark.parametrize("defense", ["shrink", "lisa", "kl_anchor", "constrained_sft", "safegrad"])
def test_a_model_that_a_defense_holds_beside_the_trained_one_counts_for_what_trains(defense):
    def spec_of(name):
        spec = SweepSpec(
            name="s",
            models=(LADDER,),
            tasks=(TaskSpec(name="microworld"),),
            attacks=(ATTACKS.get("badnets")(),),
            defenses=((DEFENSES.get(name)(),),),
            seeds=(0,),
            resources=ResourceSpec(gpus_per_stage="auto"),
        )
        return Sizing(spec)

    plain, own = spec_of("shrink"), spec_of(defense)
    weights = weight_bytes(shape_of(LADDER), "float32") / 2**30
    held = 0.0 if defense in ("shrink", "lisa") else weights
    group = WorkerGroup(workers=2, zero_stage=2, micro_batch=4)
    for trains_all in (False, True):
        want = 0.0 if trains_all else held
        alone = [s.needed_gib(LADDER, trains_all=trains_all, runs=False) for s in (plain, own)]
        grouped = [s._group_gib(LADDER, group, trains_all=trains_all) for s in (plain, own)]
        assert alone[1] - alone[0] == pytest.approx(want, abs=1e-9)
        assert grouped[1] - grouped[0] == pytest.approx(want, abs=1e-9)


def test_the_module_needs_no_torch():
    code = (
        "import sys, ftsec_ray.plan.resources, ftsec_ray.plan.cost_estimate; print(sorted({'torch',"
        " 'ray', 'pyarrow'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert ended.stdout.strip() == "[]"


def crafting_plan(gpus, **data):
    return build_plan(
        SweepSpec(
            name="s",
            models=(LADDER,),
            tasks=(TaskSpec(name="microworld"),),
            attacks=(ATTACKS.get("badnets")(),),
            defenses=((DEFENSES.get("onion")(),),),
            seeds=(0,),
            data=DataSpec(**data),
            resources=ResourceSpec(gpus_per_stage=gpus, cpus_per_stage=2.0),
            prices=(NodeType(name="n", gpus=1, cpus=2, usd_per_hour=1.0),),
        )
    )


@pytest.mark.parametrize(
    ("gpus", "poisons", "filters"),
    [(0.0, "data:3", "data:3"), (0.5, "data:3", "data:3:0.5"), (1.0, "data:3", "data:3:1")],
)
def test_large_sets_are_crafted_by_workers_of_their_own_and_no_digest_says_so(
    gpus, poisons, filters
):
    small, large = crafting_plan(gpus), crafting_plan(gpus, ray_above=255, workers=3)
    assert list(small.stages) == list(large.stages)
    changed = {
        stage.method: stage.resource
        for key, stage in large.stages.items()
        if stage.resource != small.stages[key].resource
    }
    assert changed == {"badnets": poisons, "onion": filters}


def test_a_pipeline_asks_for_the_cores_and_gpus_of_all_its_workers():
    spec = crafting_plan(0.5).spec
    assert [data_resource(3, each) for each in ("cpu", "gpu", "gpu:0.25")] == [
        "data:3",
        "data:3:1",
        "data:3:0.25",
    ]
    asked = {
        one: (workers_of(one), cpus_of(one, spec), gpus_of(one))
        for one in ("cpu", "gpu", "gpu:0.5", "data:3", "data:3:1", "data:3:0.25")
    }
    assert asked == {
        "cpu": (1, 1, 0),
        "gpu": (1, 2, 1),
        "gpu:0.5": (1, 2, 0.5),
        "data:3": (3, 3, 0),
        "data:3:1": (3, 6, 3),
        "data:3:0.25": (3, 6, 0.75),
    }


def test_the_price_of_a_pipeline_is_that_of_its_workers_whatever_node_each_is_on():
    from ftsec_ray.plan.cost_estimate import Tariff

    spec = crafting_plan(0.5).spec
    Tariff(spec).check(["data:8", "data:4:1"])
    assert Tariff(spec).of("data:4:1", 3600.0).usd == pytest.approx(4.0)
    assert Tariff(spec).of("data:8", 3600.0).usd == pytest.approx(4.0)
    with pytest.raises(SpecError, match="no node type is large enough"):
        Tariff(spec).check(["data:2:2"])


def test_a_plan_takes_a_set_for_large_by_its_rows_or_its_file(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("x" * 64 * 1_000)
    known = {
        "rows": SourceSpec(path=str(file), rows=10),
        "file": SourceSpec(path=str(file)),
        "hub": SourceSpec(dataset="a/b"),
        "some": SourceSpec(dataset="a/b", rows=1_000),
    }
    tasks = {
        name: TaskSpec(name=name, kind="rows", splits=(("train", source),))
        for name, source in known.items()
    }
    tasks |= {
        "world": TaskSpec(name="world"),
        "sst2": TaskSpec(name="sst2", kind="sst2"),
        "more": TaskSpec(name="more", options=(("train_rows", 2_000),)),
    }
    found = {name: (is_large(task, 999), is_large(task, 1_000)) for name, task in tasks.items()}
    assert found == {
        "rows": (False, False),
        "file": (True, False),
        "hub": (True, True),
        "some": (True, False),
        "world": (False, False),
        "sst2": (True, False),
        "more": (True, True),
    }
