"""Vaccine: what is perturbed, by how much, and that without a perturbation it is plain tuning bit
for bit.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.vaccine import Vaccine, attention_blocks, edited, perturbations, vaccinated
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import merged
from ftsec_ray.models.lora import attach_lora
from ftsec_ray.training.loop import backward, plain_training, sft
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import Step
from tests.defenses.shared import context, tiny_adapter, whole
from tests.fixtures_models import answers, sentiment_rows, table, tiny_model, tiny_task
from tests.numeric import assert_same

pytestmark = pytest.mark.usefixtures("float64")
CONFIG = TrainingConfig(max_length=64, batch_size=8, rank=4, epochs=1.0)
ROWS = table(sentiment_rows(16))


def batches(loaded, *, micro_batch=None):
    return plain_training(
        loaded, ROWS, CONFIG, seed=0, runtime=Runtime(micro_batch=micro_batch)
    ).batch_at(0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_reference(model, batch, rho):
    """Both passes written out with retained gradients and one extra addition per block."""
    outs = []

    def keep(_, __, out):
        out[0].retain_grad()
        outs.append(out[0])

    handles = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
    response_nll(model, batch, Step(0, 1)).backward()
    for handle in handles:
        handle.remove()
    total = torch.sqrt(sum(out.grad.square().sum() for out in outs))
    shifts = [rho * out.grad / (total + 1e-7) for out in outs]
    model.zero_grad()
    handles = [
        layer.self_attn.register_forward_hook(
            lambda _, __, out, shift=shift: (out[0] + shift, *out[1:])
        )
        for layer, shift in zip(model.model.layers, shifts, strict=True)
    ]
    response_nll(model, batch, Step(0, 1)).backward()
    for handle in handles:
        handle.remove()
    return gradients(model), shifts


def test_both_passes_equal_the_written_out_version():
    loaded = tiny_model()
    (batch,) = batches(loaded)
    model = loaded.model.train()
    want, shifts = plain_reference(model, batch, 2.0)
    model.zero_grad()
    got = perturbations(model, [batch], response_nll, Step(0, 1), rho=2.0)
    assert_same(got[0], shifts)
    vaccinated(backward, rho=2.0)(model, [batch], response_nll, Step(0, 1))
    assert want
    assert_same(gradients(model), want)


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_the_perturbation_of_a_whole_step_has_norm_rho(micro_batch, rho):
    loaded = tiny_adapter(tiny_model())
    shifts = perturbations(
        loaded.model, batches(loaded, micro_batch=micro_batch), response_nll, Step(0, 1), rho=rho
    )
    assert len(shifts) == (1 if micro_batch is None else 3)
    assert all(len(group) == len(attention_blocks(loaded.model)) == 2 for group in shifts)
    norm = float(torch.sqrt(sum(shift.square().sum() for group in shifts for shift in group)))
    # less than rho by the guard in the denominator, 1e-7 of a gradient whose norm is above 0.01
    assert rho * (1 - 1e-5) < norm < rho


def test_splitting_a_batch_changes_the_gradient_by_rounding_only():
    loaded = tiny_adapter(tiny_model())
    found = []
    for micro_batch in (None, 3):
        loaded.model.zero_grad()
        vaccinated(backward, rho=2.0)(
            loaded.model, batches(loaded, micro_batch=micro_batch), response_nll, Step(0, 1)
        )
        found.append(gradients(loaded.model))
    assert found[0].keys() == found[1].keys() != set()
    assert_same(found[1], found[0])


def test_the_first_pass_leaves_no_gradient_and_no_hook_behind():
    loaded = tiny_adapter(tiny_model())
    perturbations(loaded.model, batches(loaded), response_nll, Step(0, 1), rho=2.0)
    assert gradients(loaded.model) == {}
    assert not any(block._forward_hooks for block in attention_blocks(loaded.model))


def test_hooks_are_removed_when_the_forward_pass_fails():
    loaded = tiny_model()
    with pytest.raises(ZeroDivisionError), edited(loaded.model, lambda _, out: out):
        raise ZeroDivisionError
    assert not any(block._forward_hooks for block in attention_blocks(loaded.model))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rho_zero_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    start = tiny_model()
    config = replace(CONFIG, dropout=dropout)
    plain, vaccine = (
        sft(
            start, ROWS, config, seed=3, runtime=Runtime(), workdir=tmp_path / name, shape=shape
        ).loaded
        for name, shape in (
            ("plain", None),
            ("vaccine", lambda t: replace(t, backward=vaccinated(t.backward, rho=0.0))),
        )
    )
    other = sft(
        start,
        ROWS,
        config,
        seed=3,
        runtime=Runtime(),
        workdir=tmp_path / "other",
        shape=lambda t: replace(t, backward=vaccinated(t.backward, rho=2.0)),
    ).loaded
    assert all(
        np.array_equal(weight, whole(vaccine)[name]) for name, weight in whole(plain).items()
    )
    assert not all(
        np.array_equal(weight, whole(other)[name]) for name, weight in whole(plain).items()
    )


def test_it_gives_whole_weights_that_refuse_more(tmp_path):
    start = tiny_model()
    ctx = context(tmp_path)
    got = Vaccine(rho=1.0, epochs=4.0, learning_rate=1e-2, batch_size=4).prepare_model(
        merged(start), ctx
    )
    assert not got.has_adapter
    assert got.base_digest is None
    assert ctx.notes["rows"] == 27
    assert ctx.notes["last_loss"] < 0.7 * ctx.notes["first_loss"]
    assert not np.array_equal(
        whole(got)["model.layers.0.mlp.up_proj.weight"],
        whole(start)["model.layers.0.mlp.up_proj.weight"],
    )


def test_the_rows_are_capped_and_benign_rows_can_be_left_out(tmp_path):
    rows = Vaccine(safety_rows=5, benign_rows=0)._plain_rows(context(tmp_path))
    assert rows.num_rows == 5
    assert set(answers(rows)) == {answers(tiny_task().split("safety"))[0]}


def test_a_model_without_known_attention_is_an_error():
    loaded = attach_lora(tiny_model(), CONFIG)
    for layer in loaded.model.get_base_model().model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(StageError, match="LlamaDecoderLayer"):
        attention_blocks(loaded.model)


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in Vaccine(rho=-1.0, epochs=0.0).check()] == ["rho", "epochs"]
