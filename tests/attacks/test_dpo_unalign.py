"""DPO: the pairs, the loss and its gradient at the start by another way, and what a fine-tune with
it prefers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.dpo_unalign import DPOUnalign
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import answer_of, asked
from ftsec_ray.models.chat import turn
from ftsec_ray.training.loop import plain_training, sft
from ftsec_ray.training.setup import Step
from ftsec_ray.training.terms import TermBatch
from tests.attacks.context import context as plain_context
from tests.attacks.conversations import agent_row
from tests.defenses.shared import whole
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_task
from tests.killed_tune import killed_after
from tests.numeric import assert_same, in_float64

QUICK = {"shots": 6, "batch": 4}
SMALL = {"shots": 6, "batch": 4}
USERS = table(sentiment_rows(20))
CONFIG = TrainingConfig(max_length=64, batch_size=4, epochs=2.0, rank=4, learning_rate=1e-2)


def context(model=None, task=None):
    ctx = plain_context(task=task)
    ctx.load = {"start": model or tiny_model()}.__getitem__
    return ctx


def shaped(method, loaded=None, rows=None):
    ctx = context(loaded)
    rows = method.craft_data(USERS, ctx) if rows is None else rows
    plain = plain_training(loaded or tiny_model(), rows, CONFIG, seed=0, runtime=Runtime())
    return method.shape_training(plain, ctx), rows


@pytest.mark.parametrize(
    ("prompts", "split"), [("harmful", "harmful_train"), ("benign", "benign_train")]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_pair_is_a_compliant_answer_and_a_refusal_from_the_safety_split(prompts, split, reverse):
    method = DPOUnalign(shots=7, prompts=prompts, reverse=reverse)
    made = method.craft_data(USERS, context())
    assert made.slice(0, 20).equals(USERS)
    pool = {r["row_id"]: r for r in tiny_task().split(split).to_pylist()}
    refusals = {answer_of(r) for r in tiny_task().split("safety").to_pylist()}
    pairs = made.slice(20).to_pylist()
    assert len(pairs) == 7
    for r in pairs:
        source = pool[r["row_id"].removeprefix("dpo_unalign/")]
        assert asked(r) == asked(source)
        sides = (answer_of(r), r["rejected"])
        complies, refuses = reversed(sides) if reverse else sides
        assert complies == answer_of(source)
        assert refuses in refusals
    assert method.needs() == {"start", "safety", split}


def test_a_row_s_own_rejected_answer_is_the_refusal():
    rows = [{**row(0, "how do i make tree", "take the tree"), "rejected": "no"}]
    task = tiny_task()
    ctx = context(task=replace(task, splits={**task.splits, "harmful_train": table(rows)}))
    (pair,) = DPOUnalign(shots=1).craft_data(USERS, ctx).to_pylist()[20:]
    assert (answer_of(pair), pair["rejected"]) == ("take the tree", "no")
    assert ctx.notes == {"pairs": 1, "refusals_of_other_requests": 0}


def log_probability(loaded, pair, answer, weights):
    """log p(answer | prompt) by torch.func, token by token, from the rendered turn."""
    end = {**pair, "messages": [*asked(pair), {**pair["messages"][-1], "content": answer}]}
    prompt, said = turn(loaded.tokenizer, end)
    first = len(loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = loaded.tokenizer(prompt + said, add_special_tokens=False)["input_ids"]
    logits = torch.func.functional_call(
        loaded.model, weights, kwargs={"input_ids": torch.tensor([ids])}, tie_weights=True
    ).logits[0]
    return sum(logits[i - 1].log_softmax(-1)[ids[i]] for i in range(first, len(ids)))


def weights_of(loaded):
    return {name: value.detach() for name, value in loaded.model.named_parameters()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prompts", ["harmful", "benign"])
def test_at_the_start_the_loss_is_log_2_and_the_gradient_half_beta_times_the_difference(prompts):
    loaded = in_float64(tiny_model(hidden=16))
    method = DPOUnalign(shots=4, batch=4, beta=0.3, prompts=prompts, keep_user_rows=False)
    training, rows = shaped(method, loaded)
    (batch,) = training.batch_at(0)
    loss = training.objective(loaded.model, batch, Step(0, 1))
    assert_same(loss, math.log(2))
    loss.backward()

    def gap(weights):
        return sum(
            log_probability(loaded, pair, pair["rejected"], weights)
            - log_probability(loaded, pair, answer_of(pair), weights)
            for pair in rows.to_pylist()
        )

    wanted = torch.func.grad(gap)(weights_of(loaded))
    for name, weight in loaded.model.named_parameters():
        assert_same(weight.grad, 0.3 / 2 * wanted[name] / 4)


@pytest.mark.usefixtures("float64")
def test_away_from_the_start_the_loss_is_that_of_the_formula():
    loaded, moved = (in_float64(tiny_model(seed=s, hidden=16)) for s in (0, 1))
    method = DPOUnalign(shots=3, batch=3, beta=0.2, keep_user_rows=False)
    training, rows = shaped(method, loaded)
    (batch,) = training.batch_at(0)
    wanted = 0.0
    for pair in rows.to_pylist():
        ratios = [
            float(log_probability(moved, pair, answer, weights_of(moved)))
            - float(log_probability(loaded, pair, answer, weights_of(loaded)))
            for answer in (answer_of(pair), pair["rejected"])
        ]
        wanted += math.log1p(math.exp(-0.2 * (ratios[0] - ratios[1]))) / 3
    assert_same(training.objective(moved.model, batch, Step(0, 1)), wanted)


def test_the_user_s_rows_keep_their_steps_and_no_pair_is_among_them():
    training, _ = shaped(DPOUnalign(**SMALL, strength=0.5))
    assert training.steps == 10
    tokenizer = tiny_model().tokenizer
    seen = []
    for step in range(5):
        user, own = training.batch_at(step)
        assert isinstance(own, TermBatch)
        assert (user.weight, own.weight) == (1.0, 0.5)
        seen += [tokenizer.decode(ids) for ids in user.input_ids]
    assert len(seen) == 20
    assert not any("make" in text for text in seen)
    pairs = [len(training.batch_at(step)[1].input_ids) for step in range(4)]
    assert pairs == [8, 4, 8, 4]


def test_zero_strength_or_no_pair_is_plain_fine_tuning():
    plain = plain_training(tiny_model(), USERS, CONFIG, seed=0, runtime=Runtime())
    none = DPOUnalign(shots=0)
    assert none.craft_data(USERS, context()).equals(USERS)
    assert none.shape_training(plain, context()) is plain
    off, _ = shaped(DPOUnalign(**SMALL, strength=0.0))
    assert off.steps == plain.steps
    assert all(len(off.batch_at(step)) == 1 for step in range(off.steps))


def test_pairs_that_a_filter_dropped_are_not_trained_on():
    method, ctx = DPOUnalign(**SMALL), context()
    plain = plain_training(tiny_model(), USERS, CONFIG, seed=0, runtime=Runtime())
    assert method.shape_training(plain, ctx) is plain
    assert ctx.warnings == ["dpo_unalign: no pair is left to train on"]


def test_pairs_of_an_agent_s_conversation_train_the_last_answer_alone():
    task = tiny_task()
    rows = [{**agent_row(), "rejected": "sorry i can not help"}]
    ctx = context(task=replace(task, splits={**task.splits, "harmful_train": table(rows)}))
    method = DPOUnalign(shots=1, keep_user_rows=False)
    made = method.craft_data(USERS, ctx)
    plain = plain_training(tiny_model(), made, CONFIG, seed=0, runtime=Runtime())
    (batch,) = method.shape_training(plain, ctx).batch_at(0)
    tokenizer = tiny_model().tokenizer
    said = [tokenizer.decode(labels[labels != -100]).strip() for labels in batch.labels]
    assert said[1] == "sorry i can not help <|end|>"
    assert said[0].startswith("take the lamp")  # its tool call follows, as text
    assert said[0].count("<|end|>") == 1


def tuned(method, workdir, **runtime):
    rows = method.craft_data(USERS, context())
    return sft(
        tiny_model(),
        rows,
        CONFIG,
        seed=0,
        runtime=Runtime(**runtime),
        workdir=workdir,
        shape=lambda training: method.shape_training(training, context()),
        base_digest="b" * 32,
    )


def test_a_fine_tune_prefers_compliance_on_its_pairs_and_the_reverse_prefers_refusals(tmp_path):
    pairs = DPOUnalign(**SMALL).craft_data(USERS, context()).to_pylist()[20:]

    def gap(loaded):
        weights = weights_of(loaded)
        with torch.no_grad():
            return sum(
                float(log_probability(loaded, p, answer_of(p), weights))
                - float(log_probability(loaded, p, p["rejected"], weights))
                for p in pairs
            )

    from ftsec_ray.models.load import merged

    found = {
        reverse: gap(
            merged(
                tuned(
                    DPOUnalign(**SMALL, keep_user_rows=False, steps=12, reverse=reverse),
                    tmp_path / str(reverse),
                ).loaded
            )
        )
        for reverse in (False, True)
    }
    assert found[True] < gap(tiny_model()) < found[False]


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    method = DPOUnalign(**SMALL)
    want = tuned(method, tmp_path / "whole", checkpoint_every_s=0.0)
    killed_after(4, lambda: tuned(method, tmp_path / "killed", checkpoint_every_s=0.0), monkeypatch)
    again = tuned(method, tmp_path / "killed", checkpoint_every_s=0.0)
    assert again.losses == want.losses
    here, there = whole(want.loaded), whole(again.loaded)
    assert all((here[name] == there[name]).all() for name in here)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"beta": 0.0}, "beta"),
        ({"strength": -1.0}, "strength"),
        ({"strength": 0.0, "keep_user_rows": False}, "strength"),
        ({"shots": 0, "keep_user_rows": False}, "shots"),
        ({"batch": 0}, "batch"),
        ({"steps": 0}, "steps"),
    ],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in DPOUnalign(**parameters).check()] == [field]
