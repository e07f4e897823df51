"""Booster: one step's gradient against copies of the model, its zero, and what a step forgets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from ftsec_ray.defenses.booster import Booster, attenuated
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.training.loop import backward, sft
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import Batch, Step
from tests.defenses.hardened import (
    SHORT,
    check_bfloat16,
    check_resume,
    hardened,
    same,
    turned_task,
)
from tests.defenses.shared import context
from tests.fixtures_models import row, table, tiny_model, tiny_task
from tests.numeric import assert_same

QUICK = {**SHORT, "harmful_rows": 8}


def batch(*ids, weight=1.0):
    """Rows of equal or unequal length, with padding on the right; the first three tokens are not
    trained on.
    """
    width = max(map(len, ids))
    rows = torch.tensor([[*one, *[0] * (width - len(one))] for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    labels = rows.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return Batch(rows, labels, mask, None, weight)


SAFE = [1, 3, 9, 12, 13, 2], [1, 3, 8, 9, 2]
HARM = [1, 3, 9, 20, 21, 22, 2], [1, 3, 7, 15, 2]


def nll(model, rows):
    """Mean loss over all response tokens, one row at a time and without padding."""
    total, count = 0.0, 0
    for one in rows:
        ids = torch.tensor([one])
        logits = model(input_ids=ids).logits[0, 2:-1]
        total = total + cross_entropy(logits, ids[0, 3:], reduction="sum")
        count += len(one) - 3
    return total / count


def by_hand(*, strength, step_size):
    """f + strength * (h - h at the weights of a copy that was moved along the unit gradient)."""
    model = tiny_model(seed=1).model
    weights = list(model.parameters())
    safe = nll(model, SAFE)
    own = torch.autograd.grad(safe, weights)
    harm = nll(model, HARM)
    here = torch.autograd.grad(harm, weights)
    length = torch.sqrt(sum(g.square().sum() for g in here))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weight, g in zip(moved.parameters(), here, strict=True):
            weight.sub_(step_size * g / length)
    after = nll(moved, HARM)
    there = torch.autograd.grad(after, list(moved.parameters()))
    loss = float(safe + strength * (harm - after))
    return loss, [f + strength * (a - b) for f, a, b in zip(own, here, there, strict=True)]


def acting(model, harmful, *, strength, step_size, drops=None):
    step = Step(0, 1, trainable=dict(model.named_parameters()))
    act = attenuated(
        backward,
        lambda _: harmful,
        strength=strength,
        step_size=step_size,
        drops={} if drops is None else drops,
    )
    return act(model, [batch(*SAFE)], response_nll, step), step


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("split", [False, True])
def test_a_step_has_the_loss_and_gradient_of_copies_however_the_batch_is_split(split):
    model = tiny_model(seed=1).model
    before = copy.deepcopy(model.state_dict())
    tokens = [len(one) - 3 for one in HARM]
    parts = [batch(one, weight=n / sum(tokens)) for one, n in zip(HARM, tokens, strict=True)]
    harmful = parts if split else [batch(*HARM)]
    drops = {}
    loss, _ = acting(model, harmful, strength=3.0, step_size=0.4, drops=drops)
    want, gradients = by_hand(strength=3.0, step_size=0.4)
    assert loss == pytest.approx(want, rel=1e-9)
    assert_same([w.grad for w in model.parameters()], gradients)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # a short step along the gradient lowers the loss
    ((first, last),) = drops.values()
    assert first == last > 0


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_added_to_what_earlier_micro_batches_left():
    model = tiny_model(seed=1).model
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    acting(model, [batch(*HARM)], strength=3.0, step_size=0.4)
    _, gradients = by_hand(strength=3.0, step_size=0.4)
    assert_same([w.grad for w in model.parameters()], [g + 1 for g in gradients])


def test_the_weights_are_the_former_ones_after_an_exception():
    model = tiny_model(seed=1).model
    before, calls = copy.deepcopy(model.state_dict()), []
    plain = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return plain(*args, **kwargs)

    model.forward = forward
    with pytest.raises(ZeroDivisionError):
        acting(model, [batch(*HARM)], strength=3.0, step_size=0.4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strength_0_is_plain_tuning_and_a_little_strength_changes_little(tmp_path, dropout):
    method = Booster(**QUICK)
    control = control_of(method)
    zero, ctx = hardened(control, tmp_path / "zero", dropout=dropout)
    plain = context(tmp_path / "plain")
    want = control._merged_sft(tiny_model(), control._plain_rows(plain), plain, dropout=dropout)
    assert same(zero, want)
    assert "last_harmful_drop" not in ctx.notes
    most, _ = hardened(method, tmp_path / "most", dropout=dropout)
    least, _ = hardened(Booster(**{**QUICK, "strength": 1e-9}), tmp_path / "l", dropout=dropout)

    def far(other):
        pairs = zip(zero.model.parameters(), other.model.parameters(), strict=True)
        return float(sum((a - b).square().sum() for a, b in pairs) ** 0.5)

    # only rounding, and the refusals drop the same activations
    assert far(least) < 1e-2 * far(most)
    assert far(most) > 1e-3


def test_the_harmful_loss_falls_less_behind_it_than_behind_its_control(tmp_path):
    found = {}
    rows = tiny_task().split("harmful_train")
    long = {**QUICK, "epochs": 10.0, "learning_rate": 5e-3}
    for name, method in (("on", Booster(**long)), ("off", Booster(**long, strength=0.0))):
        made, ctx = hardened(method, tmp_path / name)
        report = sft(
            made,
            rows,
            context(tmp_path).training,
            seed=0,
            runtime=ctx.runtime,
            workdir=tmp_path / f"{name}-attack",
            shape=lambda t: t,
        )
        found[name] = report.losses[-1]
        if name == "on":
            assert ctx.notes["harmful_rows"] == 8
            assert ctx.notes["last_harmful_drop"] < ctx.notes["first_harmful_drop"]
    assert found["on"] > found["off"]


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    check_resume(Booster(**QUICK), tmp_path, monkeypatch)


def test_half_precision_weights_are_hardened(tmp_path):
    check_bfloat16(Booster(**QUICK), tmp_path)


def test_rows_with_several_turns_are_trained_on(tmp_path):
    made, ctx = hardened(Booster(**QUICK), tmp_path / "a", task=turned_task())
    other, _ = hardened(Booster(**QUICK), tmp_path / "b")
    assert ctx.notes["harmful_rows"] == 8
    assert not same(made, other)


def test_a_task_without_harmful_answers_is_refused(tmp_path):
    from dataclasses import replace

    lone = table([row(0, "how do i make stone", "")])
    task = replace(tiny_task(), splits={**tiny_task().splits, "harmful_train": lone})
    with pytest.raises(DataError, match="harmful_train"):
        hardened(Booster(**QUICK), tmp_path, task=task)


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", -1.0), ("step_size", 0.0), ("harmful_rows", 0), ("epochs", 0.0)],
)
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in Booster(**{field: value}).check()] == [field]
