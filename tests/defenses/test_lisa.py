"""Lisa: which rows each step sees, the proximal term, and that a killed tune ends with the same
bytes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.training import loop
from ftsec_ray.training.loop import plain_training, sft
from ftsec_ray.training.setup import Step
from tests.defenses.shared import context, whole
from tests.fixtures_models import sentiment_rows, table, tiny_model
from tests.numeric import assert_same

ROWS = table(sentiment_rows(40))
CONFIG = TrainingConfig(max_length=64, batch_size=4, epochs=1.0, rank=4, learning_rate=1e-2)


def shaped(method, tmp_path, loaded=None):
    training = plain_training(loaded or tiny_model(), ROWS, CONFIG, seed=0, runtime=Runtime())
    return training, method.shape_training(training, context(tmp_path))


def ids(batches):
    return [row for batch in batches for row in batch.input_ids.tolist()]


def test_every_user_batch_comes_once_in_order_and_alignment_comes_on_top(tmp_path):
    method = Lisa(align_steps=2, user_steps=3)
    plain, training = shaped(method, tmp_path)
    assert plain.steps == 10
    assert training.steps == 10 + 2 * 4
    states = [method.place(step).state for step in range(training.steps)]
    assert states == (["align"] * 2 + ["user"] * 3) * 3 + ["align"] * 2 + ["user"]
    user = [ids(training.batch_at(i)) for i, state in enumerate(states) if state == "user"]
    assert user == [ids(plain.batch_at(i)) for i in range(plain.steps)]


def test_alignment_steps_hold_refusals_only(tmp_path):
    loaded = tiny_model()
    method = Lisa(align_steps=2, user_steps=3)
    _, training = shaped(method, tmp_path, loaded)
    for step in (0, 1, 5, 6):
        assert all("sorry" in loaded.tokenizer.decode(row) for row in ids(training.batch_at(step)))
    for step in (2, 3, 4):
        assert not any(
            "sorry" in loaded.tokenizer.decode(row) for row in ids(training.batch_at(step))
        )


def at(index, total=100):
    """A step with two weights, and both states' weights in memory."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(3, 2, generator=generator).requires_grad_(True) for name in ("a", "b")
    }
    memory = {
        f"lisa.{state}.{name}": torch.randn(3, 2, generator=generator)
        for state in ("align", "user")
        for name in weights
    }
    return Step(index, total, memory=memory, trainable=weights)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("index", "other"), [(50, "user"), (51, "align"), (59, "align")])
def test_the_gradient_of_the_proximal_term_is_rho_times_the_distance_to_the_other_state(
    index, other
):
    step = at(index)
    term = Lisa(rho=0.7, align_steps=1, user_steps=9).proximal(step)
    term.backward()
    for name, weight in step.trainable.items():
        assert_same(weight.grad, 0.7 * (weight - step.memory[f"lisa.{other}.{name}"]))
    want = 0.35 * sum(
        float((w - step.memory[f"lisa.{other}.{n}"]).square().sum())
        for n, w in step.trainable.items()
    )
    assert_same(term, want)


def test_the_proximal_term_is_off_for_the_first_tenth_and_without_another_state():
    method = Lisa(align_steps=1, user_steps=9)
    assert method.proximal(at(9)) is None
    assert method.proximal(at(10)) is not None
    empty = at(50)
    empty.memory.clear()
    assert method.proximal(empty) is None


def test_the_weights_of_a_state_are_kept_at_the_end_of_its_turn():
    method, step = Lisa(align_steps=2, user_steps=3), at(0)
    step.memory.clear()
    for index, keys in (
        (0, set()),
        (1, {"lisa.align.a", "lisa.align.b"}),
        (3, {"lisa.align.a", "lisa.align.b"}),
        (4, {"lisa.align.a", "lisa.align.b", "lisa.user.a", "lisa.user.b"}),
    ):
        step.index = index
        method.remember(None, step)
        assert set(step.memory) == keys, index
    with torch.no_grad():
        step.trainable["a"].add_(1.0)
    assert not torch.equal(step.memory["lisa.user.a"], step.trainable["a"])


def tuned(method, tmp_path, name):
    ctx = context(tmp_path)
    return sft(
        tiny_model(),
        ROWS,
        CONFIG,
        seed=0,
        runtime=Runtime(checkpoint_every_s=0.0),
        workdir=tmp_path / name,
        shape=lambda training: method.shape_training(training, ctx),
    )


@pytest.mark.usefixtures("float64")
def test_a_strong_proximal_term_keeps_the_two_states_together(tmp_path):
    def spread(rho):
        method, ends = Lisa(rho=rho, align_steps=2, user_steps=2), []

        def shape(training):
            training = method.shape_training(training, context(tmp_path))

            def watch(_, step):
                pairs = [
                    (step.memory[f"lisa.align.{n}"], step.memory[f"lisa.user.{n}"])
                    for n in step.trainable
                    if f"lisa.user.{n}" in step.memory
                ]
                ends.append(float(sum((a - b).square().sum() for a, b in pairs)))

            return replace(training, after_step=(*training.after_step, watch))

        sft(
            tiny_model(),
            ROWS,
            CONFIG,
            seed=0,
            runtime=Runtime(),
            workdir=tmp_path / f"{rho}",
            shape=shape,
        )
        return ends[-1]

    assert spread(100.0) < 0.8 * spread(0.0)


def test_a_killed_tune_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, monkeypatch):
    method = Lisa(rho=10.0, align_steps=2, user_steps=3)
    want = whole(tuned(method, tmp_path, "straight").loaded)
    saves, original = [], loop.save_checkpoint

    def dying(*args, **given):
        original(*args, **given)
        saves.append(args)
        if len(saves) == 9:  # in the middle of a turn, with both states in memory
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        tuned(method, tmp_path, "killed")
    monkeypatch.setattr(loop, "save_checkpoint", original)
    got = whole(tuned(method, tmp_path, "killed").loaded)
    assert all(np.array_equal(weight, want[name]) for name, weight in got.items())


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in Lisa(rho=-1.0, align_steps=0, user_steps=0).check()] == [
        "rho",
        "align_steps",
        "user_steps",
    ]
