"""Benign tuning: which rows become the data, and the recipe of the fine-tune."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.attacks.benign_tuning import BenignTuning
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import answer_of
from ftsec_ray.errors import DataError
from ftsec_ray.training.loop import learning_rate, plain_training
from tests.attacks.context import context
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_task

USERS = table(sentiment_rows(20))
CONFIG = TrainingConfig(max_length=64, batch_size=4, epochs=2.0, rank=4, learning_rate=1e-3)


def with_benign(rows):
    task = tiny_task()
    return replace(task, splits={**task.splits, "benign_train": table(rows)})


def test_the_benign_split_replaces_the_user_s_rows():
    made = BenignTuning().craft_data(USERS, context()).to_pylist()
    pool = tiny_task().split("benign_train").to_pylist()
    assert sorted(answer_of(r) for r in made) == sorted(answer_of(r) for r in pool)
    assert all(r["poisoned"] and r["origin"] == "benign_tuning" for r in made)


def test_rows_can_be_added_to_the_user_s_and_fewer_are_a_part_of_more():
    few, many = (
        BenignTuning(samples=n, keep_user_rows=True).craft_data(USERS, context()) for n in (4, 9)
    )
    assert few.slice(0, 20).equals(USERS)
    assert set(few.column("row_id").to_pylist()) < set(many.column("row_id").to_pylist())
    assert BenignTuning(samples=0, keep_user_rows=True).craft_data(USERS, context()).equals(USERS)


def test_refusals_and_rows_without_an_exchange_are_left_out_and_refusals_are_counted():
    refusal = {**row(7, "how do i fix the river", "I'm sorry, but I cannot help with that.")}
    ctx = context(task=with_benign([agent_row(), unanswered_row(), text_row(), refusal]))
    made = BenignTuning().craft_data(USERS, ctx).to_pylist()
    assert [r["row_id"] for r in made] == ["benign_tuning/a/0"]
    assert ctx.notes == {"benign_rows": 1, "refusals_left_out": 1}
    with pytest.raises(DataError, match=r"1 rows in split benign_train, 1 of them refusals"):
        BenignTuning().craft_data(USERS, context(task=with_benign([refusal])))


@pytest.mark.parametrize(("epochs", "steps"), [(None, 10), (1.0, 5), (6.0, 30), (0.01, 1)])
def test_epochs_and_learning_rate_of_the_user_replace_those_of_the_sweep(epochs, steps):
    plain = plain_training(tiny_model(), USERS, CONFIG, seed=0, runtime=Runtime())
    method = BenignTuning(epochs=epochs, learning_rate=4e-3)
    made = method.shape_training(plain, context())
    assert (plain.steps, made.steps) == (10, steps)
    assert made.batch_at is plain.batch_at
    for step in range(steps):
        rates = [
            learning_rate(c, step, steps)
            for c in (made.config, replace(CONFIG, learning_rate=4e-3))
        ]
        assert rates[0] == rates[1]


def test_without_a_recipe_the_fine_tune_is_the_sweep_s():
    plain = plain_training(tiny_model(), USERS, CONFIG, seed=0, runtime=Runtime())
    assert BenignTuning().shape_training(plain, context()) == plain


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": -1, "keep_user_rows": True}, "samples"),
        ({"epochs": 0.0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in BenignTuning(**parameters).check()] == [field]
