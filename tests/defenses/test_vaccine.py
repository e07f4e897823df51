"""Vaccine: what is perturbed, by how much, and that without a perturbation it is plain tuning bit
for bit.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.vaccine import (
    DrawnBlocks,
    Vaccine,
    attention_blocks,
    edited,
    harmful_sizes,
    perturbations,
    vaccinated,
)
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import merged
from ftsec_ray.models.lora import attach_lora
from ftsec_ray.training.loop import backward, plain_training, sft
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import Step
from tests.defenses.hardened import SHORT, check_resume, hardened, same
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
    assert_same(got[0], dict(enumerate(shifts)))
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
    norm = float(
        torch.sqrt(sum(shift.square().sum() for group in shifts for shift in group.values()))
    )
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


@pytest.mark.parametrize("blocks", [{0}, {1}])
def test_with_chosen_blocks_the_others_are_not_shifted_and_the_norm_is_over_the_chosen(blocks):
    loaded = tiny_adapter(tiny_model())
    (batch,) = batches(loaded)
    model, (chosen,) = loaded.model, tuple(blocks)
    ((found),) = perturbations(
        model, [batch], response_nll, Step(0, 1), rho=2.0, blocks=frozenset(blocks)
    )
    assert set(found) == blocks
    (everything,) = perturbations(model, [batch], response_nll, Step(0, 1), rho=2.0)
    # in the same direction, with all of the norm
    want = 2.0 * everything[chosen] / everything[chosen].norm()
    assert float((found[chosen] - want).norm()) < 1e-5
    outputs = {}
    acting = vaccinated(backward, rho=2.0, blocks=lambda _, __: frozenset(blocks))

    def seen(model, batch, step):
        handles = [
            layer.register_forward_hook(
                lambda _, __, out, number=number: outputs.setdefault(number, []).append(out[0])
            )
            for number, layer in enumerate(attention_blocks(model))
        ]
        try:
            return response_nll(model, batch, step)
        finally:
            for handle in handles:
                handle.remove()

    acting(model, [batch], seen, Step(0, 1))
    # the hooks of `seen` come after those of the shift: the first block sees the same input twice
    first, second = outputs[0]
    assert torch.equal(first, second) == (chosen != 0)


def test_the_sizes_are_the_norms_of_the_harmful_gradients_behind_each_attention():
    loaded = tiny_model()
    (batch,) = batches(loaded)
    outs = []

    def keep(_, __, out):
        out[0].retain_grad()
        outs.append(out[0])

    handles = [layer.self_attn.register_forward_hook(keep) for layer in loaded.model.model.layers]
    response_nll(loaded.model, batch, Step(0, 1)).backward()
    for handle in handles:
        handle.remove()
    want = [float(out.grad.norm()) for out in outs]
    for micro_batch in (None, 3):
        got = harmful_sizes(loaded.model, batches(loaded, micro_batch=micro_batch), Step(0, 1))
        assert got == pytest.approx(want, rel=1e-9)


def test_blocks_are_drawn_by_their_sizes_and_stay_until_they_are_drawn_again(tmp_path):
    loaded, ctx, told = tiny_model(layers=4), context(tmp_path), {}
    training = plain_training(loaded, ROWS, CONFIG, seed=0, runtime=Runtime())
    method = Vaccine(layers=1, redraw_every=3, measure_every=10_000)
    draw, step = DrawnBlocks(method, training, loaded, ctx, told), Step(0, 3000)
    seen = []
    for step.index in range(3000):
        if step.index == 1:
            sizes = step.memory["vaccine.sizes"].clone()
        seen.append(next(iter(draw(loaded.model, step))))
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, 3000, 3))
    shares = torch.tensor([seen[::3].count(block) / 1000 for block in range(4)])
    # 1000 draws: a standard deviation of at most 0.016
    assert float((shares - sizes / sizes.sum()).abs().max()) < 0.07
    assert torch.equal(step.memory["vaccine.sizes"], sizes)
    even = Vaccine(layers=3, layer_choice="random")
    assert len(DrawnBlocks(even, training, loaded, ctx, told)(loaded.model, Step(0, 9))) == 3
    assert "harmful_train" not in even.needs()
    assert "harmful_train" in method.needs()
    assert "harmful_train" not in Vaccine().needs()


def test_with_all_blocks_chosen_it_is_the_whole_vaccine(tmp_path):
    every, few, plain = (
        hardened(Vaccine(**SHORT, **given), tmp_path / name)[0]
        for name, given in (("all", {"layers": 9}), ("one", {"layers": 1}), ("plain", {}))
    )
    assert same(every, plain)
    assert not same(few, plain)


def test_a_killed_training_with_drawn_blocks_ends_with_the_same_weights(tmp_path, monkeypatch):
    method = Vaccine(**{**SHORT, "epochs": 2.0}, layers=1, redraw_every=3, measure_every=2)
    check_resume(method, tmp_path, monkeypatch, steps=2)


def test_a_model_without_known_attention_is_an_error():
    loaded = attach_lora(tiny_model(), CONFIG)
    for layer in loaded.model.get_base_model().model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(StageError, match="LlamaDecoderLayer"):
        attention_blocks(loaded.model)


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in Vaccine(rho=-1.0, epochs=0.0).check()] == ["rho", "epochs"]
