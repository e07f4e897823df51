"""Rounding against loops over single weights, its control, and bitsandbytes' own nf4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.quantize import Quantize, to_integers, to_nf4
from ftsec_ray.execute.stage_job import change
from ftsec_ray.models.families import RESIDUAL_WRITERS
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.quantization_boxes import NF4
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, in_float64

wide = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}


def rounded_by_hand(matrix, *, form, bits, block):
    """Every weight by itself: the nearest allowed value."""
    made = np.empty_like(matrix)
    for out, row in enumerate(matrix):
        width = block if form == "nf4" else len(row)
        for start in range(0, len(row), width):
            part = row[start : start + width]
            top = max(abs(part))
            most = 2 ** (bits - 1) - 1
            allowed = (
                [level * top for level in NF4]
                if form == "nf4"
                else [n * top / most for n in range(-most, most + 1)]
            )
            for i, value in enumerate(part):
                made[out, start + i] = min(allowed, key=lambda a: abs(a - value))
    return made


@wide
@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize(
    "params", [{"bits": 2}, {"bits": 4}, {"format": "nf4", "block": 24}, {"format": "nf4"}]
)
def test_every_weight_of_a_linear_layer_gets_the_nearest_value(kind, params, tmp_path):
    method, ctx = Quantize(**params), context(tmp_path)
    got, tuned = whole(method.revise_model(copy_model(TUNED[kind]), ctx)), whole(TUNED[kind])
    for name, weight in tuned.items():
        if name.endswith("_proj.weight"):
            assert_same(
                got[name],
                rounded_by_hand(weight, form=method.format, bits=method.bits, block=method.block),
            )
        else:
            assert np.array_equal(got[name], weight)
    moved = sum(np.square(got[n] - tuned[n]).sum() for n in tuned) ** 0.5
    assert ctx.notes["change_norm"] == pytest.approx(moved)


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs, ours = functional.dequantize_4bit(packed, state), to_nf4(weight, 64)
    assert float((ours - theirs).abs().max()) < 1e-6 * float(weight.abs().max())


@wide
def test_fewer_bits_move_the_weights_further_and_sixteen_change_nothing(tmp_path):
    norms = []
    for bits in (8, 6, 4, 2):
        Quantize(bits=bits).revise_model(copy_model(TUNED["full"]), ctx := context(tmp_path))
        norms.append(ctx.notes["change_norm"])
    assert norms == sorted(norms)
    got = Quantize(bits=16).revise_model(copy_model(TUNED["adapter"]), context(tmp_path))
    assert got.has_adapter
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(TUNED["adapter"]).items())


@wide
@pytest.mark.parametrize("params", [{"bits": 4}, {"format": "nf4"}])
def test_the_control_moves_every_matrix_as_far_at_random(params, tmp_path):
    def made(**more):
        method = Quantize(**params, **more)
        return whole(method.revise_model(copy_model(TUNED["full"]), context(tmp_path)))

    rounded, noisy, tuned = made(), made(noise=True), whole(TUNED["full"])
    for name, weight in tuned.items():
        one, other = (np.linalg.norm(m[name] - weight) for m in (rounded, noisy))
        assert other == pytest.approx(one, rel=1e-9)
        assert np.array_equal(rounded[name], noisy[name]) == ("_proj" not in name)


@wide
def test_a_row_of_zeros_stays_zero():
    weight = torch.tensor([[0.0, 0.0], [0.5, -1.0]])
    assert not to_integers(weight, 4)[0].any()
    assert not to_nf4(weight, 64)[0].any()
    assert to_integers(weight, 4)[1].tolist() == pytest.approx([4 / 7, -1.0])


@wide
def test_a_model_in_bfloat16_keeps_its_dtype(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    got, lost = change(Quantize(bits=4), "revise_model", start, context(tmp_path))
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < lost < 0.2


def test_it_is_for_models_whose_blocks_are_linear_layers_throughout():
    assert RESIDUAL_WRITERS in Quantize.STRUCTURE


@wide
def test_parameters_out_of_range_are_named():
    assert [fault[0] for fault in Quantize(bits=1, block=0).check()] == ["bits", "block"]
