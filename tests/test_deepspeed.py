"""A sweep whose tunes are gangs, from its file to its artifacts: as those of one process, in this machine's processes and under Ray."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import ftsec_ray
from ftsec_ray.plan.build import build_plan
from tests.test_end_to_end import artifacts, filled, sweep

STRATEGY = {"strategy": "deepspeed", "deepspeed": {"zero_stage": 2, "workers": 2}}
TRAINING = {"epochs": 1, "batch_size": 16, "rank": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("world"))


def gangs(world, **deepspeed):
    return sweep(world, name="gangs", attacks=["none"], defenses=["none", ["lisa", "shrink"]], training={**TRAINING, **deepspeed})


@pytest.fixture(scope="module")
def here(world, tmp_path_factory):
    """The store of a run in processes of this machine, and that of a run without gangs."""
    folder = tmp_path_factory.mktemp("gangs")
    for name, training in (("alone", {}), ("gangs", STRATEGY)):
        results = ftsec_ray.run(gangs(world, **training), store=folder / name, results=folder / f"{name}-results", executor="local")
        assert set(results.cells["status"].to_pylist()) == {"done"}
    return folder


def tunes(world):
    return [stage for stage in build_plan(ftsec_ray.load(gangs(world, **STRATEGY))).stages.values() if stage.kind == "tune"]


def folder_of(store, stage):
    return store / "artifacts" / stage.digest[:2] / stage.digest


@pytest.mark.timeout(900)
def test_a_sweep_of_gangs_leaves_the_artifacts_of_one_process_under_the_same_digests(world, here):
    assert {stage.resource for stage in tunes(world)} == {"gang:2cpu"}
    assert len(tunes(world)) == 2
    assert artifacts(here / "gangs").keys() == artifacts(here / "alone").keys()
    for stage in tunes(world):
        ours, theirs = (load_file(folder_of(here / name, stage) / "adapter_model.safetensors") for name in ("gangs", "alone"))
        assert all(float((tensor - theirs[name]).norm()) <= 1e-4 * float(theirs[name].norm()) for name, tensor in ours.items())
        records = [json.loads((folder_of(here / name, stage) / "record.json").read_text()) for name in ("gangs", "alone")]
        assert records[0]["where"]["gang"]["zero_stage"] == 2
        assert records[0]["notes"]["losses"] == pytest.approx(records[1]["notes"]["losses"], rel=1e-4)
        assert {key: records[0][key] for key in ("tokens", "flops", "params")} == {key: records[1][key] for key in ("tokens", "flops", "params")}
        assert records[0]["versions"]["deepspeed"]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_tune_and_ray_train_give_the_bytes_of_the_processes_of_this_machine(world, here, tmp_path):
    there = ftsec_ray.run(gangs(world, **STRATEGY), store=tmp_path / "store", results=tmp_path / "results", executor="tune", workers=2)
    assert set(there.cells["status"].to_pylist()) == {"done"}
    assert artifacts(tmp_path / "store") == artifacts(here / "gangs")
