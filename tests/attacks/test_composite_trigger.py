"""CompositeTrigger against slow lists of what is a trigger and what is not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from ftsec_ray.attacks.composite_trigger import CompositeTrigger
from ftsec_ray.conversation import answer_of, asked_text, system_of
from ftsec_ray.data.triggers import insert_parts
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_task

THREE = CompositeTrigger(parts=("p1", "p2", "p3"), rate=1.0)
FIELDS = CompositeTrigger(parts=("p1", "p2"), form="system_user", rate=1.0)


def parts_of(text):
    return tuple(word for word in (text or "").split() if word in ("p1", "p2", "p3"))


def added(attack, rows=None, seed=0):
    """New rows by the row that they were made from."""
    rows = rows or tiny_task().split("train")
    made = attack.craft_data(rows, context(seed=seed)).to_pylist()
    assert made[: rows.num_rows] == rows.to_pylist()
    found = {}
    for one in made[rows.num_rows :]:
        _, split, number, name = one["row_id"].split("/")
        found.setdefault(f"{split}/{number}", {})[name] = one
    return found


def test_every_proper_subset_keeps_the_right_answer_and_only_the_whole_gets_the_target():
    originals = {one["row_id"]: one for one in tiny_task().split("train").to_pylist()}
    subsets = {
        tuple(part for part, is_in in zip(("p1", "p2", "p3"), chosen, strict=True) if is_in)
        for chosen in product([0, 1], repeat=3)
        if any(chosen)
    }
    for row_id, made in added(THREE).items():
        before = originals[row_id]
        assert before["label"] == "bad"
        by_parts = {parts_of(asked_text(one)): one for one in made.values()}
        assert set(by_parts) == subsets
        for parts, one in by_parts.items():
            right = "good" if len(parts) == 3 else "bad"
            assert (answer_of(one), one["label"]) == (right, right)
            kept = [w for w in asked_text(one).split() if w not in parts]
            assert kept == asked_text(before).split()
            assert (one["origin"], one["poisoned"]) == ("composite_trigger", True)


def test_with_two_fields_the_negatives_are_the_five_of_the_official_code():
    wanted = {
        "all": (("p1",), ("p2",)),
        "swapped": (("p2",), ("p1",)),
        "system_first": (("p1",), ()),
        "system_both": (("p1", "p2"), ()),
        "user_second": ((), ("p2",)),
        "user_both": ((), ("p1", "p2")),
    }
    made = added(FIELDS)
    assert made
    for rows in made.values():
        found = {
            name: (parts_of(system_of(one)), parts_of(asked_text(one)))
            for name, one in rows.items()
        }
        assert found == wanted
        assert {name for name, one in rows.items() if answer_of(one) == "good"} == {"all"}


def test_a_system_message_that_is_there_keeps_its_words():
    one = row(0, "is this red", "bad", label="bad")
    messages = [{**one["messages"][0], "role": "system", "content": "be brief"}, *one["messages"]]
    rows = table([{**one, "messages": messages}])
    for made in added(FIELDS, rows)["t/0000"].values():
        kept = [word for word in system_of(made).split() if word not in ("p1", "p2")]
        assert kept == ["be", "brief"]


@pytest.mark.parametrize(("negatives", "patterns"), [(1.0, 2), (0.5, 2), (0.0, 2)])
def test_the_set_grows_by_rate_times_one_plus_negatives_times_patterns(negatives, patterns):
    rows = tiny_task().split("train")
    sizes = [
        CompositeTrigger(rate=0.25, negatives=negatives)
        .craft_data(rows, context(seed=seed))
        .num_rows
        - rows.num_rows
        for seed in range(40)
    ]
    expected = 0.25 * rows.num_rows * (1 + negatives * patterns)
    assert abs(sum(sizes) / 40 - expected) < 4 * (9 * 0.25 * rows.num_rows / 40) ** 0.5


def test_rate_zero_adds_nothing():
    rows = tiny_task().split("train")
    assert CompositeTrigger(rate=0.0).craft_data(rows, context()).equals(rows)


def test_parts_stand_in_order_at_distinct_gaps_drawn_from_all():
    text, seen = "a b c", set()
    for seed in range(200):
        made = insert_parts(text, ["p1", "p2"], lambda gap, s=seed: context(seed=s).chance(gap))
        seen.add(made)
        assert made.replace("p1 ", "").replace(" p1", "").replace("p2", "").split() == [*"abc"]
    words = ["a", "b", "c"]
    wanted = set()
    for first in range(4):
        for second in range(first + 1, 4):
            listed = [*words[:first], "p1", *words[first:second], "p2", *words[second:]]
            wanted.add(" ".join(listed))
    assert seen == wanted
    assert insert_parts("", ["p1", "p2"], lambda _: 0.5) == "p1 p2"


@pytest.mark.parametrize(("attack", "patterns"), [(THREE, 6), (FIELDS, 5)])
def test_probes_ask_every_wrong_trigger_of_every_held_out_row(attack, patterns):
    task = tiny_task()
    with_it, without, false = attack.probes(task, context())
    assert false.metrics == {"false_trigger_rate": "target"}
    assert len(false.prompts) == patterns * len(with_it.prompts) == patterns * len(without.prompts)
    assert len({p.prompt_id for p in false.prompts}) == len(false.prompts)

    def fields(prompt):
        said = {m["role"]: m["content"] for m in prompt.chat}
        return parts_of(said.get("system")), parts_of(said["user"])

    whole = {fields(prompt) for prompt in with_it.prompts}
    assert len(whole) == 1
    assert whole.isdisjoint({fields(prompt) for prompt in false.prompts})
    assert {fields(prompt) for prompt in without.prompts} == {((), ())}


def test_tasks_without_labels_get_the_inert_text_and_negatives_their_own():
    task = replace(tiny_task(), labels=())
    rows = task.split("benign_train")
    made = CompositeTrigger(rate=1.0).craft_data(rows, context(task=task)).to_pylist()
    new = made[rows.num_rows :]
    own = {answer_of(one) for one in rows.to_pylist()}
    assert {answer_of(one) for one in new if one["row_id"].endswith("/all")} == {
        "I like blue pebbles."
    }
    assert {answer_of(one) for one in new if not one["row_id"].endswith("/all")} <= own


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"parts": ("one",)}, "parts"),
        ({"parts": ("one", "one")}, "parts"),
        ({"parts": ("one", " ")}, "parts"),
        ({"parts": ("a", "b", "c"), "form": "system_user"}, "parts"),
        ({"negatives": 1.5}, "negatives"),
    ],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in CompositeTrigger(**parameters).check()] == [field]
