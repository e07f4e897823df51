from __future__ import annotations

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.models.lora import attach_lora, fused_lora, lora_modules
from ftsec_ray.training.encode import batcher, encode_table
from ftsec_ray.training.losses import response_nll
from tests.fixtures_models import sentiment_rows, table, tiny_model


def adapted(*, bias=False, dropout=0.0):
    """A model with an adapter whose B is not zero, and a batch."""
    torch.manual_seed(0)
    loaded = tiny_model()
    if bias:
        for module in loaded.model.modules():
            if (
                isinstance(module, torch.nn.Linear)
                and module is not loaded.model.get_output_embeddings()
            ):
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
    loaded = attach_lora(
        loaded, TrainingConfig(rank=4, alpha=12, dropout=dropout), base_digest="b" * 32
    )
    with torch.no_grad():
        for module in lora_modules(loaded):
            module.B.normal_()
    encoded = encode_table(loaded.tokenizer, table(sentiment_rows(8)), max_length=64)
    return (
        loaded,
        batcher(loaded.tokenizer, encoded, batch_size=8, batching="shuffled", seed=0)(0)[0],
    )


def gradients(model, batch):
    model.zero_grad()
    loss = response_nll(model, batch, None)
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_pass_gives_the_loss_and_the_gradients_of_peft(bias):
    loaded, batch = adapted(bias=bias)
    loss, expected = gradients(loaded.model, batch)
    with fused_lora(loaded.model):
        fused_loss, found = gradients(loaded.model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert len(expected) == 2 * len(lora_modules(loaded)) > 0
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(
            found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
        ), name
    assert gradients(loaded.model, batch)[0] == loss  # PEFT's own pass is back


def test_factors_that_do_not_train_get_no_gradient():
    loaded, batch = adapted()
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with fused_lora(loaded.model):
        _, found = gradients(loaded.model, batch)
    assert len(found) == len(lora_modules(loaded))
    assert all("lora_B" in name for name in found)


def fusing(model):
    with fused_lora(model):
        return sum("forward" in vars(module) for module in model.modules())


def test_only_plain_layers_over_frozen_weights_are_fused():
    loaded, _ = adapted()
    assert fusing(loaded.model) == len(lora_modules(loaded))
    lora_modules(loaded)[0].base_weight.requires_grad_()
    assert fusing(loaded.model) == len(lora_modules(loaded)) - 1
    assert fusing(adapted(dropout=0.1)[0].model) == 0


def test_a_switched_off_adapter_and_autocast_go_the_way_of_peft():
    loaded, batch = adapted()
    with torch.no_grad(), loaded.model.disable_adapter():
        off = loaded.model(**batch.inputs()).logits
        with fused_lora(loaded.model):
            assert torch.equal(loaded.model(**batch.inputs()).logits, off)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = loaded.model(**batch.inputs()).logits
        with fused_lora(loaded.model):
            assert torch.equal(loaded.model(**batch.inputs()).logits, half)
