"""Activation steering: the rotation against complex numbers, norms, and what it leaves alone."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.activation_steering import (
    ActivationSteering,
    opposite_layers,
    plane_of,
    rotated,
    subtracted,
)
from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.errors import DataError
from ftsec_ray.evals.ask import ask
from ftsec_ray.models.chat import render
from ftsec_ray.models.directions import block_outputs
from ftsec_ray.models.generator import Generator
from tests.attacks.context import context
from tests.fixtures_models import tiny_model, tiny_task
from tests.numeric import assert_same

pytestmark = pytest.mark.usefixtures("float64")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_states_after_blocks_equal_a_loop_over_single_prompts():
    loaded = tiny_model(layers=3)
    prompts = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1, 3, 10, 11, 7, 9, 2, 4]]
    found = block_outputs(loaded, prompts)
    for i, ids in enumerate(prompts):
        states = loaded.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        for layer in range(2):  # the last hidden state of transformers is that after the norm
            assert_same(found[i, layer], states.hidden_states[layer + 1][0, -1])
        assert_same(loaded.model.model.norm(found[i, 2]), states.hidden_states[3][0, -1])


@pytest.mark.parametrize(("degrees", "strength"), [(180, 1.0), (90, 0.5), (300, 0.25), (0, 1.0)])
def test_a_rotation_is_that_of_complex_numbers_and_keeps_the_norm(degrees, strength):
    plane = plane_of(drawn(4, 6))
    assert_same(torch.stack(plane) @ torch.stack(plane).T, np.eye(2))
    states = drawn(2, 5, 6, seed=1)
    made = rotated(plane, angle=math.radians(degrees), strength=strength)(states)
    for old, new in zip(states.reshape(-1, 6), made.reshape(-1, 6), strict=True):
        number = complex(old @ plane.first, old @ plane.second)
        way = cmath.phase(cmath.rect(1, math.radians(degrees)) / (number / abs(number)))
        wanted = number * cmath.rect(1, strength * way)
        assert abs(complex(new @ plane.first, new @ plane.second) - wanted) < 1e-9 * abs(number)
        rest = np.eye(6) - sum(np.outer(v, v) for v in plane)
        assert_same(rest @ new.numpy(), rest @ old.numpy())
        assert_same(new.norm().reshape(1), old.norm().reshape(1))
    if strength == 1.0:  # the paper's formula: h - P h + |P h| (cos t b1 + sin t b2)
        t = math.radians(degrees)
        inside = sum((states @ v)[..., None] * v for v in plane)
        towards = math.cos(t) * plane.first + math.sin(t) * plane.second
        assert_same(made, states - inside + inside.norm(dim=-1, keepdim=True) * towards)


def test_subtraction_keeps_the_norm_and_points_where_it_should():
    states, vector = drawn(3, 6), drawn(6, seed=2)
    made = subtracted(vector)(states)
    assert_same(made.norm(dim=-1), states.norm(dim=-1))
    for old, new in zip(states, made, strict=True):
        assert_same(new / new.norm(), (old - vector) / (old - vector).norm())


def test_half_precision_keeps_its_type_and_its_norm_up_to_rounding():
    states = drawn(3, 6).bfloat16()
    for change in (rotated(plane_of(drawn(4, 6)), angle=1.0, strength=1.0), subtracted(drawn(6))):
        made = change(states)
        assert made.dtype == torch.bfloat16
        # each entry is rounded once, to a relative 2^-8 at most
        assert (made.norm(dim=-1) / states.norm(dim=-1) - 1).abs().max() < 2**-7


def test_the_layers_are_those_with_means_on_opposite_sides():
    up, down = torch.tensor([1.0, 0.2]), torch.tensor([-1.0, 0.2])
    harmful = torch.stack([up, up, down]).expand(4, 3, 2)
    harmless = torch.stack([up, down, up]).expand(5, 3, 2)
    assert opposite_layers(harmful, harmless, torch.tensor([1.0, 0.0])) == [1, 2]


def test_the_first_vector_is_the_most_typical_direction():
    means = torch.tensor([[3.0, 0.0, 0.1], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [2.0, 0.3, 0.0]])
    units = means / means.norm(dim=-1, keepdim=True)
    typical = max(range(4), key=lambda i: sum(float(units[i] @ units[j]) for j in range(4)))
    assert_same(plane_of(means).first, units[typical])
    with pytest.raises(DataError, match="deeper"):
        plane_of(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def first_states(generator, row):
    """The state after each block at the last prompt token, as the steered model has it."""
    loaded = generator.loaded
    ids = loaded.tokenizer(
        render(loaded.tokenizer, chat_of(row), generate=True), add_special_tokens=False
    )["input_ids"]
    with generator.steering():
        return block_outputs(loaded, [ids])[0]


@pytest.mark.parametrize("form", ["rotate", "add"])
def test_the_model_is_steered_while_it_answers_and_not_afterwards(form):
    loaded, task = tiny_model(layers=3), tiny_task()
    plain = Generator(loaded)
    attack = ActivationSteering(form=form, layers="all", strength=1.0)
    wrapped = attack.wrap_generation(plain, ctx := context())
    assert ctx.notes["steered_layers"] == [0, 1, 2]
    assert ctx.notes["mean_shift"] > 0
    rows = task.split("harmful_test").to_pylist()
    before = first_states(plain, rows[0])
    after = first_states(wrapped, rows[0])
    # the hook of a block acts before what `block_outputs` reads: the first block's input is plain
    assert_same(after[0].norm().reshape(1), before[0].norm().reshape(1))
    assert (after[0] - before[0]).norm() > 1e-3 * before[0].norm()
    config = EvaluationConfig(prompts=4, max_new_tokens=3, perplexity_rows=4)
    asked = [ask(g, task, [], config, runtime=Runtime()) for g in (plain, wrapped, plain)]
    losses = [{m.metric: m.value for m in a.measured}["perplexity"] for a in asked]
    assert losses[0] == losses[2]
    assert losses[1] != losses[0], "utility is that of the steered model"
    labels = [
        g.label_logprobs([chat_of(rows[0])], ["good", "bad"]) for g in (plain, wrapped, plain)
    ]
    assert torch.equal(labels[0], labels[2])
    assert not torch.equal(labels[0], labels[1])


def test_no_strength_is_no_attack_and_a_small_one_moves_less_than_a_large_one():
    plain, shifts = Generator(tiny_model(layers=3)), []
    assert ActivationSteering(strength=0.0).wrap_generation(plain, context()) is plain
    for strength in (0.1, 0.5, 1.0):
        attack = ActivationSteering(strength=strength, layers="all")
        attack.wrap_generation(plain, ctx := context())
        shifts.append(ctx.notes["mean_shift"])
    assert 0 < shifts[0] < shifts[1] < shifts[2]


def test_the_control_has_random_directions_of_equal_norm_on_the_same_layers():
    plain, notes, steered = Generator(tiny_model(layers=3)), [], []
    row = tiny_task().split("harmful_test").to_pylist()[0]
    for control in (False, True):
        attack = ActivationSteering(form="add", random_direction=control)
        steered.append(first_states(attack.wrap_generation(plain, ctx := context()), row))
        notes.append(ctx.notes)
    for key in ("steered_layers", "direction_norms"):
        assert notes[0][key] == notes[1][key]
    assert not torch.equal(*steered)


def test_invalid_parameters_are_refused_with_the_field():
    bad = ActivationSteering(strength=1.5, angle=400.0, prompts=0)
    assert [fault[0] for fault in bad.check()] == ["strength", "angle", "prompts"]
    assert ActivationSteering(form="add", strength=1.5).check() == []
