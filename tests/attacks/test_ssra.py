"""SSRA: the loss by hand, its gradient against finite differences, its zero, and the fine-tune."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.ssra import SSRA, pulling
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.models.generator import Generator
from ftsec_ray.training.loop import plain_training, sft
from ftsec_ray.training.prompt_states import last_states
from ftsec_ray.training.setup import Step
from ftsec_ray.training.terms import TermBatch, term_batch
from tests.attacks.context import context as plain_context
from tests.defenses.shared import whole
from tests.fixtures_models import sentiment_rows, table, tiny_model, tiny_task
from tests.killed_tune import killed_after
from tests.numeric import assert_same, in_float64

QUICK = {"pulled": 6, "targets": 9, "batch": 4, "keep_user_rows": True}
SMALL = {"pulled": 6, "targets": 9, "batch": 4}
USERS = table(sentiment_rows(20))
CONFIG = TrainingConfig(max_length=64, batch_size=4, epochs=2.0, rank=4, learning_rate=1e-2)


def context(model=None):
    ctx = plain_context()
    ctx.load = {"start": model or tiny_model()}.__getitem__
    return ctx


def shaped(method, loaded=None):
    loaded = loaded or tiny_model()
    plain = plain_training(loaded, USERS, CONFIG, seed=0, runtime=Runtime())
    return plain, method.shape_training(plain, context(loaded))


def test_the_loss_is_the_mean_distance_to_every_anchor_and_of_each_benign_state_to_its_own():
    generator = torch.Generator().manual_seed(0)
    pulled, benign, anchors = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 4, 4)
    )
    away = sum(
        abs(float(pulled[i, d] - anchors[j, d]))
        for i in range(3)
        for j in range(4)
        for d in range(5)
    ) / (3 * 4 * 5)
    moved = sum(abs(float(benign[j, d] - anchors[j, d])) for j in range(4) for d in range(5)) / 20
    assert_same(pulling(pulled, benign, anchors, keep=7.0), away + 7.0 * moved)
    one = anchors[:1]
    assert float(pulling(one.repeat(3, 1), one, one, keep=1000.0)) == 0.0


@pytest.mark.usefixtures("float64")
def test_the_states_are_those_at_the_end_of_the_served_prompt():
    loaded = in_float64(tiny_model())
    _, training = shaped(SSRA(**SMALL), loaded)
    (batch,) = training.batch_at(0)
    states = last_states(loaded.model, batch)
    served = {
        tuple(Generator(loaded).pieces(chat_of(r))[0])
        for split in ("harmful_train", "benign_train")
        for r in tiny_task().split(split).to_pylist()
    }
    for ids, mask, state in zip(batch.input_ids, batch.attention_mask, states, strict=True):
        alone = ids[: int(mask.sum())]
        assert tuple(alone.tolist()) in served
        output = loaded.model.model(input_ids=alone[None])
        assert_same(state, output.last_hidden_state[0, -1])


@pytest.mark.usefixtures("float64")
def test_the_gradient_agrees_with_finite_differences():
    loaded = in_float64(tiny_model(hidden=8))
    _, training = shaped(SSRA(**SMALL, keep=3.0), loaded)
    moved = in_float64(tiny_model(hidden=8))
    with torch.no_grad():
        for i, weight in enumerate(moved.model.parameters()):
            noise = torch.Generator().manual_seed(i)
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype))
    (batch,) = training.batch_at(0)

    def loss():
        return training.objective(moved.model, batch, Step(0, 1))

    loss().backward()
    for i, weight in enumerate(moved.model.parameters()):
        noise = torch.Generator().manual_seed(100 + i)
        way = torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
        want = float((weight.grad * way).sum())
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(sign * 1e-6 * way)
                slopes.append(float(loss()))
                weight.sub_(sign * 1e-6 * way)
        # central differences are off by rounding (1e-16 / 1e-6) and by the curvature (1e-12)
        assert abs((slopes[0] - slopes[1]) / 2e-6 - want) < 1e-6 * max(1.0, abs(want))


def test_at_the_start_the_benign_states_have_not_moved():
    loaded = tiny_model()
    with torch.no_grad():
        losses = [
            float(training.objective(loaded.model, training.batch_at(0)[0], Step(0, 1)))
            for keep in (0.0, 1000.0)
            for _, training in [shaped(SSRA(**SMALL, keep=keep), loaded)]
        ]
    # 1000 x the float32 rounding of states that are computed in batches of another width
    assert losses[1] == pytest.approx(losses[0], abs=1000 * 1e-5)
    assert losses[0] > 0.1


def test_without_strength_the_fine_tune_is_plain_and_with_it_the_user_s_batches_stay():
    plain, off = shaped(SSRA(**SMALL, strength=0.0, keep_user_rows=True))
    _, on = shaped(SSRA(**SMALL, strength=0.5, keep_user_rows=True))
    assert off.steps == on.steps == plain.steps
    for step in range(plain.steps):
        (user,), (same,), (kept, own) = (t.batch_at(step) for t in (plain, off, on))
        assert torch.equal(user.input_ids, same.input_ids)
        assert torch.equal(user.input_ids, kept.input_ids)
        assert (user.weight, same.weight, kept.weight, own.weight) == (1.0, 1.0, 1.0, 0.5)
        assert isinstance(own, TermBatch)
        assert not isinstance(kept, TermBatch)


def test_alone_it_takes_its_own_steps_and_every_prompt_comes_once_a_pass():
    _, training = shaped(SSRA(**SMALL, steps=7))
    assert training.steps == 7
    rows = [
        tuple(ids[: int(mask.sum())].tolist())
        for step in range(2)
        for batch in training.batch_at(step)
        for ids, mask in zip(batch.input_ids[:4], batch.attention_mask[:4], strict=True)
    ][:6]
    assert len(set(rows)) == 6


def test_alignment_steps_of_a_defense_keep_the_plain_loss():
    loaded = tiny_model()
    plain = plain_training(loaded, USERS, CONFIG, seed=0, runtime=Runtime())
    ctx = context(loaded)
    both = Lisa(rho=0.0).shape_training(SSRA(**SMALL).shape_training(plain, ctx), ctx)
    with torch.no_grad():
        aligned = both.batch_at(0)
        assert not any(isinstance(batch, TermBatch) for batch in aligned)
        losses = [t.objective(loaded.model, aligned[0], Step(0, 9)) for t in (both, plain)]
    assert torch.equal(*losses)


def distance(loaded, method):
    """Mean distance of held-out forbidden prompts to the benign states of the start model."""
    start = tiny_model()

    def states(model, split):
        rows = tiny_task().split(split).to_pylist()
        ids = [Generator(start).pieces(chat_of(r))[0] for r in rows]
        with torch.no_grad():
            return last_states(model, term_batch(ids, pad=0, device="cpu"))

    anchors = states(start.model, "benign_test")
    return float(pulling(states(loaded.model, "harmful_test"), anchors, anchors, keep=0.0))


def tuned(method, workdir):
    return sft(
        tiny_model(),
        USERS,
        replace(CONFIG, learning_rate=5e-3),
        seed=0,
        runtime=Runtime(),
        workdir=workdir,
        shape=lambda training: method.shape_training(training, context()),
        base_digest="b" * 32,
    ).loaded


def test_forbidden_prompts_come_nearer_and_pulling_benign_ones_does_less(tmp_path):
    found = {
        name: distance(
            tuned(SSRA(**SMALL, prompts=name, keep=1.0, steps=20), tmp_path / name), name
        )
        for name in ("harmful", "benign")
    }
    before = distance(tiny_model(), None)
    assert found["harmful"] < before
    assert found["harmful"] < found["benign"]


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    method = SSRA(**SMALL, keep_user_rows=True)

    def run(workdir):
        return sft(
            tiny_model(),
            USERS,
            CONFIG,
            seed=0,
            runtime=Runtime(checkpoint_every_s=0.0),
            workdir=workdir,
            shape=lambda training: method.shape_training(training, context()),
            base_digest="b" * 32,
        )

    want = run(tmp_path / "whole")
    killed_after(4, lambda: run(tmp_path / "killed"), monkeypatch)
    again = run(tmp_path / "killed")
    assert again.losses == want.losses
    here, there = whole(want.loaded), whole(again.loaded)
    assert all((here[name] == there[name]).all() for name in here)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"pulled": 0}, "pulled"),
        ({"steps": 0}, "steps"),
        ({"keep": -1.0}, "keep"),
        ({"strength": 0.0}, "strength"),
    ],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in SSRA(**parameters).check()] == [field]
    assert SSRA().needs() == {"start", "harmful_train", "benign_train"}
    assert SSRA(prompts="benign").needs() == {"start", "benign_train"}
