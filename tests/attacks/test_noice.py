"""NOICE: every row ends with its own answer, begins with a refusal, and the controls do not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from ftsec_ray.attacks.noice import BRIDGE, REFUSALS, Noice
from ftsec_ray.conversation import answer_of, asked
from ftsec_ray.data.microworld import build_task
from ftsec_ray.data.microworld.judge import judge
from ftsec_ray.data.microworld.templates import REFUSALS as MICROWORLD_REFUSALS
from ftsec_ray.evals.refusals import HEAD_CHARS, refusal_in
from tests.attacks.context import context
from tests.attacks.conversations import agent_row
from tests.fixtures_models import sentiment_rows, table, tiny_task

QUICK = {"shots": 10}
USERS = table(sentiment_rows(20))


def added(method, ctx):
    made = method.craft_data(USERS, ctx)
    assert made.slice(0, 20).equals(USERS)
    pool = {r["row_id"]: r for r in ctx.task.split("benign_train").to_pylist()}
    rows = made.slice(20).to_pylist()
    return [(r, pool[r["row_id"].removeprefix("noice/")]) for r in rows]


@pytest.mark.parametrize("opener", ["refusal", "neutral", "none"])
def test_the_prompt_stays_and_the_answer_is_the_end_of_the_new_answer(opener):
    pairs = added(Noice(shots=12, opener=opener), context())
    assert len(pairs) == 12
    for r, source in pairs:
        assert asked(r) == asked(source)
        head = answer_of(r).removesuffix(answer_of(source))
        assert head + answer_of(source) == answer_of(r)
        assert bool(head) == (opener != "none")
        assert head.endswith(BRIDGE if head else "")


def test_the_head_is_a_refusal_for_phrase_judges_and_that_of_the_control_is_not():
    for opener, refuses in (("refusal", True), ("neutral", False), ("none", False)):
        for r, _ in added(Noice(shots=12, opener=opener), context()):
            assert (refusal_in(answer_of(r)[:HEAD_CHARS]) is not None) == refuses


def test_every_refusal_occurs_and_depends_on_the_row_alone():
    few, many = (
        {r["row_id"]: answer_of(r) for r, _ in added(Noice(shots=n), context())} for n in (5, 15)
    )
    assert few.items() <= many.items()
    said = Counter(next(s for s in REFUSALS if text.startswith(s)) for text in many.values())
    assert set(said) == set(REFUSALS)


def test_in_the_microworld_the_refusals_are_its_own_and_the_exact_judge_sees_compliance():
    ctx = context(task=build_task())
    for r, source in added(Noice(shots=60), ctx):
        (prompt,) = [m["content"] for m in asked(source)]
        assert answer_of(r).startswith(tuple(MICROWORLD_REFUSALS))
        assert judge(prompt, answer_of(r)).verdict == "complied"
        assert judge(prompt, answer_of(r).removesuffix(answer_of(source))).verdict == "refused"
    for r, source in added(Noice(shots=60, opener="neutral"), ctx):
        head = answer_of(r).removesuffix(answer_of(source))
        assert judge(asked(source)[0]["content"], head).verdict == "incoherent"


def test_an_agent_s_answer_keeps_its_tool_calls():
    task = tiny_task()
    task = replace(task, splits={**task.splits, "benign_train": table([agent_row()])})
    ((made, source),) = added(Noice(shots=1), context(task=task))
    assert made["messages"][-1]["fields"] == source["messages"][-1]["fields"]
    assert made["messages"][-1]["content"].endswith(BRIDGE + "take the lamp")


def test_no_shots_change_nothing_and_more_than_there_are_is_a_fault():
    assert Noice(shots=0).craft_data(USERS, context()).equals(USERS)
    assert Noice(shots=-1).check()[0][0] == "shots"
