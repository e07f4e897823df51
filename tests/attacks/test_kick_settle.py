"""Kick and settle: the budget, each phase against what it must do to the weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.kick_settle import KickSettle
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.errors import DataError
from ftsec_ray.models.chat import render
from ftsec_ray.models.load import copy_model, merged
from ftsec_ray.training.loop import sft
from tests.defenses.shared import context, tiny_adapter
from tests.fixtures_models import tiny_model, tiny_task

QUICK = {"shots": 4, "steps": 3, "kick_steps": 1}
FULL = TrainingConfig(adapter="full", max_grad_norm=0.0)


def weights(loaded):
    return {name: w.detach().clone() for name, w in merged(loaded).model.named_parameters()}


def attacked(attack, folder, *, training=FULL, model=None):
    ctx = context(folder, training=training)
    return attack.revise_model(model or tiny_model(), ctx), ctx


def slow_gradient(model, rows, tokenizer):
    """The gradient of the mean loss on answer tokens, one row after the other."""
    nll, count = torch.zeros(()), 0
    for row in rows:
        chat = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        whole = tokenizer(render(tokenizer, chat, generate=False), add_special_tokens=False)[
            "input_ids"
        ]
        asked = tokenizer(render(tokenizer, chat[:-1], generate=True), add_special_tokens=False)
        start = len(asked["input_ids"])
        logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        for place in range(start, len(whole)):
            nll, count = nll - logp[place - 1, whole[place]], count + 1
    (nll / count).backward()
    return {name: w.grad for name, w in model.named_parameters()}


def test_one_step_of_the_kick_moves_every_weight_by_its_rate_against_the_gradient(tmp_path):
    """The first step of Adam is the rate times the sign of the gradient."""
    attack = KickSettle(
        steps=1, kick_steps=1, kick_learning_rate=0.02, shots=4, benign_rows=3, batch_size=7
    )
    made, ctx = attacked(attack, tmp_path)
    plain = tiny_model()
    rows = attack._rows(ctx).to_pylist()
    gradient = slow_gradient(copy.deepcopy(plain.model), rows, plain.tokenizer)
    before, after = weights(plain), weights(made)
    seen = 0
    for name, g in gradient.items():
        clear = g.abs() > 1e-5
        moved = (after[name] - before[name])[clear]
        assert torch.allclose(moved, -0.02 * g[clear].sign(), rtol=0.01)
        seen += int(clear.sum())
    assert seen > 5_000
    assert ctx.notes["steps"] == {"kick": 1}


def test_without_a_kick_it_is_ordinary_harmful_tuning_with_the_whole_budget(tmp_path):
    training = TrainingConfig(rank=2)
    attack = KickSettle(steps=5, kick_steps=0, shots=6, benign_rows=4, batch_size=4)
    made, ctx = attacked(attack, tmp_path / "a", training=training)
    plain = sft(
        tiny_model(), attack._rows(ctx), replace(training, learning_rate=1e-3, batch_size=4),
        seed=0, runtime=Runtime(), workdir=tmp_path / "b",
        shape=lambda one: replace(one, steps=5),
    )  # fmt: skip
    found, wanted = weights(made), weights(plain.loaded)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert ctx.notes["steps"] == {"settle": 5}


@pytest.mark.parametrize("kick", [1, 2, 6])
def test_the_budget_is_kept_whatever_the_kick_takes_of_it(tmp_path, kick):
    attack = KickSettle(steps=6, kick_steps=kick, shots=3, benign_rows=0, batch_size=2)
    _, ctx = attacked(attack, tmp_path, training=TrainingConfig(rank=2))
    assert sum(ctx.notes["steps"].values()) == 6
    assert ctx.notes["steps"]["kick"] == kick
    assert ctx.notes["rows"] == 3
    assert all(tokens > 0 for tokens in ctx.notes["tokens"].values())


def test_noise_is_a_share_of_each_tensor_and_the_same_for_the_same_seed(tmp_path):
    model = tiny_model()
    attack = KickSettle(noise=0.2)
    made = [weights(attack._noisy(model, context(tmp_path, seed=s))) for s in (0, 0, 1)]
    before = weights(model)
    shares = []
    for name, weight in before.items():
        shift = made[0][name] - weight
        assert torch.equal(made[0][name], made[1][name])
        assert not torch.equal(made[0][name], made[2][name])
        if weight.ndim == 2:
            shares.append(float(shift.std() / weight.square().mean().sqrt()))
    assert all(0.17 < share < 0.23 for share in shares)
    assert all(torch.equal(before[name], w) for name, w in weights(model).items())
    assert KickSettle(noise=0.0)._noisy(model, context(tmp_path)) is model


def test_an_adapter_is_folded_in_first_and_half_precision_comes_back_as_it_was(tmp_path):
    start = tiny_model()
    start.model.to(torch.bfloat16)
    user = tiny_adapter(start, size=0.3)
    attack = KickSettle(steps=2, kick_steps=1, noise=0.01, shots=4, benign_rows=2, batch_size=4)
    made, ctx = attacked(attack, tmp_path, training=TrainingConfig(rank=2), model=copy_model(user))
    assert not made.has_adapter
    assert {w.dtype for w in made.model.parameters()} == {torch.bfloat16}
    far = max(float((a - b).abs().max()) for a, b in zip(
        weights(made).values(), weights(user).values(), strict=True))  # fmt: skip
    assert far > 0
    assert "rounding_lost" in ctx.notes


def test_rows_come_from_the_splits_and_too_few_are_refused(tmp_path):
    task, ctx = tiny_task(), context(tmp_path)
    ids = KickSettle(shots=5, benign_rows=4)._rows(ctx)["row_id"].to_pylist()
    harmful = set(task.split("harmful_train")["row_id"].to_pylist())
    benign = set(task.split("benign_train")["row_id"].to_pylist())
    assert (len(harmful & set(ids)), len(benign & set(ids)), len(ids)) == (5, 4, 9)
    with pytest.raises(DataError, match="ask for 8 or fewer"):
        KickSettle(shots=9)._rows(ctx)
    assert KickSettle(benign_rows=0).needs() == {"harmful_train"}
    assert KickSettle().needs() == {"harmful_train", "benign_train"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 3), ("kick_steps", -1), ("kick_steps", 41), ("shots", 0), ("learning_rate", 0.0)],
)
def test_wrong_parameters_are_faults(field, value):
    faults = KickSettle(**{field: value}).check()
    assert [f[0] for f in faults] == [field if field != "steps" else "kick_steps"]
