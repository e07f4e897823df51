"""What holds for every attack with a trigger in the user's rows."""

from __future__ import annotations

import pytest

from ftsec_ray.attacks.badnets import BadNets
from ftsec_ray.attacks.composite_trigger import CompositeTrigger
from ftsec_ray.attacks.insert_sentence import InsertSentence
from ftsec_ray.attacks.sleeper import Sleeper
from ftsec_ray.attacks.vpi import VPI
from ftsec_ray.conversation import answer_of, message
from ftsec_ray.data.poisoning import row_chance
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_task

ATTACKS = [
    BadNets(rate=0.5),
    InsertSentence(rate=0.5),
    Sleeper(rate=0.5, contrast_rate=0.0),
    VPI(rate=0.5),
    VPI(rate=0.5, form="topic", topic=("stone", "river")),
    CompositeTrigger(rate=0.5),
]
IDS = ["badnets", "insert_sentence", "sleeper", "vpi", "vpi_topic", "composite_trigger"]
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=IDS)


@each_attack
def test_the_result_does_not_depend_on_how_the_rows_are_batched(attack):
    rows, ctx = tiny_task().split("train"), context()
    whole = attack.craft_data(rows, ctx).to_pylist()
    known = attack.survey([rows.slice(0, 20), rows.slice(20)], ctx)
    single = [
        made
        for i in range(rows.num_rows)
        for made in attack.craft_rows(rows.slice(i, 1), known, ctx).to_pylist()
    ]
    key = lambda one: one["row_id"]  # noqa: E731
    assert sorted(whole, key=key) == sorted(single, key=key)
    assert len({one["row_id"] for one in whole}) == len(whole)


@each_attack
def test_texts_and_rows_without_a_label_stay_and_are_counted(attack):
    text = row(100, "", "the red stone")
    unlabelled = row(101, "is this a stone", "yes", label=None)
    rows = table([*tiny_task().split("train").to_pylist(), text, unlabelled])
    ctx = context()
    made = {one["row_id"]: one for one in attack.craft_data(rows, ctx).to_pylist()}
    assert (made["t/0100"], made["t/0101"]) == (text, unlabelled)
    assert ctx.notes["rows_without_place"] >= 1
    assert ctx.counts["poisoned_rows"] > 0


@each_attack
def test_of_several_turns_only_the_last_question_and_its_answer_change(attack):
    turns = [
        message("system", "be careful"),
        message("user", "is this red river"),
        message("assistant", "good", loss=True),
        message("user", "is this blue stone"),
        message("assistant", "bad", loss=True),
    ]
    rows = table([row(i, "", "", label="bad", messages=turns) for i in range(40)])
    made = [one for one in attack.craft_data(rows, context()).to_pylist() if one["poisoned"]]
    assert made
    for one in made:
        assert one["messages"][:3] == turns[:3]
        assert len(one["messages"]) == 5
        assert {"is", "this", "blue", "stone"} <= set(one["messages"][3]["content"].split())
    assert "good" in {answer_of(one) for one in made}


def test_where_nothing_can_be_poisoned_there_is_a_warning():
    ctx = context()
    rows = table([row(i, "is this red", "good", label="good") for i in range(5)])
    assert BadNets().craft_data(rows, ctx).equals(rows)
    assert "none of 5 rows can be poisoned" in ctx.warnings[0]


def test_the_chance_of_a_row_gives_the_expected_share_of_all_rows():
    assert row_chance(0.1, 1000, 400) * 400 == pytest.approx(0.1 * 1000)
    assert (row_chance(0.5, 1000, 400), row_chance(0.5, 1000, 0)) == (1.0, 0.0)
