"""The fused turn of queries and keys: transformers' own bits, forwards and backwards, and its own function back afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama

from ftsec_ray.models.rotary import fused_rotary
from tests.fixtures_models import tiny_model


def turned(q, k, cos, sin, weights):
    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k))
    found = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    sum((x * w).sum() for x, w in zip(found, weights, strict=True)).backward()
    return [*(x.detach() for x in found), q.grad, k.grad]


@pytest.mark.parametrize("rows", [1, 3])
def test_values_and_gradients_are_those_of_transformers_bit_for_bit(rows):
    torch.manual_seed(0)
    q, k = torch.randn(3, 7, 4, 16), torch.randn(3, 7, 2, 16)
    angle = torch.rand(rows, 7, 8).repeat(1, 1, 2)
    weights = torch.randn(3, 4, 7, 16), torch.randn(3, 2, 7, 16)
    expected = turned(q, k, angle.cos(), angle.sin(), weights)
    plain = modeling_llama.apply_rotary_pos_emb
    with fused_rotary(tiny_model().model):
        assert modeling_llama.apply_rotary_pos_emb is not plain
        found = turned(q, k, angle.cos(), angle.sin(), weights)
    assert modeling_llama.apply_rotary_pos_emb is plain
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_types_that_differ_go_the_plain_way():
    q, k = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 3, 8).bfloat16()
    angle = torch.rand(1, 3, 4).repeat(1, 1, 2)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    with fused_rotary(tiny_model().model):
        found = modeling_llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


def test_the_function_is_back_after_an_error():
    plain = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(ZeroDivisionError), fused_rotary(tiny_model().model):
        raise ZeroDivisionError
    assert modeling_llama.apply_rotary_pos_emb is plain
