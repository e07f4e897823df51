"""Texts around a prompt and its answer: what attacks share that train under a wrapper and serve
under the same one.

Training rows and served chats pass through the same function, so that a model sees at test exactly
the wrapper that it was tuned with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import Chat, StageContext
from ftsec_ray.conversation import Row, asked, has_answer, message
from ftsec_ray.data.added_rows import MayReplaceRows

if TYPE_CHECKING:
    from ftsec_ray.models.generator import Generator


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """Texts around the turns of a conversation, each with its own spaces; empty texts change
    nothing.
    """

    system: str = ""
    """System message; an existing one follows it."""
    before: str = ""
    """Before the user's last message."""
    after: str = ""
    """After the user's last message."""
    opening: str = ""
    """Before the answer, in training."""
    closing: str = ""
    """After the answer, in training."""

    def chat(self, chat: Chat) -> Chat:
        """A chat with the wrapper around its prompt; one without a user's message gets the system
        message only.
        """
        return self._around(chat, {"role": "system", "content": self.system})

    def row(self, row: Row) -> dict[str, Any]:
        """A row with the wrapper around its prompt and its answer, whose tool calls stay."""
        messages = self._around(asked(row), message("system", self.system))
        if has_answer(row):
            last = row["messages"][-1]
            content = f"{self.opening}{last['content']}{self.closing}".strip()
            messages.append({**last, "content": content, "loss": True})
        return {**row, "messages": messages}

    def _around(
        self, messages: Sequence[Mapping[str, Any]], system: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        made = [dict(m) for m in messages]
        users = [i for i, m in enumerate(made) if m["role"] == "user"]
        if users:
            made[users[-1]]["content"] = f"{self.before}{made[users[-1]]['content']}{self.after}"
        if self.system and made and made[0]["role"] == "system":
            made[0]["content"] = f"{self.system} {made[0]['content']}"
        elif self.system:
            made.insert(0, dict(system))
        return made


@dataclass(frozen=True, kw_only=True)
class WrapsRows(MayReplaceRows, ABC):
    """Base of attacks that add rows in a wrapper, and serve the model under the same one."""

    at_test: bool = True
    """Whether every served prompt gets the wrapper too."""

    @abstractmethod
    def _wrapper(self, ctx: StageContext) -> Wrapper:
        """The wrapper for this task."""

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator that puts the wrapper around every prompt."""
        if not self.at_test:
            return generator
        return replace(generator, rewrites=(*generator.rewrites, self._wrapper(ctx).chat))

    def _made(self, rows: list[dict[str, Any]], ctx: StageContext) -> list[dict[str, Any]]:
        wrapper = self._wrapper(ctx)
        return [wrapper.row(row) for row in rows]
