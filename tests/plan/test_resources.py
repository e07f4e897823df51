"""What stages ask for: memory by arithmetic, few shares of a GPU, one class per model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.resources import SHARES, gpus_for, gpus_of, memory_gib, resource_name
from ftsec_ray.registry import ATTACKS, DEFENSES
from ftsec_ray.spec.sweep import AlignSpec, ModelSpec, NodeType, ResourceSpec, SweepSpec, TaskSpec, TrainingConfig

LADDER = ModelSpec(name="small", source="ladder:1m", family="ladder", aligned=True)


def hub(size, **rest):
    return ModelSpec(name=f"m-{size}", source=f"owner/m-{size}", family="m", aligned=True, **rest)


def plan_of(*models, prices=(), training=None, **resources):
    spec = SweepSpec(name="s", models=models, tasks=(TaskSpec(name="microworld"),), attacks=(ATTACKS.get("badnets")(),),
                     defenses=((), (DEFENSES.get("shrink")(),)), seeds=(0,), prices=prices, training=training or TrainingConfig(),
                     resources=ResourceSpec(**{"gpus_per_stage": "auto", **resources}))
    return build_plan(spec)


def classes(plan, model=None):
    return {stage.kind: stage.resource for stage in plan.stages.values() if model is None or stage.where.get("model") == model}


def test_full_training_of_a_billion_weights_takes_18_bytes_each_and_an_adapter_6():
    bytes_each = {adapter: memory_gib(10**9, adapter, 8, 1) * 2**30 / 10**9 for adapter in ("full", "lora")}
    assert bytes_each["full"] == pytest.approx(4 + 4 + 8 + 2, abs=1.2), "and 1 GiB of CUDA"
    assert bytes_each["lora"] == pytest.approx(4 + 2, abs=1.4)


def test_memory_grows_with_rows_length_and_weights():
    small = memory_gib(10**9, "lora", 256, 4)
    assert small < memory_gib(10**9, "lora", 512, 4) == pytest.approx(memory_gib(10**9, "lora", 256, 8))
    assert small < memory_gib(2 * 10**9, "lora", 256, 4)
    assert small < memory_gib(10**9, "full", 256, 4)


@pytest.mark.parametrize(("gib", "gpus"), [(1, 0.125), (10, 0.125), (10.1, 0.25), (40, 0.5), (79, 1), (80.5, 2), (161, 3)])
def test_a_share_is_the_smallest_that_suffices_and_there_are_few(gib, gpus):
    assert gpus_for(gib, 80.0) == gpus
    assert gpus in SHARES or float(gpus).is_integer()


@pytest.mark.parametrize("gpus", [0, 0.125, 0.3, 1, 4])
def test_the_name_of_a_class_tells_its_gpus(gpus):
    assert gpus_of(resource_name(gpus)) == gpus


def test_small_models_share_a_gpu_and_large_ones_take_it_whole():
    plan = plan_of(LADDER, hub("1b"))
    assert {classes(plan, "small")[kind] for kind in ("source", "align", "tune", "revise", "evaluate")} == {"gpu:0.125"}
    assert {classes(plan, "m-1b")[kind] for kind in ("tune", "revise", "evaluate")} == {"gpu"}
    assert classes(plan)["task"] == classes(plan)["craft"] == "cpu"
    assert classes(plan, "m-1b")["source"] == "cpu", "reading weights from a disk needs no GPU"
    assert len({stage.resource for stage in plan.stages.values()}) == 3


def test_all_stages_of_a_cell_share_a_class_so_that_they_stay_one_unit():
    units = plan_of(hub("1b"), training=TrainingConfig(adapter="full")).units(set())
    chains = Counter(tuple(stage.kind for stage in unit.stages) for unit in units)
    assert chains[("revise", "evaluate")] == 1


def test_the_memory_of_a_gpu_is_the_sweeps_else_the_price_tables_smallest():
    model, small = hub("135m"), {"micro_batch": 1, "eval_batch": 4, "cache_gib": 0.0}
    nodes = (NodeType(name="big", gpus=1, cpus=4, gpu_memory_gib=80.0, usd_per_hour=1.0),
             NodeType(name="small", gpus=1, cpus=4, gpu_memory_gib=16.0, usd_per_hour=1.0))
    assert classes(plan_of(model, **small))["tune"] == "gpu:0.125"
    assert classes(plan_of(model, prices=nodes, **small))["tune"] == "gpu:0.25"
    assert classes(plan_of(model, prices=nodes, gpu_memory_gib=8.0, **small))["tune"] == "gpu:0.5"


def test_a_number_of_gpus_goes_before_the_arithmetic():
    assert classes(plan_of(hub("70b"), gpus_per_stage=1.0))["tune"] == "gpu"
    assert classes(plan_of(LADDER, gpus_per_stage=0.5))["tune"] == "gpu:0.5"
    assert set(classes(plan_of(hub("70b"), gpus_per_stage=0.0)).values()) == {"cpu"}


def test_a_model_that_fits_on_no_gpu_is_a_fault_with_its_size_and_what_helps():
    with pytest.raises(SpecFaults, match=r"model 'm-70b' needs about [0-9]+ GiB in one process and one GPU has 80") as caught:
        plan_of(hub("70b"), cache_gib=0.0)
    assert "gpus_per_stage: 1" in str(caught.value)
    assert [place for place, _ in caught.value.faults] == ["m-70b"]


def test_an_alignment_trains_all_weights_and_asks_for_more_than_an_adapter():
    plan = plan_of(hub("1b", align=AlignSpec(max_length=64, batch_size=1)), micro_batch=1, eval_batch=1, cache_gib=0.0)
    found = classes(plan)
    assert gpus_of(found["align"]) > gpus_of(found["tune"])


def test_the_module_needs_no_torch():
    code = "import sys, ftsec_ray.plan.resources, ftsec_ray.plan.bill; print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert ended.stdout.strip() == "[]"
