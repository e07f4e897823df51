from __future__ import annotations

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.errors import DataError
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.training.encode import batcher, encode_table
from ftsec_ray.training.losses import masked_nll, response_nll
from tests.fixtures_models import sentiment_rows, table, tiny_model
from tests.numeric import assert_same

RANK, ALPHA = 4, 12


def plain(*, bias):
    """A model without an adapter; with `bias`, every linear layer but the head has one."""
    loaded = tiny_model()
    if bias:
        generator = torch.Generator().manual_seed(1)
        for module in loaded.model.modules():
            if (
                isinstance(module, torch.nn.Linear)
                and module is not loaded.model.get_output_embeddings()
            ):
                module.bias = torch.nn.Parameter(
                    torch.randn(module.out_features, generator=generator)
                )
    return loaded


def adapted(*, bias=False):
    """The same model with an adapter whose B is not zero."""
    torch.manual_seed(0)
    config = TrainingConfig(rank=RANK, alpha=ALPHA)
    loaded = attach_lora(plain(bias=bias), config, base_digest="b" * 32)
    with torch.no_grad():
        for module in lora_modules(loaded):
            module.B.normal_(std=0.5)
    return loaded


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_has_the_loss_and_by_the_chain_rule_the_gradients_of_the_folded_weights(bias):
    loaded, reference = adapted(bias=bias), plain(bias=bias)
    encoded = encode_table(loaded.tokenizer, table(sentiment_rows(8)), max_length=64)
    (batch,) = batcher(loaded.tokenizer, encoded, batch_size=8, batching="shuffled", seed=0)(0)
    scale, folded = ALPHA / RANK, dict(reference.model.named_modules())
    with torch.no_grad():
        for module in lora_modules(loaded):
            folded[module.name].weight.add_(scale * module.B @ module.A)

    loss = response_nll(loaded.model, batch, None)
    loss.backward()
    expected = masked_nll(reference.model(**batch.inputs()).logits, batch.labels)
    expected.backward()

    assert_same(loss, expected)
    assert len(lora_modules(loaded)) == 14
    for module in lora_modules(loaded):
        whole = folded[module.name].weight.grad
        assert_same(module.A.grad, scale * module.B.T @ whole)
        assert_same(module.B.grad, scale * whole @ module.A.T)
    trained = [name for name, p in loaded.model.named_parameters() if p.grad is not None]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 14


def test_a_model_without_an_adapter_has_no_lora_modules():
    with pytest.raises(DataError, match="no LoRA adapter"):
        lora_modules(tiny_model())
