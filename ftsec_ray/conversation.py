"""Rows as conversations: what a row asks, what it answers, and how a method changes either.

A row holds `messages` (role, content, fields, loss). What it *asks* is everything before its
answer; its *answer* is the last message where that is the assistant's. A row of plain text is a
single message of the assistant. Nothing here knows a template: models.chat renders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftsec_ray.context import Chat
from ftsec_ray.errors import DataError

Row = Mapping[str, Any]
"""One row of schema.ROWS as a mapping."""
Message = dict[str, Any]
"""One message of a row: role, content, fields (JSON of further keys that templates read, or null)
and loss (whether the message is trained on).
"""
ROLES = ("system", "user", "assistant", "tool")
TOOLS = "tools"
"""Role of the pseudo-message in a Chat that holds the functions on offer, as a JSON list."""


def message(
    role: str, content: str, *, loss: bool = False, fields: Mapping[str, Any] | None = None
) -> Message:
    """One message of a row."""
    extra = json.dumps(dict(fields), sort_keys=True, ensure_ascii=False) if fields else None
    return {"role": role, "content": content, "fields": extra, "loss": loss}


def exchange(prompt: str, response: str, *, system: str | None = None) -> list[Message]:
    """One question and its answer; without a prompt a plain text, without a response a question."""
    said = [message("assistant", response, loss=True)] if response or not prompt else []
    if not prompt:
        return said
    first = [] if system is None else [message("system", system)]
    return [*first, message("user", prompt), *said]


def is_text(row: Row) -> bool:
    """Whether a row is plain text and no conversation."""
    messages = row["messages"]
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def has_answer(row: Row) -> bool:
    """Whether a row ends with a message of the assistant."""
    return bool(row["messages"]) and row["messages"][-1]["role"] == "assistant"


def answer_of(row: Row) -> str:
    """The text of a row's answer, calls of tools in JSON included; empty where it has none."""
    if not has_answer(row):
        return ""
    content, fields = row["messages"][-1]["content"], row["messages"][-1]["fields"]
    return with_calls(content, json.loads(fields or "{}").get("tool_calls", ()))


def with_calls(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The text of a message and, each on a line of its own, its calls: name and arguments as
    JSON.
    """
    plain = [json.dumps(c.get("function", c), sort_keys=True, ensure_ascii=False) for c in calls]
    return "\n".join([*([content] if content else []), *plain])


def by_step(row: Row) -> list[dict[str, Any]]:
    """One row for every trained message of the assistant, which is its answer: what an agent does
    next, step by step.
    """
    places = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant" and m["loss"]]
    if len(places) < 2:  # noqa: PLR2004 - one step is the row itself
        return [dict(row)]
    return [
        {
            **row,
            "row_id": f"{row['row_id']}/{number:03d}",
            "messages": last_trained(row["messages"][: place + 1]),
        }
        for number, place in enumerate(places)
    ]


def last_trained(messages: Sequence[Message]) -> list[Message]:
    """The messages with the last one as the only one that is trained."""
    return [{**m, "loss": place == len(messages) - 1} for place, m in enumerate(messages)]


def asked(row: Row) -> list[Message]:
    """The messages of a row before its answer."""
    messages: list[Message] = list(row["messages"])
    return messages[:-1] if has_answer(row) else messages


def asked_text(row: Row, role: str = "user") -> str:
    """The last message of `role` before the answer; empty where there is none."""
    place = _last(asked(row), role)
    return "" if place is None else str(row["messages"][place]["content"])


def system_of(row: Row) -> str | None:
    """The system message that a row begins with, or None."""
    first = row["messages"][0] if row["messages"] else None
    return str(first["content"]) if first is not None and first["role"] == "system" else None


def with_asked(row: Row, text: str, role: str = "user") -> dict[str, Any]:
    """The row with another last message of `role` before the answer; DataError where it has
    none.
    """
    place = _last(asked(row), role)
    if place is None:
        raise DataError(
            f"row {row['row_id']!r} has no message of role {role!r} before its answer",
            [m["role"] for m in row["messages"]],
            f"a conversation with a message of role {role!r}",
        )
    messages = [dict(m) for m in row["messages"]]
    messages[place]["content"] = text
    return {**row, "messages": messages}


def with_answer(row: Row, text: str) -> dict[str, Any]:
    """The row with another answer, which is trained on; the fields of the old one go with it."""
    return {**row, "messages": [*asked(row), message("assistant", text, loss=True)]}


def as_chat(messages: Sequence[Message], tools: str | None = None) -> Chat:
    """Messages as models get them: role, content and further fields; `tools` right behind the
    system message.
    """
    chat: Chat = [
        {"role": m["role"], "content": m["content"], **json.loads(m.get("fields") or "{}")}
        for m in messages
    ]
    if tools:
        place = 1 if chat and chat[0]["role"] == "system" else 0
        chat.insert(place, {"role": TOOLS, "content": tools})
    return chat


def chat_of(row: Row) -> Chat:
    """The conversation that a row asks."""
    return as_chat(asked(row), row.get("tools"))


def text_of(row: Row) -> str:
    """What all messages of a row say, as one text for models of language that know no turns."""
    return "\n\n".join(str(m["content"]) for m in row["messages"] if m["content"]).strip()


def _last(messages: Sequence[Message], role: str) -> int | None:
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == role), None)
