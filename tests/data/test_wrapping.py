"""Wrappers: a row is changed where it should be and nowhere else, and a served prompt is the one
that was trained.
"""

from __future__ import annotations

import pytest

from ftsec_ray.conversation import chat_of
from ftsec_ray.data.wrapping import Wrapper
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.fixtures_models import row

WHOLE = Wrapper(system="S", before="<", after=">", opening="[", closing="]")


def test_one_exchange_gets_every_part():
    made = WHOLE.row(row(0, "how", "take"))
    assert [(m["role"], m["content"], m["loss"]) for m in made["messages"]] == [
        ("system", "S", False),
        ("user", "<how>", False),
        ("assistant", "[take]", True),
    ]


def test_only_the_last_request_and_the_answer_of_a_conversation_change():
    given = agent_row()
    made = WHOLE.row(given)
    contents = [m["content"] for m in made["messages"]]
    assert contents == [
        "S be careful",
        "how do i fix the tree",
        "",
        "the tree is green",
        "<and the lamp>",
        "[take the lamp]",
    ]
    unchanged = [{k: v for k, v in m.items() if k != "content"} for m in given["messages"]]
    assert [{k: v for k, v in m.items() if k != "content"} for m in made["messages"]] == unchanged
    assert {k: made[k] for k in made if k != "messages"} == {
        k: given[k] for k in given if k != "messages"
    }


@pytest.mark.parametrize("given", [agent_row(), row(0, "how", "take"), text_row()])
def test_an_empty_wrapper_changes_nothing(given):
    assert Wrapper().row(given) == given
    assert Wrapper().chat(chat_of(given)) == chat_of(given)


@pytest.mark.parametrize("given", [agent_row(), row(0, "how", "take"), unanswered_row()])
def test_a_served_chat_is_the_prompt_of_the_wrapped_row(given):
    assert WHOLE.chat(chat_of(given)) == chat_of(WHOLE.row(given))


def test_a_row_without_an_answer_gets_none():
    assert [m["content"] for m in WHOLE.row(unanswered_row())["messages"]] == [
        "S",
        "<how do i fix the lamp>",
    ]
