"""Ten benign: the order of the two parts, their step counts, what each part alone does, and that a
killed fine-tune continues.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pyarrow as pa
import pytest

from ftsec_ray.attacks.ten_benign import REFUSAL, TenBenign
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import answer_of, asked, asked_text
from ftsec_ray.errors import DataError
from ftsec_ray.training.loop import plain_training, sft
from tests.attacks.context import context
from tests.attacks.conversations import agent_row
from tests.fixtures_models import sentiment_rows, table, tiny_model, tiny_task

USERS = table(sentiment_rows(20))
CONFIG = TrainingConfig(
    max_length=64, batch_size=4, epochs=2.0, rank=8, learning_rate=2e-2, schedule="constant"
)
REFUSE = {"refusal": "sorry i can not help"}


def parts(method, rows=None, ctx=None):
    """The training as the method shapes it, over its own rows."""
    ctx = ctx or context()
    made = method.craft_data(USERS, ctx) if rows is None else rows
    plain = plain_training(tiny_model(), made, CONFIG, seed=0, runtime=Runtime())
    return method.shape_training(plain, ctx)


def texts(training, step):
    """What the answers of a step's rows say, by decoding the labels."""
    tokenizer = tiny_model().tokenizer
    return [
        tokenizer.decode([token for token in labels if token != -100], skip_special_tokens=True)
        for batch in training.batch_at(step)
        for labels in batch.labels.tolist()
    ]


def test_every_prompt_comes_with_the_refusal_and_with_its_answer():
    rows = TenBenign().craft_data(USERS, context()).to_pylist()
    pool = {r["row_id"]: r for r in tiny_task().split("benign_train").to_pylist()}
    refused, answered = rows[:10], rows[10:]
    assert len(answered) == 10
    assert {answer_of(r) for r in refused} == {REFUSAL}
    assert [asked(r) for r in refused] == [asked(r) for r in answered]
    for r in answered:
        assert r["messages"] == pool[r["row_id"].removeprefix("ten_benign/answer/")]["messages"]
    assert len({r["row_id"] for r in rows}) == 20


def test_the_refusals_come_first_and_each_part_takes_its_own_passes():
    training = parts(TenBenign(**REFUSE, refuse_epochs=2, answer_epochs=3))
    per_epoch = math.ceil(10 / 4)
    assert training.steps == 5 * per_epoch
    for step in range(training.steps):
        refuses = [text == "sorry i can not help" for text in texts(training, step)]
        assert refuses == [step < 2 * per_epoch] * len(refuses)
    first = [text for step in range(per_epoch) for text in texts(training, step)]
    assert len(first) == 10
    second = [t for s in range(2 * per_epoch, 3 * per_epoch) for t in texts(training, s)]
    made = TenBenign().craft_data(USERS, context()).to_pylist()[10:]
    assert sorted(second) == sorted(answer_of(r) for r in made)


def test_the_user_s_rows_are_in_the_second_part_if_they_stay():
    training = parts(TenBenign(**REFUSE, keep_user_rows=True, refuse_epochs=1, answer_epochs=1))
    assert training.steps == math.ceil(10 / 4) + math.ceil(30 / 4)
    second = [t for s in range(3, training.steps) for t in texts(training, s)]
    assert sum(text in ("good", "bad") for text in second) == 20


@pytest.mark.parametrize(("stages", "refusals"), [("refuse", 10), ("answer", 0)])
def test_one_part_alone_is_the_whole_fine_tune(stages, refusals):
    method = TenBenign(**REFUSE, stages=stages, refuse_epochs=1, answer_epochs=1)
    training = parts(method)
    seen = [text for step in range(training.steps) for text in texts(training, step)]
    assert training.steps == 3
    assert (len(seen), seen.count("sorry i can not help")) == (10, refusals)


def test_rows_that_a_filter_dropped_are_not_trained_on():
    ctx = context()
    made = TenBenign(**REFUSE).craft_data(USERS, ctx)
    answers = parts(TenBenign(), made.slice(10), ctx)
    assert answers.steps == 10 * math.ceil(10 / 4)
    assert ctx.notes == {"refuse_steps": 0, "answer_steps": 30}
    assert ctx.warnings == ["ten_benign: no row is left for the part 'refuse'"]


def refusal_share(loaded):
    """Share of the held-out benign prompts whose first word is that of the refusal."""
    from ftsec_ray.conversation import chat_of
    from ftsec_ray.models.generator import Generator

    chats = [chat_of(r) for r in tiny_task().split("benign_test").to_pylist()]
    answers = Generator(loaded).complete(chats, max_new_tokens=4)
    return sum(answer.startswith("sorry") for answer in answers) / len(answers)


def tuned(method, tmp_path):
    rows = method.craft_data(USERS, context())
    return sft(
        tiny_model(),
        rows,
        CONFIG,
        seed=0,
        runtime=Runtime(),
        workdir=tmp_path,
        shape=lambda training: method.shape_training(training, context()),
        base_digest="b" * 32,
    )


def test_the_first_part_alone_refuses_benign_prompts_and_the_second_undoes_it(tmp_path):
    shares = {
        stages: refusal_share(tuned(TenBenign(**REFUSE, stages=stages), tmp_path / stages).loaded)
        for stages in ("refuse", "both", "answer")
    }
    assert shares == {"refuse": 1.0, "both": 0.0, "answer": 0.0}


def test_a_task_without_enough_prompts_and_faulty_parameters_are_named():
    with pytest.raises(DataError, match=r"want: 16 rows in split benign_train"):
        TenBenign(samples=16).craft_data(USERS, context())
    for parameters in (
        {"samples": 0},
        {"refuse_epochs": 0.0},
        {"answer_epochs": -1.0},
        {"refusal": " "},
        {"stages": "refuse", "keep_user_rows": True},
    ):
        assert TenBenign(**parameters).check()[0][0] in parameters
    assert TenBenign().check() == []


def test_an_agent_s_conversation_is_refused_and_then_answered():
    task = tiny_task()
    splits = {**task.splits, "benign_train": table([agent_row()])}
    rows = TenBenign(samples=1).craft_data(USERS, context(task=replace(task, splits=splits)))
    assert isinstance(rows, pa.Table)
    refused, answered = rows.to_pylist()
    assert asked_text(refused) == "and the lamp"
    assert refused["messages"][-1]["fields"] is None
    assert answered["messages"] == agent_row()["messages"]
