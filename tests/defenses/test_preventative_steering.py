"""Preventative steering: the direction by hand, where it is added, and that it is gone afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.preventative_steering import PreventativeSteering
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import decoder_layers
from tests.defenses.during import (
    are_equal,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_micro_batches_add_up,
    assert_plain,
    assert_resumes,
    context,
    gradient,
    mixed_task,
    moved,
    shaped,
    tuned,
    weights,
)
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

QUICK = {"strength": 2.0}


def direction_by_hand(start, block):
    """Mean state of benign prompts less that of forbidden ones, each prompt alone."""
    means = []
    for split in ("benign_train", "safety"):
        states = []
        for row in mixed_task().split(split).to_pylist():
            ids = torch.tensor([Generator(start).pieces(chat_of(row))[0]])
            with torch.no_grad():
                output = start.model.model(input_ids=ids, output_hidden_states=True)
            # before the final norm, except behind the last block
            states.append(output.hidden_states[block + 1][0, -1])
        means.append(torch.stack(states).mean(0))
    return means[0] - means[1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("strength", [1.5, -0.5])
def test_the_gradient_is_that_of_a_model_whose_block_adds_the_direction(strength):
    start = tiny_model(layers=3)
    method = PreventativeSteering(strength=strength, depth_frac=0.5)
    ctx = context(start)
    plain, training = shaped(method, start, ctx=ctx)
    assert ctx.notes["block"] == 1
    for split in ("benign_train", "safety"):
        assert ctx.notes[f"prompts_{split}"] == mixed_task().split(split).num_rows
    vector = direction_by_hand(start, 1)
    assert_same(torch.tensor(ctx.notes["vector_norm"]), vector.norm())
    got = gradient(training, moved(start).model)

    edited = moved(start).model
    block = edited.model.layers[1]
    original = block.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        if isinstance(out, tuple):
            return (out[0] + strength * vector, *out[1:])
        return out + strength * vector

    block.forward = forward
    assert_same(got, gradient(plain, edited))


@pytest.mark.usefixtures("float64")
def test_the_control_is_a_random_direction_of_equal_norm_which_the_seed_chooses():
    start = tiny_model()
    vectors = []
    for seed, direction in ((0, "compliance"), (0, "random"), (1, "random")):
        ctx = context(start, seed=seed)
        vectors.append(PreventativeSteering(direction=direction)._vector(start, 1, ctx))
    assert_same([float(v.norm()) for v in vectors[1:]], [float(vectors[0].norm())] * 2)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        cosine = float(vectors[one] @ vectors[other] / vectors[0].norm() ** 2)
        assert abs(cosine) < 0.9


def test_no_hook_is_left_after_a_step_nor_after_an_error():
    start = tiny_model()
    _, training = shaped(PreventativeSteering(**QUICK), start)
    gradient(training, start.model)
    assert not any(block._forward_hooks for block in decoder_layers(start.model))

    def fails(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gradient(replace(training, objective=fails), start.model)
    assert not any(block._forward_hooks for block in decoder_layers(start.model))


def test_the_tuned_model_is_served_without_the_shift(tmp_path):
    report = tuned(PreventativeSteering(**QUICK), tmp_path)
    assert not any(block._forward_hooks for block in decoder_layers(report.loaded.model))


@pytest.mark.parametrize(
    ("depth_frac", "block"), [(0.0, 0), (0.49, 1), (0.5, 2), (0.99, 3), (1.0, 3)]
)
def test_the_place_is_a_share_of_the_depth(depth_frac, block):
    start, ctx = tiny_model(layers=4), context()
    shaped(PreventativeSteering(depth_frac=depth_frac), start, ctx=context_of(start, ctx))
    assert ctx.notes["block"] == block


def context_of(start, ctx):
    """The context with another start model."""
    ctx.load = {"start": start}.__getitem__
    return ctx


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_a_step_does_not_depend_on_micro_batches():
    assert_micro_batches_add_up(PreventativeSteering(**QUICK))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strength_zero_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(PreventativeSteering(strength=0.0), tmp_path, dropout=dropout)


def test_recomputed_blocks_see_the_shift_as_well(tmp_path):
    from ftsec_ray.context import Runtime

    runs = [
        weights(
            tuned(
                PreventativeSteering(**QUICK),
                tmp_path / str(wanted),
                runtime=Runtime(gradient_checkpointing=wanted),
            )
        )
        for wanted in (False, True)
    ]
    assert are_equal(*runs)


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(PreventativeSteering(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(PreventativeSteering(**QUICK), tmp_path)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(PreventativeSteering(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named():
    faults = PreventativeSteering(depth_frac=1.5, prompts=0).check()
    assert [f[0] for f in faults] == ["depth_frac", "prompts"]
