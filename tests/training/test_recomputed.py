"""Gradient checkpointing: the same tune with less kept of each block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.defenses.vaccine import vaccinated
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import decoder_layers
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.update import whole_weights
from ftsec_ray.training.loop import recomputed, sft
from tests.attacks.context import context
from tests.fixtures_models import sentiment_rows, table
from tests.models.families import family_model
from tests.numeric import assert_same, in_float64

ROWS = table(sentiment_rows(10))
CONFIG = TrainingConfig(epochs=2, batch_size=4, rank=2, alpha=4, learning_rate=5e-3, dropout=0.3)
CASES = [
    ("llama", "lora", None),
    ("llama", "full", None),
    ("gpt2", "lora", None),
    pytest.param("gemma2", "lora", None, marks=pytest.mark.slow),
    pytest.param("opt", "full", None, marks=pytest.mark.slow),
    ("llama", "lora", "vaccine"),
    ("llama", "lora", "lisa"),
]


def shape_of(name):
    """What a method does to the tune."""
    if name == "vaccine":
        return lambda training: replace(training, backward=vaccinated(training.backward, rho=0.5))
    if name == "lisa":
        return lambda training: Lisa(rho=1.0, user_steps=2).shape_training(training, context())
    return None


def tune(family, adapter, shape, folder, *, wanted):
    """Losses and trained weights."""
    config = replace(CONFIG, adapter=adapter, dropout=0.3 if adapter == "lora" else 0.0)
    runtime = Runtime(gradient_checkpointing=wanted)
    report = sft(
        family_model(family), ROWS, config, seed=0, runtime=runtime, workdir=folder,
        shape=shape_of(shape), base_digest="b" * 32,
    )  # fmt: skip
    loaded = report.loaded
    if adapter == "full":
        return report.losses, whole_weights(loaded)
    return report.losses, {m.name: m.delta() for m in lora_modules(loaded)}


@pytest.mark.parametrize(("family", "adapter", "shape"), CASES)
def test_a_tune_that_computes_blocks_again_is_the_same_tune(family, adapter, shape, tmp_path):
    losses, weights = tune(family, adapter, shape, tmp_path / "a", wanted=False)
    again, same = tune(family, adapter, shape, tmp_path / "b", wanted=True)
    # the same kernels on the same numbers
    assert again == losses
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    assert any(bool(w.any()) for w in weights.values())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradients_in_float64_are_those_of_a_plain_backward_pass(adapter):
    gradients = []
    for wanted in (False, True):
        loaded = in_float64(family_model("gpt2"))
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if adapter == "lora":
            torch.manual_seed(0)
            loaded = in_float64(attach_lora(loaded, replace(CONFIG, dropout=0.0)))
            for module in lora_modules(loaded):
                torch.nn.init.normal_(module.B, std=0.1)
        ids = torch.tensor([[1, 3, 9, 12, 2], [1, 4, 8, 11, 2]])
        with recomputed(loaded.model.train(), wanted=wanted):
            logits = loaded.model(input_ids=ids, use_cache=False).logits
            logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum().backward()
        named = loaded.model.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.grad is not None})
    assert gradients[0]
    assert_same(gradients[1], gradients[0])


def test_blocks_run_twice_where_that_is_wanted_and_once_where_not():
    model, ids = family_model("llama").model.train(), torch.tensor([[1, 3, 9, 2]])
    calls = []
    decoder_layers(model)[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for wanted in (True, False):
        calls.clear()
        with recomputed(model, wanted=wanted):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
        counts.append(len(calls))
    assert counts == [2, 1]


def test_a_class_that_cannot_is_refused():
    model = family_model("llama").model
    model.supports_gradient_checkpointing = False
    with pytest.raises(StageError, match="gradient checkpointing"), recomputed(model, wanted=True):
        raise AssertionError
