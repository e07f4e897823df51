"""A sweep whose tunes are worker groups, from its file to its artifacts: as those of one process,
in this machine's processes and under Ray.
"""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import ftsec_ray
from ftsec_ray.plan.build import build_plan
from tests.test_end_to_end import artifacts, filled, sweep

pytestmark = pytest.mark.slow
STRATEGY = {"strategy": "deepspeed", "deepspeed": {"zero_stage": 2, "workers": 2}}
TRAINING = {"epochs": 1, "batch_size": 16, "rank": 2}
APART = 0.01
"""Relative; AdamW carries the order of float32 sums on by no fixed bound, so this only tells the same
tune from another one. That the sums are the same is shown in float64, in training/test_zero.py.
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("world"))


def worker_groups(world, **deepspeed):
    return sweep(
        world,
        name="worker-groups",
        attacks=["none"],
        defenses=[["lisa", "shrink"], "vaccine"],
        training={**TRAINING, **deepspeed},
    )


@pytest.fixture(scope="module")
def here(world, tmp_path_factory):
    """The store of a run in processes of this machine, and that of a run without worker groups."""
    folder = tmp_path_factory.mktemp("worker-groups")
    for name, training in (("alone", {}), ("worker-groups", STRATEGY)):
        results = ftsec_ray.run(
            worker_groups(world, **training),
            store=folder / name,
            results=folder / f"{name}-results",
            executor="local",
        )
        assert set(results.cells["status"].to_pylist()) == {"done"}
    return folder


def trained(world):
    return [
        stage
        for stage in build_plan(ftsec_ray.load(worker_groups(world, **STRATEGY))).stages.values()
        if stage.kind in ("prepare", "finetune")
    ]


def folder_of(store, stage):
    return store / "artifacts" / stage.digest[:2] / stage.digest


@pytest.mark.timeout(900)
def test_a_sweep_of_worker_groups_leaves_the_artifacts_of_one_process_under_the_same_digests(
    world, here
):
    assert {stage.resource for stage in trained(world)} == {"group:2cpu"}
    assert sorted(stage.kind for stage in trained(world)) == ["finetune", "finetune", "prepare"]
    assert artifacts(here / "worker-groups").keys() == artifacts(here / "alone").keys()
    for stage in trained(world):
        file = "model.safetensors" if stage.kind == "prepare" else "adapter_model.safetensors"
        ours, theirs = (
            load_file(folder_of(here / name, stage) / file) for name in ("worker-groups", "alone")
        )
        assert all(
            float((tensor - theirs[name]).norm()) <= APART * float(theirs[name].norm())
            for name, tensor in ours.items()
        )
        records = [
            json.loads((folder_of(here / name, stage) / "record.json").read_text())
            for name in ("worker-groups", "alone")
        ]
        assert records[0]["where"]["worker_group"]["zero_stage"] == 2
        if stage.kind == "finetune":
            assert records[0]["notes"]["losses"] == pytest.approx(
                records[1]["notes"]["losses"], rel=APART, abs=APART
            )
            assert (records[0]["tokens"], records[0]["flops"]) == (
                records[1]["tokens"],
                records[1]["flops"],
            )
        assert records[0]["params"] == records[1]["params"]
        assert records[0]["versions"]["deepspeed"]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_tune_and_ray_train_give_the_bytes_of_the_processes_of_this_machine(
    world, here, tmp_path
):
    there = ftsec_ray.run(
        worker_groups(world, **STRATEGY),
        store=tmp_path / "store",
        results=tmp_path / "results",
        executor="tune",
        workers=2,
    )
    assert set(there.cells["status"].to_pylist()) == {"done"}
    assert artifacts(tmp_path / "store") == artifacts(here / "worker-groups")
