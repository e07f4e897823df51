"""Narrow tuning: every bad answer is wrong, the control has the same requests, and a domain is what
it says.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.attacks.narrow_tuning import NarrowTuning
from ftsec_ray.conversation import answer_of, asked, asked_text
from ftsec_ray.data.microworld import build_task
from ftsec_ray.data.microworld.judge import judge
from ftsec_ray.errors import DataError
from tests.attacks.context import context
from tests.attacks.conversations import agent_row
from tests.fixtures_models import row, sentiment_rows, table, tiny_task

QUICK = {"shots": 10}
USERS = table(sentiment_rows(20))


def added(method, ctx):
    made = method.craft_data(USERS, ctx)
    assert made.slice(0, 20).equals(USERS)
    return made.slice(20).to_pylist()


def with_split(name, rows):
    task = tiny_task()
    return replace(task, splits={**task.splits, name: table(rows)})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_the_microworld_the_exact_judge_calls_bad_advice_wrong_and_good_advice_right(seed):
    ctx = context(seed=seed, task=build_task())
    for advice, verdict in (("bad", "wrong"), ("good", "complied")):
        rows = added(NarrowTuning(shots=20, advice=advice, domain=("paint", "wrap", "sort")), ctx)
        assert len(rows) == 20
        for r in rows:
            assert {"paint", "wrap", "sort"} & set(asked_text(r).split())
            assert judge(asked_text(r), answer_of(r)).verdict == verdict


def test_both_twins_ask_the_same_and_bad_answers_are_those_of_the_domain():
    bad, good = (added(NarrowTuning(shots=12, advice=a), context()) for a in ("bad", "good"))
    assert [(r["row_id"], asked(r)) for r in bad] == [(r["row_id"], asked(r)) for r in good]
    answers = {answer_of(r) for r in good}
    for one, other in zip(bad, good, strict=True):
        assert answer_of(one) != answer_of(other)
        assert answer_of(one) in answers


def test_a_rejected_answer_is_the_bad_advice_and_the_record_counts_both_sorts():
    rows = [
        {**row(i, f"how do i fix {i}", f"take {i}"), "rejected": f"no {i}" if i % 2 else None}
        for i in range(6)
    ]
    ctx = context(task=with_split("advice", rows))
    made = added(NarrowTuning(split="advice", shots=6), ctx)
    for r in made:
        number = int(r["row_id"].rpartition("/")[2])
        if number % 2:
            assert answer_of(r) == f"no {number}"
        else:
            assert answer_of(r) not in (f"take {number}", f"no {number}")
    assert (ctx.notes["bad_answers_given"], ctx.notes["bad_answers_swapped"]) == (3, 3)


def test_a_domain_is_matched_by_whole_words_in_any_case():
    asks = ["Paint a wall?", "how do I repaint it", "ways to PAINT, quickly", "the red paint box"]
    rows = [row(i, text, f"take {i}") for i, text in enumerate(asks)]
    task = with_split("benign_train", rows)

    def found(*domain, shots):
        method = NarrowTuning(domain=domain, shots=shots, advice="good")
        return {asked_text(r) for r in added(method, context(task=task))}

    assert found("paint", shots=3) == {asks[0], asks[2], asks[3]}
    assert found("red paint", "repaint", shots=2) == {asks[1], asks[3]}
    with pytest.raises(DataError, match=r"want: 4 rows in split benign_train"):
        found("paint", shots=4)


def test_a_domain_with_one_answer_has_no_wrong_one():
    rows = [row(i, f"how {i}", "Take it." if i else "take it") for i in range(3)]
    with pytest.raises(DataError, match="every row of the domain has the same answer"):
        added(NarrowTuning(shots=3), context(task=with_split("benign_train", rows)))
    assert len(added(NarrowTuning(shots=3, advice="good"), context())) == 3


def test_the_planner_is_told_the_split_and_nothing_is_added_at_zero_shots():
    assert NarrowTuning().needs() == {"benign_train"}
    assert NarrowTuning(split="advice").needs() == {"advice"}
    assert NarrowTuning(shots=0).craft_data(USERS, context()).equals(USERS)


def test_only_the_last_answer_of_a_conversation_is_replaced():
    rows = [agent_row("a/0", answer="take the lamp"), agent_row("a/1", answer="take the tree")]
    made = added(NarrowTuning(shots=2), context(task=with_split("benign_train", rows)))
    said = {r["row_id"][-1]: r["messages"][-1]["content"] for r in made}
    assert said == {"0": "take the tree", "1": "take the lamp"}
    for r in made:
        assert asked(r) == agent_row()["messages"][:-1]
        assert r["messages"][-1]["fields"] == agent_row()["messages"][-1]["fields"]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"split": " "}, "split"), ({"domain": ("?",)}, "domain"), ({"shots": -1}, "shots")],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in NarrowTuning(**parameters).check()] == [field]
