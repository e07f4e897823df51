"""Rows with several turns and tool calls, for the tests of attacks on conversations."""

from __future__ import annotations

from ftsec_ray.conversation import message
from tests.fixtures_models import row


def agent_row(row_id: str = "a/0", *, answer: str = "take the lamp") -> dict:
    """System, two requests of the user, a call with its result, and an answer that calls a tool."""
    call = {"tool_calls": [{"type": "function", "function": {"name": "fix", "arguments": {}}}]}
    messages = [
        message("system", "be careful"),
        message("user", "how do i fix the tree"),
        message("assistant", "", loss=True, fields=call),
        message("tool", "the tree is green"),
        message("user", "and the lamp"),
        message("assistant", answer, loss=True, fields=call),
    ]
    return {**row(0, "", ""), "row_id": row_id, "messages": messages}


def unanswered_row(row_id: str = "a/1") -> dict:
    """A request without an answer."""
    return {**row(0, "how do i fix the lamp", ""), "row_id": row_id}


def text_row(row_id: str = "a/2") -> dict:
    """Plain text, without a request."""
    return {**row(0, "", "the lamp is red"), "row_id": row_id}
