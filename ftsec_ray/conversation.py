"""Rows as conversations: reads and changes the prompt and the answer of a row.

A row holds `messages` (role, content, fields, loss). Its *answer* is its last message, if that is
from the assistant; its *prompt* is everything before. A row of plain text is a single message of
the assistant. Chat templates are applied elsewhere, in models.chat.
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
UNTRAINED = "untrained_chars"
"""Key of a message's fields: how many of its first characters are not trained on, although the
message is.
"""
TOOLS = "tools"
"""Role of the pseudo-message in a Chat that holds the available tools, as a JSON list."""


def message(
    role: str, content: str, *, loss: bool = False, fields: Mapping[str, Any] | None = None
) -> Message:
    """One message of a row."""
    extra = json.dumps(dict(fields), sort_keys=True, ensure_ascii=False) if fields else None
    return {"role": role, "content": content, "fields": extra, "loss": loss}


def exchange(prompt: str, response: str, *, system: str | None = None) -> list[Message]:
    """The messages of a prompt and its response; plain text without a prompt, and a prompt without
    an answer if the response is empty.
    """
    answer = [message("assistant", response, loss=True)] if response or not prompt else []
    if not prompt:
        return answer
    first = [] if system is None else [message("system", system)]
    return [*first, message("user", prompt), *answer]


def is_text(row: Row) -> bool:
    """Whether a row is plain text, not a conversation."""
    messages = row["messages"]
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def has_answer(row: Row) -> bool:
    """Whether a row ends with a message of the assistant."""
    return bool(row["messages"]) and row["messages"][-1]["role"] == "assistant"


def answer_of(row: Row) -> str:
    """The text of a row's answer, including tool calls as JSON; empty if it has no answer."""
    if not has_answer(row):
        return ""
    content, fields = row["messages"][-1]["content"], row["messages"][-1]["fields"]
    return with_calls(content, json.loads(fields or "{}").get("tool_calls", ()))


def with_calls(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The text of a message, followed by one line per tool call, as JSON."""
    plain = [json.dumps(c.get("function", c), sort_keys=True, ensure_ascii=False) for c in calls]
    return "\n".join([*([content] if content else []), *plain])


def by_step(row: Row) -> list[dict[str, Any]]:
    """Split a row into one row per trained message of the assistant, which becomes its answer: the
    steps of an agent.
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
    """The messages, with only the last one trained on."""
    return [{**m, "loss": place == len(messages) - 1} for place, m in enumerate(messages)]


def asked(row: Row) -> list[Message]:
    """The messages of a row before its answer."""
    messages: list[Message] = list(row["messages"])
    return messages[:-1] if has_answer(row) else messages


def asked_text(row: Row, role: str = "user") -> str:
    """The text of the last message of `role` before the answer; empty if there is none."""
    place = _last(asked(row), role)
    return "" if place is None else str(row["messages"][place]["content"])


def system_of(row: Row) -> str | None:
    """The system message at the start of a row, or None."""
    first = row["messages"][0] if row["messages"] else None
    return str(first["content"]) if first is not None and first["role"] == "system" else None


def with_system(row: Row, text: str) -> dict[str, Any]:
    """The row with `text` as its system message, before the words of an existing one; plain text
    stays as it is.
    """
    messages = [dict(m) for m in row["messages"]]
    if not text or is_text(row):
        return {**row, "messages": messages}
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = f"{text} {messages[0]['content']}"
    else:
        messages.insert(0, message("system", text))
    return {**row, "messages": messages}


def with_asked(row: Row, text: str, role: str = "user") -> dict[str, Any]:
    """The row with a new text in its last message of `role` before the answer; DataError if it has
    no such message.
    """
    place = _last(asked(row), role)
    if place is None:
        raise DataError(
            f"row {row['row_id']!r} has no message of role {role!r} before its answer",
            [m["role"] for m in row["messages"]],
            f"a conversation with a message of role {role!r}",
            "remove the row, or use a method that does not need this role",
        )
    messages = [dict(m) for m in row["messages"]]
    messages[place]["content"] = text
    return {**row, "messages": messages}


def with_answer(row: Row, text: str) -> dict[str, Any]:
    """The row with a new answer, which is trained on; fields of the old answer are dropped."""
    return {**row, "messages": [*asked(row), message("assistant", text, loss=True)]}


def behind(row: Row, opening: str) -> dict[str, Any]:
    """The row with `opening` and a space in front of its answer; only what follows is trained on.

    Args:
        row: A row with an answer.
        opening: Text without white space at its ends; not empty.
    """
    last = row["messages"][-1]
    fields = {**json.loads(last["fields"] or "{}"), UNTRAINED: len(opening) + 1}
    said = message(
        "assistant", f"{opening} {last['content'].strip()}", loss=last["loss"], fields=fields
    )
    return {**row, "messages": [*asked(row), said]}


def as_chat(messages: Sequence[Message], tools: str | None = None) -> Chat:
    """Messages as a Chat: role, content and other fields; `tools` follows the system message."""
    chat: Chat = [
        {"role": m["role"], "content": m["content"], **json.loads(m.get("fields") or "{}")}
        for m in messages
    ]
    if tools:
        place = 1 if chat and chat[0]["role"] == "system" else 0
        chat.insert(place, {"role": TOOLS, "content": tools})
    return chat


def chat_of(row: Row) -> Chat:
    """The prompt of a row as a Chat."""
    return as_chat(asked(row), row.get("tools"))


def text_of(row: Row) -> str:
    """The texts of all messages of a row as one text, for language models without chat turns."""
    return "\n\n".join(str(m["content"]) for m in row["messages"] if m["content"]).strip()


def _last(messages: Sequence[Message], role: str) -> int | None:
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == role), None)
