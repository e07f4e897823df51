"""Tunes in a worker group of two processes against the same tune in one: the curve, the weights,
the checkpoints.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ftsec_ray.context import WorkerGroup
from ftsec_ray.models.load import load_model, save_model
from ftsec_ray.training.setup import Batch
from ftsec_ray.training.zero import deepspeed_config, sharded
from tests.fixtures_models import tiny_model
from tests.numeric import UNIT_ROUNDOFF, assert_same
from tests.training.group_tunes import CUT_AT, Cut, in_worker_group, tune

pytestmark = pytest.mark.timeout(900)
STAGES = (0, 1, 2, 3)
ROUNDED = 20 * UNIT_ROUNDOFF
"""Relative; everything is float64 but the norm that DeepSpeed clips gradients by, from stage 1 on: in
each of the 20 steps one factor of all gradients is rounded to float32.
"""
BF16_SHOWS = 1e-4
"""Relative; what rounding to bf16 moves a curve by at least: one unit of bf16 is 4e-3."""
TUNES = [("lora", "", 2), ("full", "", 3), ("lora", "lisa", 2)]
"""Config, what methods do, ZeRO stage: those of the fast tests."""
SLOW_TUNES = [
    *(("lora", "", stage) for stage in (0, 1, 3)),
    *(("full", "", stage) for stage in (0, 1, 2)),
    *(("packed", "", stage) for stage in (0, 2, 3)),
    *(("frozen", "frozen", stage) for stage in (0, 2, 3)),
    *((config, "decay", stage) for config in ("lora", "full") for stage in STAGES),
    ("lora", "lisa", 0),
    ("lora", "lisa", 1),
    *(("lora", "vaccine", stage) for stage in (0, 1, 2)),
]


def slow(*values):
    """A case of the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def case(config, shape, stage, **worker_group):
    """A tune of a worker group."""
    return {
        "name": name_of(config, shape, stage),
        "config": config,
        "shape": shape,
        "worker_group": {"zero_stage": stage, **worker_group},
    }


def wanted(request):
    """Names and parameters of the tests of this file that are going to run: their tunes are made
    together, and no others.
    """
    return [
        (item.originalname, item.callspec.params if hasattr(item, "callspec") else {})
        for item in request.session.items
        if item.path == request.path
    ]


def tunes_of(request):
    """The tunes that the tests need, each once."""
    found = [
        (p["config"], p["shape"], p["stage"])
        for name, p in wanted(request)
        if name == "test_two_processes_tune_as_one_does"
    ]
    for name, p in wanted(request):
        if name.startswith("test_an_artifact"):
            found += [("lora", "", p["stage"]), ("full", "", p["stage"])]
    return list(dict.fromkeys(found))


def name_of(config, shape, stage=None):
    return "-".join(filter(None, [config, shape, None if stage is None else str(stage)]))


def weights(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def curve(folder):
    return json.loads((folder / "report.json").read_text())["losses"]


def assert_same_tune(one, other):
    assert curve(one) == pytest.approx(curve(other), rel=ROUNDED)
    assert weights(other)
    assert_same(weights(one), weights(other), rel=ROUNDED)


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory):
    """Every tune in one process, and those that are cut off."""
    folder, names = tmp_path_factory.mktemp("alone"), {name for name, _ in wanted(request)}
    shapes = {(config, shape) for config, shape, _ in tunes_of(request)}
    for config, shape in {*shapes, ("lora", ""), ("full", "")}:
        tune(folder, name_of(config, shape), config, shape=shape)
    if "test_bf16_is_what_it_is_in_one_process" in names:
        tune(folder, "lora-bf16", "lora", shape="bf16")
    for config in {p["config"] for name, p in wanted(request) if name.startswith("test_a_check")}:
        with pytest.raises(Cut, match=str(CUT_AT)):
            tune(folder, f"cut-{config}", config, shape="cut")
    return folder


@pytest.fixture(scope="module")
def together(request, tmp_path_factory, alone):
    """Every tune in a worker group, those that are cut off, and those that a process alone had
    been cut off from, continued.
    """
    folder = tmp_path_factory.mktemp("together")
    jobs = [case(*one) for one in tunes_of(request)]
    for name, params in wanted(request):
        if name.startswith("test_bf16_is"):
            jobs.append(case("lora", "bf16", params["stage"]))
        elif name.startswith("test_what_stays"):
            stage, offload = (
                (2, {}) if params["name"] == "lora" else (3, {"offload_parameters": True})
            )
            job = case(params["name"], "", stage, offload_optimizer=True, **offload)
            jobs.append({**job, "name": f"{params['name']}-offload"})
        elif name.startswith("test_a_check"):
            config, stage = params["config"], params["stage"]
            shutil.copytree(
                alone / "work" / f"cut-{config}", folder / "work" / f"to-{config}-{stage}"
            )
            job = case(config, "", stage)
            jobs.append({**job, "name": f"to-{config}-{stage}"})
            jobs.append({**job, "name": f"cut-{config}-{stage}", "shape": "cut"})
    in_worker_group(folder, jobs)
    return folder


@pytest.mark.parametrize(
    ("config", "shape", "stage"), [*TUNES, *(slow(*one) for one in SLOW_TUNES)]
)
def test_two_processes_tune_as_one_does(alone, together, config, shape, stage):
    one = alone / name_of(config, shape)
    assert len(curve(one)) >= 20
    assert_same_tune(together / name_of(config, shape, stage), one)
    told = [
        json.loads((folder / "report.json").read_text())
        for folder in (one, together / name_of(config, shape, stage))
    ]
    assert told[0]["tokens"] == told[1]["tokens"]
    assert told[0]["flops"] == told[1]["flops"]


@pytest.mark.parametrize("stage", [2, *(slow(stage) for stage in (0, 1, 3))])
def test_bf16_is_what_it_is_in_one_process(alone, together, stage):
    """Rounding to bf16 moves the curve more than dealing out does, which itself moves it by what
    rounding makes of other sums.
    """

    def apart(one, other):
        return max(abs(a - b) / b for a, b in zip(curve(one), curve(other), strict=True))

    ours = together / f"lora-bf16-{stage}"
    assert apart(ours, alone / "lora-bf16") < 0.02
    assert apart(ours, alone / "lora") > BF16_SHOWS
    assert all(tensor.dtype == torch.float32 for tensor in weights(ours).values())


@pytest.mark.parametrize("name", [slow("lora"), slow("full")])
def test_what_stays_in_host_memory_changes_nothing(alone, together, name):
    assert_same_tune(together / f"{name}-offload", alone / name)


@pytest.mark.parametrize("stage", [slow(0), 2, slow(3)])
def test_an_artifact_of_a_worker_group_has_the_files_of_any_other_and_loads(
    alone, together, tmp_path, stage
):
    for config in ("lora", "full"):
        ours, theirs = together / name_of(config, "", stage), alone / config
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        loaded = load_model(ours, base=tiny_model() if config == "lora" else None)
        loaded.base_digest = json.loads((ours / "model.json").read_text())["base"]
        again = tmp_path / config
        again.mkdir()
        save_model(loaded, again)
        held, read = weights(ours), weights(again)
        assert held.keys() == read.keys()
        # adapters are float32, other weights keep their dtype
        assert all(torch.equal(tensor.to(read[n].dtype), read[n]) for n, tensor in held.items())


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ("lora", 2),
        *(slow("lora", stage) for stage in (0, 3)),
        *(slow("full", stage) for stage in (0, 2, 3)),
    ],
)
def test_a_checkpoint_of_one_process_goes_on_in_two_and_the_other_way_round(
    alone, together, tmp_path, config, stage
):
    assert_same_tune(together / f"to-{config}-{stage}", alone / config)
    shutil.copytree(together / "work" / f"cut-{config}-{stage}", tmp_path / "work" / "back")
    saved = json.loads(max((tmp_path / "work" / "back").glob("step-*/state.json")).read_text())
    assert saved["index"] == CUT_AT
    tune(tmp_path, "back", config)
    assert_same_tune(tmp_path / "back", alone / config)
    assert curve(tmp_path / "back")[:CUT_AT] == saved["losses"]


def test_all_processes_end_with_the_same_model(together):
    for name in ("lora-0", "lora-2", "lora-3", "lora-decay-3"):
        ours, theirs = weights(together / name), weights(together / "process-1" / name)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_micro_batches_are_dealt_out_once_each_and_their_weights_add_up(count, workers):
    batches = [
        Batch(f"rows {i}", None, None, weight=(i + 1) / (count * (count + 1) / 2))
        for i in range(count)
    ]
    shares = [sharded(batches, member, workers) for member in range(workers)]
    assert len({len(share) for share in shares}) == 1
    used = sorted(batch.input_ids for share in shares for batch in share if batch.weight)
    assert used == sorted(batch.input_ids for batch in batches)
    assert sum(batch.weight for share in shares for batch in share) / workers == pytest.approx(1.0)


def test_bf16_computes_and_float32_holds_and_sums():
    worker_group = WorkerGroup(
        workers=2, zero_stage=3, micro_batch=1, offload_optimizer=True, offload_parameters=True
    )
    config = deepspeed_config(worker_group, 1.0, bf16=True)
    assert config["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert not {"bf16", "fp16"} & set(config)
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "torch_autocast" not in deepspeed_config(
        replace(worker_group, zero_stage=1), 1.0, bf16=False
    )


def test_without_deepspeed_the_fault_says_what_to_install(monkeypatch):
    from ftsec_ray.errors import EnvironmentFault
    from ftsec_ray.training import zero

    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "deepspeed" else SimpleNamespace()
    )
    with pytest.raises(EnvironmentFault, match=r"ftsec-ray\[deepspeed\]"):
        zero.check_deepspeed()
