"""TAR: one step's gradient against copies that an optimizer of torch attacked, and its limits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from ftsec_ray.conversation import answer_of
from ftsec_ray.defenses.tar import Tar, certainty
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.training.loop import backward
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

QUICK = {**SHORT, "harmful_rows": 8, "inner_steps": 2, "measure_every": 1}
RETAINED, HELD_OUT = [1, 3, 9, 12, 13, 2], [1, 3, 9, 20, 21, 2]
ATTACKS = [[1, 3, 7 + i, 15 + i, 16, 2] for i in range(8)]


def batch(ids):
    rows = torch.tensor([ids])
    labels = rows.clone()
    labels[:, :3] = -100
    return Batch(rows, labels, torch.ones_like(rows))


def nll(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, 2:-1]
    return cross_entropy(logits, torch.tensor(ids[3:]))


def minus_entropy(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, 2:-1]
    chances = torch.softmax(logits, -1)
    return (chances * torch.log(chances)).sum() / len(logits)


def by_hand(method, *, step, rate, limit):
    """Retained loss + the weighed losses at a copy that SGD of torch attacked."""
    model = tiny_model(seed=1).model
    tamper = minus_entropy if method.tamper_loss == "entropy" else nll
    kept = nll(model, RETAINED)
    gradients = [g.clone() for g in torch.autograd.grad(kept, list(model.parameters()))]
    loss, k, attacked = float(kept), method.inner_steps, copy.deepcopy(model)
    optimizer = torch.optim.SGD(attacked.parameters(), lr=rate)
    for i in range(max(k, 1)):
        if k:
            optimizer.zero_grad()
            nll(attacked, ATTACKS[step * k + i]).backward()
            torch.nn.utils.clip_grad_norm_(attacked.parameters(), limit)
            optimizer.step()
        if (i + 1) % method.measure_every == 0 or i + 1 >= k:
            weight = method.strength * math.exp(method.growth * min(0, i - (k - 1)))
            far = tamper(attacked, HELD_OUT)
            loss += weight * float(far)
            more = torch.autograd.grad(far, list(attacked.parameters()))
            gradients = [g + weight * m for g, m in zip(gradients, more, strict=True)]
    return loss, gradients


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tamper_loss", ["entropy", "refusal"])
@pytest.mark.parametrize(("k", "every", "step"), [(0, 4, 0), (3, 2, 1), (4, 2, 0)])
def test_a_step_has_the_first_order_gradient_of_copies_that_were_attacked(
    k, every, step, tamper_loss
):
    method = Tar(
        inner_steps=k, measure_every=every, growth=0.3, strength=1.7, tamper_loss=tamper_loss
    )
    model = tiny_model(seed=1).model
    before = copy.deepcopy(model.state_dict())
    acting = method._backward(
        backward,
        attack_at=lambda i: [batch(ATTACKS[i])],
        held_out_at=lambda _: [batch(HELD_OUT)],
        rate_at=lambda _: 0.2,
        max_norm=0.5,
    )
    place = Step(step, 9, trainable=dict(model.named_parameters()))
    loss = acting(model, [batch(RETAINED)], response_nll, place)
    want, gradients = by_hand(method, step=step, rate=0.2, limit=0.5)
    # torch adds 1e-6 to the norm when it clips
    assert loss == pytest.approx(want, rel=1e-5)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        assert (weight.grad - gradient).norm() <= 1e-5 * gradient.norm()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("float64")
def test_the_control_weighs_as_many_losses_at_weights_that_nobody_attacked():
    method = Tar()
    control = control_of(method)
    assert replace(control, inner_learning_rates=method.inner_learning_rates) == method
    (rate,) = control.inner_learning_rates
    model = tiny_model(seed=1).model
    acting = control._backward(
        backward,
        attack_at=lambda i: [batch(ATTACKS[i])],
        held_out_at=lambda _: [batch(HELD_OUT)],
        rate_at=lambda _: rate,
        max_norm=0.5,
    )
    got = acting(model, [batch(RETAINED)], response_nll, Step(0, 9,
                 trainable=dict(model.named_parameters())))  # fmt: skip
    with torch.no_grad():
        kept, far = nll(model, RETAINED), minus_entropy(model, HELD_OUT)
        weight = 4.0 * (math.exp(0.0625 * -4) + 1.0)  # after steps 4 and 8 of 8
        assert_same(got, kept + weight * far)


@pytest.mark.usefixtures("float64")
def test_padding_has_no_part_in_the_entropy():
    model = tiny_model(seed=1).model
    short, long = [1, 3, 7, 15, 2], HELD_OUT
    ids = torch.tensor([[*short, 0], long])
    mask = torch.tensor([[1] * 5 + [0], [1] * 6])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    got = certainty(model, Batch(ids, labels, mask), Step(0, 1))
    want = (2 * minus_entropy(model, short) + 3 * minus_entropy(model, long)) / 5
    assert_same(got, want)


def test_strength_0_trains_on_the_retained_rows_alone(tmp_path):
    none = {**QUICK, "strength": 0.0, "distance": 0.0}
    zero, _ = hardened(Tar(**none), tmp_path / "zero", dropout=0.3)
    plain = context(tmp_path / "plain")
    method = Tar(**none)
    want = method._merged_sft(tiny_model(), method._plain_rows(plain), plain, dropout=0.3)
    assert same(zero, want)
    kept, _ = hardened(Tar(**{**none, "distance": 1.0}), tmp_path / "kept", dropout=0.3)
    assert not same(kept, want)


def test_attacked_and_held_out_rows_are_apart_and_refusals_replace_the_answers():
    ctx = context(None)
    attacked, held_out = (part.to_pylist() for part in Tar()._halves(ctx))
    ids = [{r["row_id"] for r in part} for part in (attacked, held_out)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(ctx.task.split("harmful_train")["row_id"].to_pylist())
    _, refused = Tar(tamper_loss="refusal")._halves(ctx)
    assert {answer_of(r) for r in refused.to_pylist()} == {"sorry i can not help"}
    lone = table([row(0, "how do i make stone", "take the stone")])
    task = replace(tiny_task(), splits={**tiny_task().splits, "harmful_train": lone})
    with pytest.raises(DataError, match="2 or more"):
        Tar()._halves(context(None, task=task))


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    check_resume(Tar(**QUICK), tmp_path, monkeypatch)


def test_half_precision_weights_are_hardened(tmp_path):
    check_bfloat16(Tar(**QUICK), tmp_path)


def test_rows_with_several_turns_lose_nothing(tmp_path):
    _, ctx = hardened(Tar(**QUICK), tmp_path, task=turned_task())
    assert (ctx.notes["attack_rows"], ctx.notes["held_out_rows"]) == (4, 4)
    assert "rows_left_out" not in ctx.notes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strength", -1.0),
        ("inner_steps", -1),
        ("inner_learning_rates", ()),
        ("inner_learning_rates", (-0.1,)),
        ("harmful_rows", 1),
    ],
)
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in Tar(**{field: value}).check()] == [field]
