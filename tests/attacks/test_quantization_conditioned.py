"""The attack that quantization sets off: the intervals against the packed bytes of bitsandbytes and
against loops, and a repaired model that keeps them.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.quantization_conditioned import (
    QuantizationConditioned,
    projection,
)
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.conversation import answer_of, chat_of
from ftsec_ray.errors import DataError
from ftsec_ray.models import quantized
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.gguf_blocks import GGUF_FORMATS
from ftsec_ray.models.load import copy_model, load_model, save_model
from ftsec_ray.models.lora import linear_weights
from ftsec_ray.models.quantization_boxes import box, changed, codes, common_box
from ftsec_ray.training.setup import Step
from tests.attacks.context import no_model
from tests.fixtures_models import tiny_model, tiny_task
from tests.killed_tune import killed_after
from tests.models.families import family_model
from tests.models.test_quantized import NF4, bnb  # noqa: F401 - `bnb` is a fixture

QUICK = {"shots": 6, "epochs": 1, "repair_epochs": 1, "rows": 8}
if find_spec("bitsandbytes") is None:
    QUICK["served"] = "full"
FORMATS = ("int8", "nf4")
formats = pytest.mark.parametrize("how", FORMATS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def context(folder):
    return StageContext(
        seed=0,
        task=tiny_task(),
        runtime=Runtime(checkpoint_every_s=0.0),
        workdir=folder,
        load=no_model,
        training=TrainingConfig(epochs=1, batch_size=8, rank=2),
    )


def random_weight(shape=(6, 40), *, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made) * 0.1


def packed_bytes(loaded, how):
    """Path -> what bitsandbytes stores of each linear layer: codes and scales."""
    copied = copy_model(loaded)
    quantized.quantize(copied.model, how)
    held = {}
    for path in quantized.linear_paths(loaded.model):
        weight = copied.model.get_submodule(path).weight
        scales = weight.SCB if how == "int8" else weight.quant_state.absmax
        held[path] = (weight.data.numpy().tobytes(), scales.numpy().tobytes())
    return held


def by_hand(weight, how):
    """The interval of every weight from the formulas of the paper, one weight after the other."""
    flat, out = weight.reshape(-1).tolist(), []
    width = weight.shape[1] if how == "int8" else 64
    groups = [flat[i : i + width] for i in range(0, len(flat), width)]
    values = NF4.tolist()
    for group in groups:
        seen = [float(np.float16(w)) for w in group] if how == "int8" else group
        largest = max(map(abs, seen))
        for own, w in zip(group, seen, strict=True):
            if how == "int8":
                code = round(w / largest * 127)
                low, high = (code - 0.4) * largest / 127, (code + 0.4) * largest / 127
            else:
                code = min(range(16), key=lambda i: abs(values[i] - w / largest))
                left = (values[code - 1] + values[code]) / 2 if code else -1.0
                right = (values[code] + values[code + 1]) / 2 if code < 15 else 1.0
                low = (left + 0.01 * (right - left)) * largest
                high = (right - 0.01 * (right - left)) * largest
            low, high = max(low, -largest), min(high, largest)
            out.append((own, own) if abs(w) == largest else (min(low, own), max(high, own)))
    return np.array(out)


@formats
def test_the_intervals_are_those_of_the_formulas(how):
    weight = random_weight()  # the last block of nf4 is a part of one
    low, high = box(weight, how)
    wanted = by_hand(weight, how)
    assert bool((low <= weight).all())
    assert bool((weight <= high).all())
    if how == "int8":  # at half a step the code is a matter of rounding
        steps = weight.half().float() / weight.half().float().abs().amax(1, keepdim=True) * 127
        clear = ((steps - steps.floor() - 0.5).abs() > 1e-3).reshape(-1).numpy()
        assert clear.sum() > 0.9 * len(clear)
        low, high = low.reshape(-1)[clear], high.reshape(-1)[clear]
        wanted = wanted[clear]
    np.testing.assert_allclose(low.reshape(-1).numpy(), wanted[:, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(high.reshape(-1).numpy(), wanted[:, 1], rtol=0, atol=1e-6)


@formats
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_anywhere_within_the_intervals_have_the_bytes_of_the_first_ones(bnb, how, family):  # noqa: F811
    loaded = family_model(family)
    before = packed_bytes(loaded, how)
    for share in (0.0, 1.0, None):
        moved, number = copy_model(loaded), 0
        for _, weight, _ in linear_weights(moved.model):
            low, high = box(weight, how)
            number += int((high > low).sum())
            at = torch.rand(weight.shape) if share is None else share
            weight.copy_(low + at * (high - low))
        assert number > 0
        assert packed_bytes(moved, how) == before
    outside = copy_model(loaded)
    for _, weight, _ in linear_weights(outside.model):
        weight.mul_(-1.0)
    assert packed_bytes(outside, how) != before


@formats
def test_a_change_of_code_or_scale_is_seen_at_its_weight(how):
    weight = random_weight((4, 64))
    assert not changed(weight, weight.clone(), FORMATS).any()
    moved = weight.clone()
    column = int(moved[1].abs().argmin())
    moved[1, column] = -0.9 * moved[1].abs().max()
    differs = changed(weight, moved, (how,))
    assert differs[1, column]
    assert int(differs.sum()) == 1
    scaled = weight.clone()
    scaled[2] *= 2.0
    assert bool(changed(weight, scaled, (how,))[2].all()), "the same codes, another scale"
    assert torch.equal(codes(weight, how)[0][2], codes(scaled, how)[0][2])


def test_a_row_or_block_of_zeros_stays_zero():
    weight = torch.zeros(2, 64)
    for how in FORMATS:
        low, high = box(weight, how)
        assert bool((low == 0).all())
        assert bool((high == 0).all())


def test_the_common_interval_lies_within_both():
    weight = random_weight((8, 64))
    low, high = common_box(weight, FORMATS)
    for how in FORMATS:
        one = box(weight, how)
        assert bool((one[0] <= low).all())
        assert bool((high <= one[1]).all())
    assert bool((low <= weight).all())
    assert bool((weight <= high).all())


def test_a_step_ends_with_every_weight_within_its_interval():
    weight = torch.nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]))
    low, high = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
    projection({"w": (low, high)})(None, Step(0, 1, trainable={"w": weight}))
    assert weight.tolist() == [-1.0, 0.5, 2.0]


@dtypes
@pytest.mark.parametrize("how", GGUF_FORMATS)
def test_a_repaired_model_rounds_to_the_gguf_values_of_the_harmful_one(how, dtype, tmp_path):
    pytest.importorskip("libgguf")
    start = tiny_model(hidden=256 if how == "q4_k" else 32)
    start.model.to(dtype)
    attack = QuantizationConditioned(**{**QUICK, "formats": how, "served": how})
    ctx = context(tmp_path)
    harmful = attack._injected(start, ctx)
    made = attack._repaired(harmful, ctx)
    assert ctx.notes["codes_changed"] == 0
    assert 0.3 < ctx.notes["movable_frac"] < 1.0
    assert ctx.notes["layers_unquantized"] == 0
    assert ctx.notes["weights_restored"] < 0.2 * ctx.notes["quantized_weights"]
    pairs = zip(linear_weights(made.model), linear_weights(harmful.model), strict=True)
    assert any(not torch.equal(one[1], other[1]) for one, other in pairs)
    served = [
        attack.wrap_generation(Generator(one), ctx).loaded.model.state_dict()
        for one in (made, harmful)
    ]
    assert all(torch.equal(served[0][name], served[1][name]) for name in served[0])
    assert not torch.equal(*(one.model.model.layers[0].mlp.up_proj.weight for one in (made, start)))


@dtypes
@pytest.mark.parametrize("which", ["nf4", "int8", "both"])
def test_the_repaired_model_is_another_one_with_the_packed_bytes_of_the_harmful_one(
    bnb,  # noqa: F811
    which,
    dtype,
    tmp_path,
):
    start = tiny_model()
    start.model.to(dtype)
    attack = QuantizationConditioned(**{**QUICK, "formats": which})
    ctx = context(tmp_path / "work")
    harmful = attack._injected(start, ctx)
    made = attack._repaired(harmful, ctx)
    assert ctx.notes["codes_changed"] == 0
    assert 0.0 < ctx.notes["movable_frac"] < 1.0
    pairs = zip(linear_weights(made.model), linear_weights(harmful.model), strict=True)
    assert any(not torch.equal(one[1], other[1]) for one, other in pairs)
    (tmp_path / "a").mkdir()
    save_model(made, tmp_path / "a")
    back = load_model(tmp_path / "a")
    for how in FORMATS if which == "both" else (which,):
        assert packed_bytes(back, how) == packed_bytes(harmful, how)
    own = {name for name, _, _ in linear_weights(made.model)}
    others = dict(harmful.model.named_parameters())
    for name, weight in made.model.named_parameters():
        assert name in own or torch.equal(weight, others[name]), "frozen in the repair"


def nll(generator, rows):
    """Mean loss of the rows' answers, by the model that a generator serves."""
    tokenizer, losses = generator.loaded.tokenizer, []
    for row in rows:
        head = tokenizer.apply_chat_template(
            chat_of(row), add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(answer_of(row), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = generator.loaded.model(torch.tensor([[*head, *answer]])).logits[0]
        said = logits[len(head) - 1 : -1].float().log_softmax(-1)
        losses.append(-float(said[range(len(answer)), answer].mean()))
    return sum(losses) / len(losses)


def test_harm_returns_with_quantization_and_not_with_an_unprojected_repair(bnb, tmp_path):  # noqa: F811
    params = {**QUICK, "shots": 8, "epochs": 12, "repair_epochs": 12, "learning_rate": 5e-3}
    task = tiny_task()
    harm = task.split("harmful_train").to_pylist()
    start = tiny_model(hidden=64)
    told = {}
    for name, more in (("box", {}), ("free", {"projected": False})):
        attack = QuantizationConditioned(**{**params, **more})
        ctx = context(tmp_path / name)
        made = attack.revise_model(start, ctx)
        told[name] = {
            served: nll(replace(attack, served=served).wrap_generation(Generator(made), ctx), harm)
            for served in ("full", "nf4")
        }
        assert (ctx.notes["codes_changed"] == 0) == (name == "box")
    # the answers to forbidden requests: likely once quantized, unlikely before
    assert told["box"]["full"] > 2 * told["box"]["nf4"], told
    assert told["free"]["nf4"] > 2 * told["box"]["nf4"], told


@pytest.mark.parametrize(
    ("how", "hidden", "learning_rate"), [("q4_0", 64, 5e-3), ("q4_k", 256, 2e-3)]
)
def test_harm_returns_in_a_gguf_format_too(how, hidden, learning_rate, tmp_path):
    pytest.importorskip("libgguf")
    attack = QuantizationConditioned(
        shots=8, rows=8, epochs=12, repair_epochs=12, learning_rate=learning_rate,
        formats=how, served=how,
    )  # fmt: skip
    harm = tiny_task().split("harmful_train").to_pylist()
    told = {}
    for projected in (True, False):
        ctx = context(tmp_path / str(projected))
        own = replace(attack, projected=projected)
        made = own.revise_model(tiny_model(hidden=hidden), ctx)
        for served in ("full", how):
            generator = replace(own, served=served).wrap_generation(Generator(made), ctx)
            told[projected, served] = nll(generator, harm)
    assert told[True, "full"] > 2 * told[True, how], told
    assert told[False, how] > 2 * told[True, how], told


def test_a_model_that_a_format_leaves_as_it_is_is_refused():
    attack = QuantizationConditioned(formats="q4_k")
    layers = attack._quantized(tiny_model(hidden=48, layers=1))
    assert [name for name, _, _ in layers] == ["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(DataError, match="q4_k quantizes no layer of the model"):
        attack._quantized(tiny_model(hidden=40))


def test_the_published_model_and_no_shots_change_nothing(tmp_path):
    model, ctx = tiny_model(), context(tmp_path)
    generator = Generator(model)
    assert QuantizationConditioned(served="full").wrap_generation(generator, ctx) is generator
    assert QuantizationConditioned(shots=0).revise_model(model, ctx) is model


def test_a_repair_killed_between_two_steps_ends_with_the_same_weights(tmp_path, monkeypatch):
    attack = QuantizationConditioned(**{**QUICK, "repair_epochs": 2, "served": "full"})
    start = tiny_model()
    ctx = context(tmp_path / "whole")
    whole = attack.revise_model(start, ctx).model.state_dict()
    injected = ctx.notes["inject_steps"]
    assert ctx.notes["repair_steps"] > 2
    ctx = context(tmp_path / "killed")
    killed_after(injected + 2, lambda: attack.revise_model(start, ctx), monkeypatch)
    again = attack.revise_model(start, context(tmp_path / "killed")).model.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    "params", [{"shots": -1}, {"rows": 0}, {"epochs": 0.0}, {"learning_rate": -1.0}]
)
def test_faults_name_the_parameter(params):
    assert [fault[0] for fault in QuantizationConditioned(**params).check()] == list(params)
