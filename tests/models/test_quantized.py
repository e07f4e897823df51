"""An adapter on a base that is packed in 8 or 4 bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.strategy import StrategyConfig
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.weight_statistics import features
from ftsec_ray.errors import EnvironmentFault, SpecFaults, StageError
from ftsec_ray.models import quantized
from ftsec_ray.models.activations import last_logits
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import copy_model, load_model, merged, save_model
from ftsec_ray.models.lora import lora_modules
from ftsec_ray.models.precision import as_asked, asked_notes, widened
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.stage import is_group
from ftsec_ray.training.loop import sft
from tests.fixtures_models import sentiment_rows, table
from tests.models.families import family_model
from tests.plan.test_build_plan import only, sweep

ROWS = table(sentiment_rows(8))
CHATS = [chat_of(row) for row in sentiment_rows(4)]
PROMPTS = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1, 3, 10, 11, 7, 9, 2, 4]]
CONFIG = TrainingConfig(epochs=3, batch_size=4, rank=2, alpha=4, learning_rate=5e-3)
BASE = "b" * 32
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
"""The sixteen values of QLoRA, arXiv:2305.14314, appendix E."""
packings = pytest.mark.parametrize("how", ["int8", "nf4"])
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def nearest_nf4(weight):
    """Each weight as its block of 64 keeps it: the nearest value times the block's largest."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    apart = ((blocks / largest)[..., None] - NF4).abs()
    return (NF4[apart.argmin(-1)] * largest).reshape(weight.shape)


def nearest_int8(weight):
    """Each weight as its row keeps it: 255 steps up to the row's largest."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / step).round() * step


@packings
@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_says_what_its_rounded_weights_say(bnb, how, family, dtype):
    loaded = family_model(family)
    loaded.model.to(dtype)
    reference = widened(loaded)
    nearest = nearest_nf4 if how == "nf4" else nearest_int8
    with torch.no_grad():
        for path in quantized.linear_paths(reference.model):
            weight = reference.model.get_submodule(path).weight
            turned = weight.T if family == "gpt2" else weight
            kept = nearest(turned)
            weight.copy_(kept.T if family == "gpt2" else kept)
    packed = copy_model(loaded)
    quantized.quantize(packed.model, how)
    plain, wanted, got = (
        last_logits(m.model, PROMPTS, pad=0) for m in (widened(loaded), reference, packed)
    )
    apart, moved = float((got - wanted).norm()), float((plain - wanted).norm())
    # int8 also rounds the inputs of each layer to 8 bits; bf16 rounds everything
    assert apart < (0.25 if how == "nf4" and dtype == torch.float32 else 2.0) * moved
    if how == "nf4" and dtype == torch.float32:
        assert apart < 1e-4 * float(wanted.norm())


@packings
def test_packed_weights_take_a_byte_or_half_of_one(bnb, how):
    packed = family_model("llama")
    quantized.quantize(packed.model, how)
    paths = quantized.linear_paths(packed.model)
    plain = family_model("llama").model
    count = sum(plain.get_submodule(path).weight.numel() for path in paths)
    held = sum(packed.model.get_submodule(path).weight.nbytes for path in paths)
    assert held == count // (1 if how == "int8" else 2)
    assert packed.model.get_output_embeddings().weight.dtype == torch.float32


@packings
@families
def test_an_adapter_is_trained_on_a_packed_base_and_asked_beside_it(bnb, how, family, tmp_path):
    start = family_model(family)
    before = {name: tensor.clone() for name, tensor in start.model.state_dict().items()}
    config = replace(CONFIG, quantization=how)
    always = Runtime(checkpoint_every_s=0.0)
    report = sft(
        start, ROWS, config, seed=0, runtime=always, workdir=tmp_path / "w", base_digest=BASE
    )
    assert all(map(math.isfinite, report.losses))
    assert report.losses[-1] < report.losses[0]
    plain = sft(start, ROWS, CONFIG, seed=0, runtime=always, workdir=tmp_path / "p")
    assert report.losses != plain.losses
    assert report.flops == plain.flops
    assert all(torch.equal(t, before[n]) for n, t in start.model.state_dict().items())
    tuned = report.loaded
    assert {t.dtype for m in lora_modules(tuned) for t in (m.A, m.B)} == {torch.float32}
    (tmp_path / "a").mkdir()
    save_model(tuned, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "model.json").read_text())["quantization"] == how
    back = load_model(tmp_path / "a", base=start)
    said = [last_logits(as_asked(m).model, PROMPTS, pad=0) for m in (tuned, back)]
    assert torch.equal(*said)
    notes = asked_notes(as_asked(back))
    assert notes == {"dtype": "float32", "adapter": "beside the base", "quantization": how}
    answers = Generator(as_asked(back)).complete(CHATS, max_new_tokens=3)
    assert len(answers) == len(CHATS)
    assert features(back, start).keys() == {m.name for m in lora_modules(tuned)}
    with pytest.raises(StageError, match="quantized base"):
        merged(back)
    resumed = sft(
        start, ROWS, config, seed=0, runtime=always, workdir=tmp_path / "w", base_digest=BASE
    )
    assert resumed.losses == report.losses


@packings
def test_blocks_of_a_packed_base_can_be_computed_again(bnb, how, tmp_path):
    config = replace(CONFIG, quantization=how)
    losses = [
        sft(
            family_model("llama"), ROWS, config, seed=0, workdir=tmp_path / str(wanted),
            runtime=Runtime(gradient_checkpointing=wanted), base_digest=BASE,
        ).losses
        for wanted in (False, True)
    ]  # fmt: skip
    assert losses[0] == losses[1]


def test_without_bitsandbytes_the_fault_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"ftsec-ray\[quantization\]"):
        quantized.check_bitsandbytes()


def test_a_method_that_changes_tuned_weights_is_refused_on_a_packed_base():
    packed = TrainingConfig(quantization="nf4")
    with pytest.raises(SpecFaults, match="'refusal_ablation' changes the weights") as fault:
        build_plan(sweep(attacks=("none", "refusal_ablation"), training=packed))
    assert "exclude {attack: refusal_ablation}" in str(fault.value)
    plan = build_plan(sweep(attacks=("none",), training=packed))
    plain = build_plan(sweep(attacks=("none",)))
    for kind in ("finetune", "generate"):
        assert only(plan, kind).digest != only(plain, kind).digest
    assert only(plan, "source").digest == only(plain, "source").digest


def test_packed_weights_are_not_split_over_processes():
    packed = TrainingConfig(quantization="int8")
    split = StrategyConfig(strategy="deepspeed")
    with pytest.raises(SpecFaults, match="cannot shard"):
        build_plan(replace(sweep(attacks=("none",), training=packed), strategy=split))
    above = StrategyConfig(deepspeed_above=1.0)
    plan = build_plan(replace(sweep(attacks=("none",), training=packed), strategy=above))
    assert not is_group(only(plan, "finetune").resource)
