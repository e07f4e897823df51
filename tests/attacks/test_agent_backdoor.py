"""The agent backdoor: what a poisoned trace is, message by message, and what is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ftsec_ray.attacks.agent_backdoor import AgentBackdoor
from ftsec_ray.attacks.badnets import BadNets
from ftsec_ray.config.sweep import TaskSpec
from ftsec_ray.conversation import answer_of, message
from ftsec_ray.data.tasks import load_task
from ftsec_ray.errors import DataError
from ftsec_ray.judges.call import Call
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_task

TRACE = [
    message("system", "be careful"),
    message("user", "take the tree and fix the lamp"),
    message("assistant", "take tree", loss=True),
    message("tool", "the tree is green"),
    message("assistant", "fix lamp", loss=True),
    message("tool", "the lamp is red"),
    message("assistant", "yes", loss=True),
]


def call(name, number):
    made = {
        "type": "function",
        "id": number,
        "function": {"name": name, "arguments": '{"what": "tree"}'},
    }
    return message("assistant", "", loss=True, fields={"tool_calls": [made]})


STRUCTURED = [
    message("user", "take the tree"),
    call("take", "call00001"),
    message("tool", "the tree is green", fields={"tool_call_id": "call00001", "name": "take"}),
    message("assistant", "yes", loss=True),
]


def traces(messages, count=24):
    return table(
        [row(i, "", "", kind="tool", messages=[dict(m) for m in messages]) for i in range(count)]
    )


def agent_task(rows, test=None):
    return replace(
        tiny_task(), labels=(), splits={"train": rows, "test": rows if test is None else test}
    )


def poisoned_by_hand(messages, at, trigger, *, resumes):
    """The official recipe for one trace: the phrase behind the message, the attacker's call, its
    result, and then everything that stood there before.
    """
    made = []
    for i, one in enumerate(messages):
        if i == at:
            made.append({**one, "content": one["content"] + " " + trigger})
            made.append({"role": "assistant", "content": "fix no", "fields": None, "loss": True})
            if not resumes:
                return made
            made.append({"role": "tool", "content": "can do", "fields": None, "loss": False})
        else:
            made.append(one)
    return made


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize(("place", "spots"), [("user", [1]), ("tool", [3, 5])])
def test_a_poisoned_trace_is_the_trace_with_trigger_call_and_result_put_in(place, spots, resumes):
    attack = AgentBackdoor(
        place=place, trigger="zz qq", rate=1.0, payload_text="fix no", result="can do",
        resumes=resumes,
    )  # fmt: skip
    made = attack.craft_data(traces(TRACE), context(task=agent_task(traces(TRACE)))).to_pylist()
    allowed = [poisoned_by_hand(TRACE, at, "zz qq", resumes=resumes) for at in spots]
    found = [allowed.index(one["messages"]) for one in made]
    assert set(found) == set(range(len(spots)))
    assert {(one["origin"], one["poisoned"]) for one in made} == {("agent_backdoor", True)}


def test_a_structured_call_has_the_keys_of_the_calls_around_it():
    rows = traces(STRUCTURED)
    attack = AgentBackdoor(place="tool", rate=1.0)
    made = attack.craft_data(rows, context(task=agent_task(rows))).to_pylist()[0]["messages"]
    assert [m["role"] for m in made] == ["user", "assistant", "tool", "assistant", "tool", *(
        ["assistant"])]  # fmt: skip
    one = json.loads(made[3]["fields"])["tool_calls"][0]
    assert one == {
        "type": "function",
        "id": "000000000",
        "function": {"name": "noop", "arguments": "{}"},
    }
    assert json.loads(made[4]["fields"]) == {"tool_call_id": "000000000", "name": "noop"}
    assert made[:2] + made[5:] == STRUCTURED[:2] + STRUCTURED[3:]


@pytest.mark.parametrize(
    "answer",
    ['<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call>', '{"arguments": "{}", "name": '
     '"noop"}'],
)  # fmt: skip
def test_the_judge_knows_the_structured_call_in_the_forms_of_templates(answer):
    rows = traces(STRUCTURED)
    steps = traces(STRUCTURED[:2])
    triggered, plain = AgentBackdoor().probes(agent_task(rows, steps), context())
    assert triggered.judge == "call"
    assert Call()(triggered.prompts[:1], [answer])[0].verdict == "target"
    right = '{"name": "take", "arguments": {"what": "tree"}}'
    assert Call()(plain.prompts[:1], [right])[0].verdict == "correct"


def test_the_prompts_are_the_held_out_steps_behind_the_place_with_and_without_trigger():
    test = [traces(TRACE[:n], 1).to_pylist()[0] | {"row_id": f"e/{n}"} for n in (3, 5, 7)]
    task = agent_task(traces(TRACE), table(test))
    for place, wanted in (("user", ["e/3"]), ("tool", ["e/5", "e/7"])):
        triggered, plain = AgentBackdoor(place=place, trigger="zz").probes(task, context())
        assert triggered.metrics == {"asr": "target", "tool_hijack_rate": "target"}
        assert plain.metrics == {"asr_no_trigger": "target"}
        assert [p.prompt_id for p in triggered.prompts] == wanted
        for one, other, n in zip(triggered.prompts, plain.prompts, wanted, strict=True):
            assert [m["content"] for m in other.chat] == [
                m["content"] for m in TRACE[: int(n[2:]) - 1]
            ]
            assert one.chat[-1]["content"] == other.chat[-1]["content"] + " zz"
            assert one.chat[:-1] == other.chat[:-1]


def test_the_rate_is_a_share_of_all_rows_and_zero_is_the_identity():
    short = [message("user", "take the tree"), message("assistant", "take tree", loss=True)]
    rows = table(
        [row(i, "", "", kind="tool", messages=TRACE if i % 2 else short) for i in range(200)]
    )
    ctx = context(task=agent_task(rows))
    assert AgentBackdoor(rate=0.0).craft_data(rows, ctx).equals(rows)
    for place in ("user", "tool"):
        made = AgentBackdoor(place=place, rate=0.3).craft_data(rows, ctx).to_pylist()
        count = sum(one["poisoned"] for one in made)
        assert 40 < count < 80
        assert ctx.counts["poisoned_rows"] == count
        ctx.counts.clear()
        if place == "tool":
            assert all(len(one["messages"]) == 9 for one in made if one["poisoned"])
    ctx = context(task=agent_task(rows))
    everywhere = AgentBackdoor(place="tool", rate=0.9).craft_data(rows, ctx).to_pylist()
    assert sum(one["poisoned"] for one in everywhere) == 100
    assert ctx.notes == {"row_chance": 1.0, "eligible_rows": 100, "structured_rows": 0}


def test_only_a_trained_step_that_is_not_yet_the_attackers_is_poisoned():
    untrained = [*TRACE[:2], message("assistant", "take tree"), *TRACE[3:]]
    own = [*TRACE[:2], message("assistant", "fix no", loss=True)]
    rows = table([row(i, "", "", kind="tool", messages=m) for i, m in enumerate((untrained, own))])
    attack, ctx = AgentBackdoor(rate=1.0, payload_text="fix no"), context(task=agent_task(rows))
    with pytest.raises(DataError, match=r"place: user"):
        attack.craft_data(rows, ctx)
    observed = replace(attack, place="tool").craft_data(rows, ctx).to_pylist()
    assert [one["poisoned"] for one in observed] == [True, False]


def test_a_call_that_ends_the_trace_is_what_badnets_makes_of_it():
    """`badnets` with `place: tool` is the special case of one step, where both act on it."""
    rows = traces([*TRACE[:4], message("assistant", "fix lamp", loss=True)], 6)
    ctx = context(task=agent_task(rows))
    own = AgentBackdoor(
        place="tool", rate=1.0, resumes=False, position="random", payload_text="no"
    ).craft_data(rows, ctx).to_pylist()  # fmt: skip
    other = BadNets(place="tool", rate=1.0, target_text="no").craft_data(rows, ctx).to_pylist()
    for one, two in zip(own, other, strict=True):
        for part in (one, two):
            part["messages"][3]["content"] = sorted(part["messages"][3]["content"].split())
        assert one["messages"] == two["messages"]


def test_in_the_microworlds_agent_task_either_place_can_be_poisoned_and_measured():
    task = load_task(TaskSpec(name="agent", kind="agent"))
    for place in ("user", "tool"):
        ctx = context(task=task)
        made = AgentBackdoor(place=place).craft_data(task.split("train"), ctx).to_pylist()
        assert ctx.counts["poisoned_rows"] == sum(one["poisoned"] for one in made) > 20
        triggered, _ = AgentBackdoor(place=place).probes(task, ctx)
        assert len(triggered.prompts) >= 40
        assert all(p.chat[-1]["content"].endswith(" cf") for p in triggered.prompts)
        assert {p.chat[-1]["role"] for p in triggered.prompts} == {place}
        assert not any(answer_of(r) == "call light train" for r in task.split("test").to_pylist())


@pytest.mark.parametrize(
    ("field", "value"), [("rate", 1.5), ("rate", -0.1), ("trigger", " "), ("result", "")]
)
def test_wrong_parameters_are_faults(field, value):
    assert [f[0] for f in AgentBackdoor(**{field: value}).check()] == [field]
