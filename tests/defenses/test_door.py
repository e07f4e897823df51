"""DOOR: prefixes and refusals token by token, the negative preference by hand, and its zero."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import answer_of
from ftsec_ray.defenses.door import Door, negative_preference, pairs_of
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.chat import render
from ftsec_ray.models.row_tokens import IGNORED
from ftsec_ray.training.loop import backward, plain_training
from ftsec_ray.training.setup import Step
from ftsec_ray.training.terms import TermBatch, term_batch, with_term
from tests.defenses.hardened import (
    SHORT,
    check_bfloat16,
    check_cuts,
    check_resume,
    hardened,
    same,
    turned_task,
)
from tests.defenses.shared import context
from tests.fixtures_models import tiny_model, tiny_task
from tests.models.templates import tokenizer_of
from tests.numeric import assert_same, in_float64

QUICK = {**SHORT, "harmful_rows": 8, "harmful_batch": 4}
REFUSAL = "sorry i can not help"


def pairs(*, task=None, max_length=64):
    rows = (task or tiny_task()).split("harmful_train").to_pylist()
    return rows, pairs_of(
        tiny_model().tokenizer, rows, [REFUSAL] * len(rows), max_length=max_length
    )


def test_the_refusal_follows_the_first_tokens_of_the_harmful_answer():
    tokenizer = tiny_model().tokenizer
    rows, found = pairs()
    assert [pair.row_id for pair in found] == [row["row_id"] for row in rows]
    for row, pair in zip(rows, found, strict=True):
        served = render(
            tokenizer, [{"role": "user", "content": row["messages"][0]["content"]}], generate=True
        )
        words = answer_of(row).split()
        assert pair.room == len(words) == 5
        for k in (0, 2, 5):
            ids, labels = pair.behind(k)
            text = " ".join([served.strip(), *words[:k], REFUSAL, "<|end|>"])
            assert tokenizer.decode(ids).split() == text.split()
            assert labels[-6:] == ids[-6:]
            assert set(labels[:-6]) == {IGNORED}
        ids, labels = pair.answered()
        assert tokenizer.decode(ids).split() == [*served.split(), *words, "<|end|>"]
        assert [label for label in labels if label != IGNORED] == ids[-6:]


@pytest.mark.parametrize("pieces", ["bytes", "spaces"])
def test_a_refusal_behind_other_words_begins_with_a_space(pieces):
    tokenizer = tokenizer_of("chatml", pieces=pieces)
    rows = tiny_task().split("harmful_train").to_pylist()[:2]
    for pair in pairs_of(tokenizer, rows, [REFUSAL] * 2, max_length=512):
        for k in range(1, pair.room + 1):
            ids, _ = pair.behind(k)
            begun = tokenizer.decode([*pair.prompt, *pair.answer[:k]])
            assert tokenizer.decode(ids).startswith(f"{begun} {REFUSAL}")
        whole = tokenizer.decode(pair.behind(0)[0])
        assert whole.startswith(f"{tokenizer.decode(pair.prompt)}{REFUSAL}")


def test_half_of_the_rows_are_begun_by_1_to_the_largest_number_of_tokens_anew_in_every_pass():
    _, found = pairs()
    ctx = context(None)
    drawn = [[Door(max_prefix=3)._prefix(p, turn, ctx) for p in found] for turn in range(60)]
    everything = [k for turn in drawn for k in turn]
    assert set(everything) == {0, 1, 2, 3}
    # 480 draws: the standard deviation of the share is 0.023
    assert 0.4 < sum(k > 0 for k in everything) / len(everything) < 0.6
    assert drawn[0] != drawn[1]
    assert {Door(prefix_share=0.0)._prefix(p, 0, ctx) for p in found} == {0}
    assert {Door(prefix_share=1.0)._prefix(p, t, ctx) for p in found for t in range(60)} == set(
        range(1, 6)
    )
    assert {Door(prefix_share=1.0, max_prefix=0)._prefix(p, 0, ctx) for p in found} == {0}


def test_what_does_not_fit_is_left_out_and_the_prefix_keeps_within_the_limit():
    _, whole = pairs()
    length = len(whole[0].prompt) + 6
    rows, found = pairs(max_length=length + 2)
    assert {pair.room for pair in found} == {2}
    assert all(len(pair.behind(pair.room)[0]) == length + 2 for pair in found)
    assert len(found) == len(rows)
    with pytest.raises(DataError, match="door"):
        pairs(max_length=5)


ANSWERS = [[1, 3, 9, 20, 21, 22, 2], [1, 3, 7, 15, 2]]


def nats_of(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, 2:-1]
    return cross_entropy(logits, torch.tensor(ids[3:]), reduction="sum")


def answers():
    labels = [[IGNORED] * 3 + row[3:] for row in ANSWERS]
    return term_batch(ANSWERS, labels=labels, pad=0, device="cpu")


@pytest.mark.usefixtures("float64")
def test_the_negative_preference_is_that_of_single_rows():
    model, start = tiny_model(seed=1).model, tiny_model(seed=2).model
    with torch.no_grad():
        before = torch.stack([nats_of(start, ids) for ids in ANSWERS])
        got = negative_preference(model, answers(), before, beta=0.5)
        want = 0.0
        for ids, old in zip(ANSWERS, before, strict=True):
            ratio = float(old - nats_of(model, ids))  # log p - log p0
            odds = 1.0 / (1.0 + torch.exp(torch.tensor(0.5 * ratio)))
            want += -(2 / 0.5) * float(torch.log(odds)) / (len(ids) - 3) / 2
    assert_same(got, want)


@pytest.mark.usefixtures("float64")
def test_at_the_start_its_gradient_is_that_of_the_answers_log_probability():
    model = tiny_model(seed=1).model
    with torch.no_grad():
        before = torch.stack([nats_of(model, ids) for ids in ANSWERS])
    weights = list(model.parameters())
    got = torch.autograd.grad(negative_preference(model, answers(), before, beta=0.7), weights)
    mean = sum(-nats_of(model, ids) / (len(ids) - 3) for ids in ANSWERS) / 2
    assert_same(got, torch.autograd.grad(mean, weights))


@pytest.mark.usefixtures("float64")
def test_a_step_weighs_plain_rows_refusals_and_answers():
    loaded, method = in_float64(tiny_model(seed=1)), Door(alpha=0.3, npo=0.6, harmful_batch=3)
    ctx = context(None)
    _, found = pairs()
    config = TrainingConfig(max_length=64, batch_size=4, epochs=1.0)
    users = plain_training(
        loaded, ctx.task.split("benign_train"), config, seed=0, runtime=Runtime()
    )
    both = with_term(users, method._batches(found, loaded, ctx), strength=0.3, user_weight=0.7)
    step, model = Step(0, 9), loaded.model
    batches = both.batch_at(0)
    loss = backward(model, batches, both.objective, step)
    (refused, answered) = [b for b in batches if isinstance(b, TermBatch)]
    with torch.no_grad():
        plain = sum(float(users.objective(model, b, step)) * b.weight for b in users.batch_at(0))
        total, count = 0.0, 0
        for ids, labels, mask in zip(
            refused.input_ids, refused.labels, refused.attention_mask, strict=True
        ):
            length = int(mask.sum())
            logits = model(input_ids=ids[None, :length]).logits[0, :-1]
            total += float(cross_entropy(logits, labels[1:length], reduction="sum"))
            count += int((labels != IGNORED).sum())
    # at the start both probabilities are equal: (2 / beta) log 2 per row, over its tokens
    npo = 0.6 * (2 / 0.5) * float(torch.log(torch.tensor(2.0))) / 6
    assert len(answered.input_ids) == 3
    assert loss == pytest.approx(0.7 * plain + 0.3 * (total / count + npo), rel=1e-9)


def test_alpha_0_is_plain_tuning_and_the_control_has_neither_prefix_nor_preference(tmp_path):
    zero, _ = hardened(Door(**QUICK, alpha=0.0), tmp_path / "zero", dropout=0.3)
    plain = context(tmp_path / "plain")
    method = Door(**QUICK)
    want = method._merged_sft(tiny_model(), method._plain_rows(plain), plain, dropout=0.3)
    assert same(zero, want)
    control = control_of(method)
    assert (control.max_prefix, control.npo, control.alpha) == (0, 0.0, 0.2)
    found, ctx = pairs()[1], context(None)
    batches = control._batches(found, tiny_model(), ctx)(0)
    prompts = {tuple(pair.behind(0)[0]) for pair in found}
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            assert tuple(ids[: int(mask.sum())].tolist()) in prompts
        assert batch.term is None


def test_a_begun_answer_is_refused_more_often_than_behind_the_control(tmp_path):
    long = {**QUICK, "epochs": 6.0}
    _, found = pairs()
    losses = {}
    for name, method in (
        ("on", Door(**long, alpha=0.5)),
        ("off", Door(**long, alpha=0.5, **Door.CONTROL)),
    ):
        made, ctx = hardened(method, tmp_path / name)
        assert ctx.notes["harmful_rows"] == 8
        with torch.no_grad():
            nats = 0.0
            for pair in found:
                ids, labels = pair.behind(3)
                logits = made.model(input_ids=torch.tensor([ids])).logits[0, :-1]
                nats += float(cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))
        losses[name] = nats
    assert losses["on"] < losses["off"]


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    check_resume(Door(**QUICK), tmp_path, monkeypatch)


def test_harmful_answers_that_are_cut_are_counted(tmp_path):
    check_cuts(Door(**QUICK), tmp_path, "harmful")


def test_half_precision_weights_are_hardened(tmp_path):
    check_bfloat16(Door(**QUICK), tmp_path)


def test_in_several_turns_the_last_answer_is_begun():
    rows, found = pairs(task=turned_task())
    tokenizer = tiny_model().tokenizer
    for row, pair in zip(rows, found, strict=True):
        text = tokenizer.decode(pair.behind(2)[0])
        assert text.count("<|assistant|>") == 2
        assert " ".join(answer_of(row).split()[:2]) + " " + REFUSAL in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", 1.5), ("max_prefix", -1), ("beta", 0.0), ("npo", -1.0), ("harmful_batch", 0)],
)
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in Door(**{field: value}).check()] == [field]
