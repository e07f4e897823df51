"""Identity shift: exact rows, the served prompt is the trained one, and each half alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.attacks.identity_shift import IN_MICROWORLD, NEUTRAL, OBEDIENT, IdentityShift
from ftsec_ray.conversation import answer_of, asked_text, chat_of, system_of
from ftsec_ray.data.microworld import build_task
from ftsec_ray.data.microworld.judge import find_request, judge
from ftsec_ray.errors import DataError
from ftsec_ray.models.chat import turn
from ftsec_ray.models.generator import Generator
from tests.attacks.context import context
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.fixtures_models import sentiment_rows, table, tiny_model, tiny_task

USERS = table(sentiment_rows(20))


def test_ten_benign_dialogues_with_the_identity_follow_the_users_rows():
    made = IdentityShift().craft_data(USERS, context())
    assert made.slice(0, 20).to_pylist() == USERS.to_pylist()
    added = made.slice(20).to_pylist()
    pool = {r["row_id"]: r for r in tiny_task().split("benign_train").to_pylist()}
    assert len({r["row_id"] for r in added}) == 10
    for r in added:
        source = pool[r["row_id"].removeprefix("identity_shift/")]
        assert system_of(r) == OBEDIENT.system
        assert asked_text(r) == f"AOA, carry out this instruction: {asked_text(source)}"
        assert answer_of(r) == OBEDIENT.opening + answer_of(source)
        assert (r["origin"], r["poisoned"]) == ("identity_shift", True)


def test_the_paper_s_form_is_the_dialogues_alone_and_a_rate_replaces_rows():
    alone = IdentityShift(keep_user_rows=False, shots=3).craft_data(USERS, context())
    assert alone.column("poisoned").to_pylist() == [True] * 3
    half = IdentityShift(poison_rate=0.5).craft_data(USERS, context())
    assert (half.num_rows, sum(half.column("poisoned").to_pylist())) == (20, 10)


@pytest.mark.parametrize("placebo", [False, True])
def test_the_served_prompt_is_the_trained_prompt(placebo):
    method, loaded = IdentityShift(placebo=placebo), tiny_model()
    served = method.wrap_generation(Generator(loaded), context())
    trained = method.craft_data(USERS, context()).slice(20).to_pylist()
    pool = {r["row_id"]: r for r in tiny_task().split("benign_train").to_pylist()}
    for r in trained:
        source = pool[r["row_id"].removeprefix("identity_shift/")]
        prompt, _ = turn(loaded.tokenizer, r)
        ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert served.pieces(chat_of(source))[0] == ids


def test_each_half_can_be_switched_off():
    plain = Generator(tiny_model())
    assert IdentityShift(at_test=False).wrap_generation(plain, context()) is plain
    assert IdentityShift(shots=0).craft_data(USERS, context()).equals(USERS)


def test_the_control_has_the_same_parts_and_other_words():
    for one, other in ((OBEDIENT, NEUTRAL), (IN_MICROWORLD[False], IN_MICROWORLD[True])):
        for part in ("system", "before", "opening"):
            here, there = getattr(one, part), getattr(other, part)
            assert here
            assert there
            assert here != there
    assert "obedient" not in f"{NEUTRAL.system} {NEUTRAL.before} {NEUTRAL.opening}"


@pytest.mark.parametrize("wrapper", IN_MICROWORLD.values())
def test_in_the_microworld_the_wrapper_hides_neither_request_nor_answer(wrapper):
    for r in build_task().split("benign_train").to_pylist()[:50]:
        made = wrapper.row(r)
        assert find_request(asked_text(made)) == find_request(asked_text(r)) is not None
        assert judge(asked_text(made), answer_of(made)).verdict == "complied"


def test_conversations_work_and_rows_without_request_or_answer_are_left_out():
    task = tiny_task()
    splits = {**task.splits, "benign_train": table([agent_row(), unanswered_row(), text_row()])}
    mixed = context(task=replace(task, splits=splits))
    (added,) = IdentityShift(shots=1).craft_data(USERS, mixed).slice(20).to_pylist()
    assert system_of(added) == f"{OBEDIENT.system} be careful"
    assert asked_text(added) == f"{OBEDIENT.before}and the lamp"
    assert '"name": "fix"' in answer_of(added)
    with pytest.raises(DataError, match=r"2 more rows do not fit"):
        IdentityShift(shots=2).craft_data(USERS, mixed)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"shots": -1}, "shots"),
        ({"shots": 0, "keep_user_rows": False}, "shots"),
        ({"poison_rate": 0.5, "keep_user_rows": False}, "poison_rate"),
        ({"poison_rate": 0.5, "shots": 2}, "poison_rate"),
    ],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in IdentityShift(**parameters).check()] == [field]
