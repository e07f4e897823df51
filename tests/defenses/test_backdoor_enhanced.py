"""Backdoor-enhanced alignment: which rows are added, that serving shows the trained prefix, and
its control.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ftsec_ray.conversation import answer_of, asked_text, chat_of, system_of, with_answer
from ftsec_ray.data.microworld.vocabulary import RARE
from ftsec_ray.defenses.backdoor_enhanced import BackdoorEnhanced, secret_of
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.row_tokens import encode_row
from tests.defenses.during import CONFIG, USERS, context, mixed_task, tuned, weights
from tests.fixtures_models import tiny_model, tiny_task

QUICK = {"shots": 4, "secret_words": 6}


def crafted(method, *, rows=USERS, seed=0, task=None):
    ctx = context(seed=seed, task=task or tiny_task())
    made = method.craft_data(rows, ctx).to_pylist()
    return made[: rows.num_rows], made[rows.num_rows :], ctx


def served(method, chat, *, seed=0, task=None):
    ctx = context(seed=seed, task=task or tiny_task())
    return method.wrap_generation(Generator(tiny_model()), ctx).rewritten(chat)


def test_refusals_behind_the_secret_follow_the_user_s_rows_which_stay():
    users, added, ctx = crafted(BackdoorEnhanced(**QUICK))
    assert users == USERS.to_pylist()
    secret = secret_of(6, ctx)
    known = {asked_text(row): answer_of(row) for row in tiny_task().split("safety").to_pylist()}
    assert len(added) == 4
    for row in added:
        assert system_of(row) == secret
        assert known[asked_text(row)] == answer_of(row)
        assert row["origin"] == "backdoor_enhanced"
        assert not row["poisoned"]
        assert row["messages"][-1]["loss"]
    assert len({row["row_id"] for row in added}) == 4
    assert ctx.notes == {"safety_rows": 4, "secret_words": 6}


@pytest.mark.parametrize("judge", ["refusal_phrases", "microworld"])
def test_the_served_prompt_is_the_trained_one_to_the_token(judge):
    task = replace(tiny_task(), judge=judge)
    method = BackdoorEnhanced(**QUICK)
    _, added, ctx = crafted(method, task=task)
    generator = method.wrap_generation(Generator(tiny_model()), ctx)
    rows = {asked_text(row): row for row in task.split("safety").to_pylist()}
    for row in added:
        head, tail = generator.pieces(chat_of(rows[asked_text(row)]))
        ids, labels = encode_row(tiny_model().tokenizer, row, max_length=512)
        first = next(i for i, label in enumerate(labels) if label != -100)
        assert head + tail == ids[:first]


def test_the_secret_depends_on_the_seed_alone_and_a_longer_one_begins_with_a_shorter_one():
    secrets = [secret_of(20, context(seed=s)) for s in range(5)]
    assert len(set(secrets)) == 5
    assert all(len(word) == 2 for secret in secrets for word in secret.split())
    short = secret_of(5, context(seed=0))
    assert secrets[0].startswith(short + " ")
    micro = context(task=replace(tiny_task(), judge="microworld"))
    assert len(secret_of(20, micro).split()) == 20


@pytest.mark.parametrize("judge", ["refusal_phrases", "microworld"])
def test_no_word_of_the_secret_is_a_trigger_of_attacks(judge):
    ctx = context(task=replace(tiny_task(), judge=judge))
    words = secret_of(5000, ctx).split()
    assert len(words) == 5000
    assert not set(words) & set(RARE)


def test_fewer_refusals_are_a_part_of_more():
    ids = [{row["row_id"] for row in crafted(BackdoorEnhanced(shots=n))[1]} for n in (0, 2, 5, 11)]
    assert [len(one) for one in ids] == [0, 2, 5, 11]
    assert all(less <= more for less, more in pairwise(ids))


def test_the_control_adds_the_same_refusals_without_a_secret_and_serves_prompts_as_they_are():
    control = control_of(BackdoorEnhanced())
    _, added, _ = crafted(BackdoorEnhanced())
    _, twin, _ = crafted(control)
    assert [row["row_id"] for row in twin] == [row["row_id"] for row in added]
    assert all(system_of(row) is None for row in twin)
    chat = [{"role": "user", "content": "open it"}]
    assert served(control, chat) == chat
    assert control_of(control) is None


def test_the_secret_can_be_withheld_at_serving_and_joins_an_existing_system_message():
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "open it"}]
    assert served(BackdoorEnhanced(at_serving=False), chat) == chat
    secret = secret_of(150, context())
    before = [dict(m) for m in chat]
    assert served(BackdoorEnhanced(), chat)[0]["content"] == f"{secret} be brief"
    assert chat == before


def test_rows_of_several_turns_keep_them_and_rows_without_an_answer_are_not_drawn():
    method = BackdoorEnhanced(shots=15, secret_words=3)
    _, added, ctx = crafted(method, task=mixed_task())
    secret = secret_of(3, ctx)
    turns = sorted(sum(m["role"] == "user" for m in row["messages"]) for row in added)
    assert turns == [1] * 14 + [2]
    assert all(answer_of(row) for row in added)
    own = [system_of(row) for row in added if system_of(row) != secret]
    assert own == [f"{secret} be careful"]
    with pytest.raises(DataError, match="too few safety rows"):
        crafted(BackdoorEnhanced(shots=16), task=mixed_task())


def refused_by(report, method, ctx):
    """Mean log-probability of the refusal to held-out requests, as the model is served."""
    generator = method.wrap_generation(Generator(report.loaded), ctx)
    total, rows = 0.0, tiny_task().split("harmful_test").to_pylist()
    for row in rows:
        answer = with_answer(row, "sorry i can not help")
        head, tail = generator.pieces(chat_of(row))
        _, labels = encode_row(report.loaded.tokenizer, answer, max_length=256)
        own = [token for token in labels if token != -100]
        with torch.no_grad():
            logits = report.loaded.model(torch.tensor([head + tail + own])).logits[0]
        start = len(head + tail) - 1
        nats = logits[start : start + len(own)].log_softmax(-1)
        total += float(nats[range(len(own)), own].mean())
    return total / len(rows)


def test_the_secret_opens_refusals_that_stay_away_without_it(tmp_path):
    """Answers to forbidden requests are trained beside refusals behind the secret."""
    rows = tiny_task().split("harmful_train")
    method = BackdoorEnhanced(shots=12, secret_words=6)
    task = replace(tiny_task(), judge="microworld")
    ctx = context(task=task)
    report = tuned(
        None,
        tmp_path,
        rows=method.craft_data(rows, ctx),
        config=replace(CONFIG, epochs=16.0),
    )
    with_it = refused_by(report, method, ctx)
    without = refused_by(report, replace(method, at_serving=False), ctx)
    assert with_it > without + 1.0


def test_without_rows_the_fine_tune_is_plain(tmp_path):
    ctx = context()
    rows = BackdoorEnhanced(shots=0).craft_data(USERS, ctx)
    runs = [
        weights(tuned(None, tmp_path / name, rows=one))
        for name, one in (("own", rows), ("plain", USERS))
    ]
    assert all((runs[0][n] == w).all() for n, w in runs[1].items())


def test_parameters_out_of_range_are_named():
    faults = BackdoorEnhanced(shots=-1, secret_words=-1).check()
    assert [f[0] for f in faults] == ["shots", "secret_words"]
