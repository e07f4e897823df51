"""The formats of GGUF files: against the Python quantizers of the gguf package, and against the
bytes of weights that moved within their intervals.
"""

from __future__ import annotations

import math
import struct

import gguf
import numpy as np
import pytest
import torch

from ftsec_ray.errors import DataError, EnvironmentFault
from ftsec_ray.models import gguf_blocks
from ftsec_ray.models.gguf_blocks import (
    GGUF_FORMATS,
    gguf_box,
    gguf_changed,
    largest_blocks,
    round_layers,
    rounded,
    type_of,
)
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.lora import linear_paths
from ftsec_ray.models.residual import is_transposed
from tests.fixtures_models import tiny_model
from tests.models.families import family_model

libgguf = pytest.importorskip("libgguf")
formats = pytest.mark.parametrize("how", GGUF_FORMATS)


def random_weight(width, *, rows=6, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn((rows, width), generator=made) * 0.1


def layers_of(loaded):
    """Path, inputs and whether it is transposed, of every linear layer."""
    found = []
    for path in linear_paths(loaded.model):
        layer = loaded.model.get_submodule(path)
        turned = is_transposed(layer)
        found.append((path, layer.weight.shape[0 if turned else 1], turned))
    return found


def moved_within(weight, how, share):
    """Each weight at a share of its interval."""
    low, high = gguf_box(weight, how)
    return low + share * (high - low)


@pytest.mark.parametrize(
    ("how", "width", "wanted"),
    [
        ("q8_0", 64, "Q8_0"),
        ("q4_0", 64, "Q4_0"),
        ("q4_k", 512, "Q4_K"),
        ("q4_k", 576, "Q5_0"),
        ("q4_k", 48, None),
        ("q8_0", 48, None),
    ],
)
def test_rows_that_are_no_whole_blocks_take_the_type_that_llama_cpp_takes(how, width, wanted):
    assert type_of(width, how) == wanted


@pytest.mark.parametrize("how", ["q8_0", "q4_0"])
def test_weights_are_rounded_as_the_gguf_package_rounds_them(how):
    weight = random_weight(96)
    kind = gguf.GGMLQuantizationType[how.upper()]
    packed = gguf.quants.quantize(weight.numpy(), kind)
    assert np.array_equal(rounded(weight, how).numpy(), gguf.quants.dequantize(packed, kind))


def by_hand(block):
    """The 32 times 8 values of a superblock of Q4_K, from its bytes as llama.cpp describes them."""
    shared, floor = struct.unpack("<ee", block[:4])
    six, codes = block[4:16], block[16:]
    values = []
    for j in range(8):
        if j < 4:
            scale, minimum = six[j] & 63, six[j + 4] & 63
        else:
            scale = (six[j + 4] & 15) | (six[j - 4] >> 6 << 4)
            minimum = (six[j + 4] >> 4) | (six[j] >> 6 << 4)
        for byte in codes[j // 2 * 32 :][:32]:
            code = byte >> 4 if j % 2 else byte & 15
            values.append(
                (np.float32(shared) * scale * code - np.float32(floor) * minimum, scale, minimum)
            )
    return values


def test_a_superblock_of_q4_k_is_read_as_llama_cpp_describes_it():
    weight = random_weight(512)
    packed = libgguf.quantize_rows(weight.numpy(), gguf.GGMLQuantizationType.Q4_K)
    told = [by_hand(block.tobytes()) for block in packed.reshape(-1, 144)]
    wanted = np.array([[one[0] for one in block] for block in told]).reshape(weight.shape)
    np.testing.assert_allclose(rounded(weight, "q4_k").numpy(), wanted, atol=1e-6)
    blocks = weight.reshape(-1, 32)
    step = (blocks.amax(1, keepdim=True).clamp(min=0) - blocks.amin(1, keepdim=True)) / 15
    assert ((rounded(weight, "q4_k").reshape(-1, 32) - blocks).abs() < step).all()
    largest = [63 in block[first][1:] for block in told for first in range(0, 256, 32)]
    assert largest_blocks(packed).tolist() == largest
    assert 0 < sum(largest) < len(largest)


def code_ends(block, codes, top):
    """The interval of every weight of a block, one after the other, by the rounding of llama.cpp:
    `codes` steps for the largest weight, and no code above `top`.
    """
    largest = max(block, key=abs)  # the first one
    step = abs(largest) / codes if codes == 127 else -largest / codes
    ends = []
    for own in block:
        code = min(math.floor(own / step + 0.5), top)
        above = abs(largest / step) if code == top else code + 0.49
        low, high = sorted([(code - 0.49) * step, above * step])
        limit = 0.99 * abs(largest)
        low, high = max(low, -limit), min(high, limit)
        is_fixed = abs(own) == abs(largest)
        ends.append((own, own) if is_fixed else (min(low, own), max(high, own)))
    return ends


@pytest.mark.parametrize(
    ("how", "codes", "top"), [("q8_0", 127, 127), ("q4_0", 8, 7), ("q4_k", 16, 15)]
)
def test_intervals_with_one_scale_are_those_of_the_codes(how, codes, top):
    weight = random_weight(96)  # in q4_k: q5_0
    wanted = [
        ends for block in weight.reshape(-1, 32).tolist() for ends in code_ends(block, codes, top)
    ]
    low, high = gguf_box(weight, how)
    got = torch.stack([low.reshape(-1), high.reshape(-1)], dim=1)
    np.testing.assert_allclose(got.numpy(), np.array(wanted), atol=1e-6)


def test_an_interval_of_q4_k_goes_from_a_weight_to_its_rounded_value():
    weight = random_weight(512)
    low, high = gguf_box(weight, "q4_k")
    goal = rounded(weight, "q4_k")
    is_free = high > low
    assert torch.equal(low[is_free], weight.minimum(goal)[is_free])
    assert torch.equal(high[is_free], weight.maximum(goal)[is_free])
    assert torch.equal(low[~is_free], weight[~is_free])
    packed = libgguf.quantize_rows(weight.numpy(), gguf.GGMLQuantizationType.Q4_K)
    free_blocks = is_free.reshape(-1, 32).any(1)
    assert torch.equal(free_blocks, torch.from_numpy(~largest_blocks(packed)))


@formats
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, None])
def test_weights_within_intervals_with_one_scale_have_the_same_bytes(how, share):
    weight = random_weight(96, rows=200)
    weight[0] = torch.tensor([-0.2, 0.2] * 48)  # several largest ones, of both signs
    weight[1] = 0.0
    moved = moved_within(weight, how, torch.rand(weight.shape) if share is None else share)
    assert (moved != weight).float().mean() > 0.9
    kind = gguf.GGMLQuantizationType[type_of(96, how)]
    packed = [libgguf.quantize_rows(one.numpy(), kind) for one in (weight, moved)]
    assert np.array_equal(*packed)
    assert not gguf_changed(weight, moved, how).any()


@formats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_within_an_interval_may_be_rounded_to_the_dtype_of_the_weights(how, dtype):
    weight = random_weight(96, rows=200).to(dtype)
    low, high = gguf_box(weight, how)
    assert (high > low).float().mean() > 0.5
    for share in (0.0, 0.5, 1.0):
        moved = (low + share * (high - low)).to(dtype)
        assert not gguf_changed(weight, moved, how).any()


def test_blocks_of_q4_k_that_changed_keep_their_values_once_they_are_put_back():
    weight = random_weight(512, rows=100)
    moved = moved_within(weight, "q4_k", torch.rand(weight.shape))
    differs = gguf_changed(weight, moved, "q4_k")
    assert 0 < differs.float().mean() < 0.5  # most blocks stay
    blocks = differs.reshape(-1, 32)
    assert torch.equal(blocks.any(1), blocks.all(1)), "whole blocks"
    back = torch.where(differs, weight, moved)
    assert torch.equal(rounded(back, "q4_k"), rounded(weight, "q4_k"))
    assert gguf_changed(weight, -weight, "q4_k").all()


@formats
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_layers_of_a_model_hold_what_their_weights_are_rounded_to(how, family):
    start = family_model(family)
    model = copy_model(start).model
    left = round_layers(model, how)
    paths = layers_of(start)
    assert left == sum(type_of(inputs, how) is None for _, inputs, _ in paths) < len(paths)
    changed = 0
    for path, inputs, turned in paths:
        now, before = (m.get_submodule(path).weight for m in (model, start.model))
        if type_of(inputs, how) is None:
            assert torch.equal(now, before)
            continue
        wanted = rounded(before.T if turned else before, how)
        assert torch.equal(now.T if turned else now, wanted)
        changed += not torch.equal(now, before)
    assert changed == len(paths) - left
    others = {name: weight for name, weight in start.model.named_parameters()}
    layers = {f"{path}.weight" for path, _, _ in paths}
    for name, weight in model.named_parameters():
        assert name in layers or torch.equal(weight, others[name])


def test_a_model_without_a_layer_of_whole_blocks_is_refused(monkeypatch):
    monkeypatch.setattr(gguf_blocks, "type_of", lambda inputs, how: None)
    with pytest.raises(DataError, match="no layer of the model can be stored in q4_0") as caught:
        round_layers(tiny_model().model, "q4_0")
    assert "multiple of 32" in str(caught.value)
    with pytest.raises(DataError, match="40 inputs"):
        rounded(random_weight(40), "q4_0")


def test_without_libgguf_the_fault_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gguf_blocks, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="libgguf"):
        rounded(random_weight(64), "q8_0")
