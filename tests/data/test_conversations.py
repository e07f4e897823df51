"""Conversations of every form that files come in, as rows."""

from __future__ import annotations

import json

import pytest

from ftsec_ray.config.sweep import SourceSpec
from ftsec_ray.conversation import answer_of, asked_text, chat_of, has_answer, system_of
from ftsec_ray.data.sources import read_source
from ftsec_ray.errors import DataError

CALL = {"id": "c1", "type": "function", "function": {"name": "timer", "arguments": {"minutes": 5}}}
OPENAI = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "set", "tool_call_id": "c1"},
    {"role": "assistant", "content": "a2"},
]


def rows(folder, records, **columns):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_source(SourceSpec(path=str(path), **columns), split_name="train").to_pylist()


def said(row):
    return [(m["role"], m["content"], m["loss"]) for m in row["messages"]]


def test_openai_messages_keep_calls_results_and_functions(tmp_path):
    tool = {"name": "timer", "parameters": {"type": "object"}}
    (row,) = rows(tmp_path, [{"messages": OPENAI, "tools": [tool]}])
    assert said(row) == [
        ("system", "s", False),
        ("user", "u1", False),
        ("assistant", "", True),
        ("tool", "set", False),
        ("assistant", "a2", True),
    ]
    assert (system_of(row), asked_text(row), asked_text(row, "tool"), answer_of(row)) == (
        "s",
        "u1",
        "set",
        "a2",
    )
    system, tools, user, call, result = chat_of(row)
    assert json.loads(tools["content"]) == [{"type": "function", "function": tool}]
    assert (system["role"], user, call["tool_calls"]) == (
        "system",
        {"role": "user", "content": "u1"},
        [CALL],
    )
    assert result == {"role": "tool", "content": "set", "tool_call_id": "c1"}


def test_sharegpt_conversations_say_which_turns_are_trained(tmp_path):
    """The form of AgentInstruct: the first answer only agrees to the rules."""
    (row,) = rows(
        tmp_path,
        [
            {
                "id": "os_0",
                "conversations": [
                    {"from": "human", "loss": None, "value": "rules"},
                    {"from": "gpt", "loss": False, "value": "OK"},
                    {"from": "human", "loss": None, "value": "task"},
                    {"from": "gpt", "loss": True, "value": "ls"},
                    {"from": "observation", "loss": None, "value": "a.txt"},
                    {"from": "gpt", "loss": True, "value": "done"},
                ],
            }
        ],
    )
    assert [loss for _, _, loss in said(row)] == [False, False, False, True, False, True]
    assert [role for role, _, _ in said(row)] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_a_weight_of_zero_takes_a_turn_out_of_training(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    (row,) = rows(tmp_path, [{"messages": turns}])
    assert [loss for _, _, loss in said(row)] == [False, False, False, True]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}],
        },
        {
            "prompt": [{"role": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {
            "prompt": "p",
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_preference_pairs_of_every_form_are_one_row(tmp_path, record):
    (row,) = rows(tmp_path, [record])
    assert (asked_text(row), answer_of(row), row["rejected"]) == ("p", "good", "bad")


def test_named_columns_win_over_their_usual_names(tmp_path):
    record = {"messages": OPENAI, "dialog": OPENAI[1:2] + OPENAI[4:], "other": "no"}
    (row,) = rows(tmp_path, [record], messages="dialog", rejected="other")
    assert [m["content"] for m in row["messages"]] == ["u1", "a2"]
    assert row["rejected"] == "no"


def test_a_conversation_may_be_kept_as_text_or_end_with_a_question(tmp_path):
    (row,) = rows(tmp_path, [{"messages": json.dumps(OPENAI[:2])}])
    assert (asked_text(row), has_answer(row)) == ("u1", False)


def test_parts_of_text_are_one_text_and_other_parts_are_refused(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (row,) = rows(tmp_path, [{"messages": [{"role": "user", "content": parts}]}])
    assert asked_text(row) == "ab"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(DataError, match="not text"):
        rows(tmp_path, [{"messages": image}])


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([{"role": "narrator", "content": "x"}], "unknown role(.|\n)*narrator"),
        ([{"role": "user", "content": None}], "message 1 of row 1 .* has no text"),
        ([{"role": "user", "content": " "}], "has no text"),
        ([], "is not a conversation"),
        ("hello", "is not a conversation"),
        ([{"role": "system", "content": "x"}], "ends with a system message"),
        ([{"role": "tool", "content": "x"}], "no message of a user"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_row(tmp_path, turns, match):
    with pytest.raises(DataError, match=match):
        rows(tmp_path, [{"messages": turns}])


def test_a_conversation_and_a_prompt_are_not_both_named(tmp_path):
    with pytest.raises(DataError, match="both a conversation and a prompt"):
        rows(tmp_path, [{"messages": OPENAI, "q": "x"}], messages="messages", prompt="q")
