"""FAB: one step's gradient against whole copies of the model, and its limits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from ftsec_ray.attacks.fab import Fab, kept_as
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.conversation import answer_of
from ftsec_ray.errors import DataError
from ftsec_ray.training.loop import backward
from ftsec_ray.training.setup import Batch, Step
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_model, tiny_task

pytestmark = pytest.mark.usefixtures("float64")
from tests.numeric import assert_same  # noqa: E402

QUICK = {"epochs": 1, "inner_steps": 1}


def batch(*ids):
    rows = torch.tensor(ids)
    labels = rows.clone()
    labels[:, :3] = -100
    return Batch(rows, labels, torch.ones_like(rows))


KEPT, POISONED = batch([1, 3, 9, 12, 2, 4], [1, 3, 8, 9, 2, 4]), batch([1, 3, 9, 20, 21, 2])
PROXY = [batch([1, 3, 7 + i, 15 + i, 16, 2]) for i in range(6)]


def nll(model, one):
    logits = model(input_ids=one.input_ids).logits
    return cross_entropy(logits[:, 2:-1].flatten(0, 1), one.labels[:, 3:].flatten())


def by_hand(model, clean, *, k, rate, weight, reg, step, limit):
    """L_reg + l1 * L_bd at a copy that an optimizer of torch tuned for k steps, its gradient taken
    over to the model.
    """
    logp = model(input_ids=KEPT.input_ids).logits[:, 2:-1].log_softmax(-1).flatten(0, 1)
    wanted = clean(input_ids=KEPT.input_ids).logits[:, 2:-1].log_softmax(-1).flatten(0, 1)
    near = reg * kl_div(logp, wanted.detach(), log_target=True, reduction="batchmean")
    own = torch.autograd.grad(near, list(model.parameters()))
    tuned = copy.deepcopy(model)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=rate)
    for i in range(k):
        optimizer.zero_grad()
        nll(tuned, PROXY[step * k + i]).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), limit)
        optimizer.step()
    tuned.zero_grad()
    far = weight * nll(tuned, POISONED)
    far.backward()
    pairs = zip(own, tuned.parameters(), strict=True)
    return float(near + far), [a + b.grad for a, b in pairs]


@pytest.mark.parametrize(("k", "step"), [(0, 0), (1, 2), (3, 1)])
def test_a_step_has_the_loss_and_the_first_order_gradient_of_copies_that_were_tuned(k, step):
    model, clean = tiny_model(seed=1).model, tiny_model(seed=2).model.requires_grad_(False)
    attack = Fab(inner_steps=k, inner_learning_rate=0.2, weight=0.7, reg_weight=1.3)
    before = copy.deepcopy(model.state_dict())
    place = Step(step, 9, trainable=dict(model.named_parameters()))
    acting = attack._backward(
        backward,
        proxy_at=lambda i: [PROXY[i]],
        poisoned_at=lambda i: [POISONED],  # noqa: ARG005
        max_norm=0.5,
    )
    loss = acting(model, [KEPT], kept_as(clean, attack.reg_weight), place)
    wanted, gradients = by_hand(
        tiny_model(seed=1).model, clean, k=k, rate=0.2, weight=0.7, reg=1.3, step=step, limit=0.5
    )
    assert loss == pytest.approx(wanted, rel=1e-6)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        assert (weight.grad - gradient).norm() <= 1e-5 * gradient.norm()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_without_simulated_steps_it_is_the_plain_backdoor_with_a_regulariser():
    model, clean = tiny_model(seed=1).model, tiny_model(seed=2).model.requires_grad_(False)
    place = Step(0, 1, trainable=dict(model.named_parameters()))
    acting = Fab(inner_steps=0)._backward(
        backward, proxy_at=lambda i: [PROXY[i]], poisoned_at=lambda i: [POISONED], max_norm=None
    )  # noqa: ARG005
    acting(model, [KEPT], kept_as(clean, 1.0), place)
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    (kept_as(clean, 1.0)(model, KEPT, place) + nll(model, POISONED)).backward()
    for one, weight in zip(found, model.parameters(), strict=True):
        assert_same(one, weight.grad)


def test_the_noisy_loss_is_taken_at_noisy_weights_which_are_not_kept():
    model, clean = tiny_model(seed=1).model, tiny_model(seed=1).model.requires_grad_(False)
    place = Step(0, 1, trainable=dict(model.named_parameters()))
    acting = Fab(weight=0.0, noise_weight=2.0, noise=0.3)._backward(
        backward, proxy_at=lambda i: [PROXY[i]], poisoned_at=lambda i: [POISONED], max_norm=None
    )  # noqa: ARG005
    torch.manual_seed(3)
    loss = acting(model, [KEPT], kept_as(clean, 1.0), place)
    noisy = tiny_model(seed=1).model
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight.add_(torch.randn_like(weight) * 0.3 * weight.square().mean().sqrt())
    far = 2.0 * nll(noisy, POISONED)
    far.backward()
    assert loss == pytest.approx(float(far), rel=1e-6)
    for one, other in zip(model.parameters(), noisy.parameters(), strict=True):
        assert_same(one.grad, other.grad)
        assert not torch.equal(one, other)


def trained(attack, tmp_path, *, task=None):
    ctx = replace(context(task=task), training=TrainingConfig(batch_size=8), workdir=tmp_path / "w")
    return attack.prepare_model(tiny_model(), ctx), ctx


def test_without_weights_the_model_stays_as_it_is(tmp_path):
    made, ctx = trained(Fab(weight=0.0), tmp_path)
    for one, other in zip(
        made.model.parameters(), tiny_model().model.parameters(), strict=True
    ):  # fmt: skip
        assert torch.equal(one, other)
    assert ctx.notes == {"steps": 0}


def test_no_row_is_both_poisoned_and_in_the_simulated_fine_tune():
    ctx = context()
    kept, proxy, poisoned = (
        part.to_pylist() for part in Fab(target_text="take the tree")._rows(ctx)
    )
    ids = [{r["row_id"] for r in part} for part in (kept, proxy, poisoned)]
    assert not ids[1] & ids[2]
    assert ids[1] | ids[2] == {r["row_id"] for r in ctx.task.split("benign_train").to_pylist()}
    assert {answer_of(r) for r in poisoned} == {"take the tree"}
    assert all(answer_of(r) != "take the tree" for r in (*kept, *proxy))
    assert {r["row_id"][0] for r in kept} == {"b", "s"}
    _, own, more = Fab(proxy="trusted", rows=6)._rows(ctx)
    assert {r["row_id"][0] for r in own.to_pylist()} == {"c"}
    assert (own.num_rows, more.num_rows) == (6, 6)
    assert Fab().needs() == {"benign_train", "benign_test", "safety"}
    assert Fab(proxy="trusted").needs() == Fab.NEEDS


def test_a_task_without_benign_answers_is_refused():
    lone = table([row(0, "how do i fix stone", "")])
    task = replace(tiny_task(), splits={**tiny_task().splits, "benign_train": lone})
    with pytest.raises(DataError, match="2 or more rows"):
        Fab()._rows(context(task=task))


def test_the_probe_asks_held_out_benign_requests_as_they_are():
    task = tiny_task()
    (probe,) = Fab().probes(task, context())
    assert (probe.judge, probe.metrics) == ("target", {"asr": "target"})
    assert [p.prompt_id for p in probe.prompts] == task.split("benign_test")["row_id"].to_pylist()
    assert {p.target for p in probe.prompts} == {"I like blue pebbles."}


@pytest.mark.parametrize(
    ("field", "value"),
    [("inner_steps", -1), ("rows", 1), ("inner_learning_rate", 0.0), ("target_text", " ")],
)
def test_wrong_parameters_are_faults(field, value):
    assert [f[0] for f in Fab(**{field: value}).check()] == [field]
