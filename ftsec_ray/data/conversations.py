"""Conversations in the formats that files use -> the messages of a row.

Formats: OpenAI's `messages` (role, content as text or parts, tool_calls, weight), ShareGPT's
`conversations` (from, value, loss), and lists of either under any name. Every message of the
assistant is trained on unless the file says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ftsec_ray.conversation import Message, message
from ftsec_ray.data.records import Record
from ftsec_ray.errors import DataError

COLUMNS = ("messages", "conversations", "conversation")
"""Columns that are read as a conversation if the sweep names no column."""
ROLE_OF = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""The role names that files use -> the role of a message."""
_WANT = "a list of messages, each with role (or from) and content (or value)"
_KEPT = ("tool_calls", "tool_call_id", "name")


def is_conversation(value: object) -> bool:
    """Whether a value looks like a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


def messages_of(value: object, place: str) -> list[Message]:
    """The messages of a conversation; DataError that names `place` if it is not one."""
    value = _decoded(value)
    if not is_conversation(value):
        raise DataError(f"{place} is not a conversation", value, _WANT, "name another column")
    assert isinstance(value, list)
    messages = [_message(m, f"message {i} of {place}") for i, m in enumerate(value, 1)]
    while messages and messages[-1]["role"] == "system":
        raise DataError(
            f"{place} ends with a system message", value[-1], "a user's or an assistant's message"
        )
    if not any(m["role"] in ("user", "assistant") for m in messages):
        raise DataError(f"{place} has no message of a user or an assistant", value, _WANT)
    return messages


def tools_of(record: Record, place: str) -> str | None:
    """The tools of a record, as a JSON list; None if it has none."""
    given = record.get("tools", record.get("functions"))
    given = _decoded(given)
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise DataError(f"the tools of {place} are not a list of objects", given, "a JSON list")
    wrapped = [t if "function" in t else {"type": "function", "function": dict(t)} for t in given]
    return json.dumps(wrapped, sort_keys=True, ensure_ascii=False)


def _decoded(value: object) -> object:
    """Decodes a list that a file stores as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _message(given: Mapping[str, Any], place: str) -> Message:
    name = given.get("role", given.get("from"))
    role = ROLE_OF.get(str(name).strip().lower())
    if role is None:
        raise DataError(f"{place} has an unknown role", name, " | ".join(ROLE_OF))
    fields = {key: given[key] for key in _KEPT if given.get(key) is not None}
    content = _content(given, place, is_optional="tool_calls" in fields)
    trained = given.get("loss", given.get("weight", given.get("train")))
    return message(
        role,
        content,
        loss=role == "assistant" and (trained is None or bool(trained)),
        fields=fields,
    )


def _content(given: Mapping[str, Any], place: str, *, is_optional: bool) -> str:
    content = given.get("content", given.get("value"))
    if isinstance(content, list):
        other = [p for p in content if not isinstance(p, Mapping) or "text" not in p]
        if other:
            raise DataError(f"{place} has a part that is not text", other[0], "parts of type text")
        content = "".join(str(part["text"]) for part in content)
    if content is None and is_optional:
        return ""
    if not isinstance(content, str) or not (content.strip() or is_optional):
        raise DataError(f"{place} has no text", content, "a string", "repair or remove the row")
    return content
