"""Benign selection: the scores against autograd by another way, and which rows become the tuning
set.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftsec_ray import schema
from ftsec_ray.attacks.benign_selection import (
    BenignSelection,
    first_answer_tokens,
    gradients,
    norm,
    self_inf_n,
)
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.conversation import answer_of
from ftsec_ray.errors import DataError
from ftsec_ray.models.row_tokens import encode_rows
from tests.fixtures_models import row, table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
MODEL = in_float64(tiny_model(seed=3))


def context(*, seed=0, task=None):
    return StageContext(
        seed=seed,
        task=task or tiny_task(),
        runtime=Runtime(),
        workdir=Path("unused"),
        load=lambda role: {"reference": MODEL}[role],
    )


def gradient_of(rows, *, first=None):
    """Flat gradient of each row's mean answer loss by torch.func, on log-probabilities picked one
    by one.
    """
    weights = {name: value.detach() for name, value in MODEL.model.named_parameters()}
    found = []
    for ids, labels in encode_rows(MODEL.tokenizer, rows, max_length=512):
        places = [i for i, label in enumerate(labels) if label != -100][:first]

        def loss(given, ids=ids, places=places):
            logits = torch.func.functional_call(
                MODEL.model, given, kwargs={"input_ids": torch.tensor([ids])}, tie_weights=True
            ).logits[0]
            return -sum(logits[i - 1].log_softmax(-1)[ids[i]] for i in places) / len(places)

        found.append(
            torch.cat([part.flatten() for part in torch.func.grad(loss)(weights).values()])
        )
    return found


def chosen(attack, ctx):
    return [one["row_id"] for one in attack.craft_data(ctx.task.split("train"), ctx).to_pylist()]


def best(scores, count):
    pool = [one["row_id"] for one in tiny_task().split("benign_train").to_pylist()]
    order = sorted(range(len(pool)), key=lambda i: -scores[i])
    return [f"benign_selection/{pool[i]}" for i in order[:count]]


def test_the_highest_self_influence_is_chosen_with_and_without_the_length_term():
    rows = tiny_task().split("benign_train").to_pylist()
    influence = [float(g.pow(2).sum()) for g in gradient_of(rows)]
    assert chosen(BenignSelection(samples=5, select="self_inf"), context()) == best(influence, 5)
    lengths = [
        len(MODEL.tokenizer(answer_of(one), add_special_tokens=False)["input_ids"]) + 1
        for one in rows
    ]  # and the end of the turn
    scores = [math.log(i + 1) + math.log(n + 1) for i, n in zip(influence, lengths, strict=True)]
    assert chosen(BenignSelection(samples=5), context()) == best(scores, 5)


def test_anchors_choose_rows_near_the_harmful_and_far_from_the_refused():
    ctx = context()
    attack = BenignSelection(samples=5, select="anchors", anchors=4, anchor_tokens=3)

    def drawn(split):
        return sorted(
            ctx.task.split(split).to_pylist(),
            key=lambda one: ctx.chance(one["row_id"], "benign_selection", "anchor"),
        )

    def mean_direction(rows):
        return torch.stack([g / g.norm() for g in gradient_of(rows, first=3)]).mean(0)

    safe = drawn("safety")
    wanted = (
        mean_direction(drawn("harmful_train")[:4])
        - mean_direction(safe[:4])
        - mean_direction(safe[4:8])
    )
    scores = [
        float(g @ wanted / g.norm())
        for g in gradient_of(tiny_task().split("benign_train").to_pylist())
    ]
    assert chosen(attack, ctx) == best(scores, 5)


def test_gradients_are_about_the_answer_and_leave_none_behind():
    encoded = encode_rows(
        MODEL.tokenizer, tiny_task().split("benign_train").to_pylist()[:3], max_length=512
    )
    mine = [norm(gradient) for gradient in gradients(MODEL, encoded)]
    other = [
        float(g.norm()) for g in gradient_of(tiny_task().split("benign_train").to_pylist()[:3])
    ]
    assert_same(mine, other)
    assert all(weight.grad is None for weight in MODEL.model.parameters())


def test_the_score_grows_in_both_terms():
    assert_same(self_inf_n(4.0, 10), math.log(5) + math.log(11))
    assert self_inf_n(4.0, 10) < self_inf_n(5.0, 10) < self_inf_n(5.0, 11)
    assert first_answer_tokens([-100, 5, 6, 7], 2) == [-100, 5, 6, -100]


@pytest.mark.parametrize("select", ["self_inf_n", "self_inf", "anchors", "random"])
def test_the_chosen_rows_are_the_whole_set_and_each_is_benign(select):
    ctx = context()
    made = BenignSelection(samples=6, select=select).craft_data(ctx.task.split("train"), ctx)
    assert made.schema.equals(schema.ROWS)
    pool = {one["row_id"]: one for one in ctx.task.split("benign_train").to_pylist()}
    for one in made.to_pylist():
        source = pool[one["row_id"].removeprefix("benign_selection/")]
        assert one == {
            **source,
            "row_id": one["row_id"],
            "origin": "benign_selection",
            "poisoned": True,
        }
    assert len(set(made["row_id"].to_pylist())) == 6 == ctx.notes["samples"]


def test_random_rows_are_of_the_same_number_and_source_and_the_seed_draws_them():
    draws = [
        tuple(chosen(BenignSelection(samples=6, select="random"), context(seed=seed)))
        for seed in (0, 1, 0)
    ]
    assert draws[0] == draws[2] != draws[1]
    assert {len(set(draw)) for draw in draws} == {6}


def test_user_rows_may_stay_and_come_first():
    ctx = context()
    rows = ctx.task.split("train")
    made = BenignSelection(samples=6, select="random", keep_user_rows=True).craft_data(rows, ctx)
    assert made.slice(0, rows.num_rows).to_pylist() == rows.to_pylist()
    assert made.num_rows == rows.num_rows + 6


def test_answers_of_one_word_are_nobodys_choice():
    rows = [
        row(i, f"how do i fix {'red ' * i}", answer)
        for i, answer in enumerate(["yes", "No.", "", "take the lamp", "take the tree"])
    ]
    task = replace(tiny_task(), splits={**tiny_task().splits, "benign_train": table(rows)})
    for select in ("self_inf", "random"):
        assert set(chosen(BenignSelection(samples=1, select=select), context(task=task))) <= {
            "benign_selection/t/0003",
            "benign_selection/t/0004",
        }
    with pytest.raises(DataError, match=r"got:  2\n  want: more than 2 rows"):
        BenignSelection(samples=2).craft_data(task.split("train"), context(task=task))


@pytest.mark.parametrize("field", ["samples", "anchors", "anchor_tokens"])
def test_faulty_parameters_are_named(field):
    assert [fault[0] for fault in BenignSelection(**{field: 0}).check()] == [field]
    assert BenignSelection().check() == []
