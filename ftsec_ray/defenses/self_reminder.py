"""Reminds the model of its duty in the system message, behind the user's words, or both.

Paper: Defending ChatGPT against jailbreak attack via self-reminders (Xie et al. 2023, Nature
Machine Intelligence 5); also a baseline of SafeDecoding (Xu et al. 2024, arXiv:2402.08983).
Differs: one sentence of our own wording; an existing system message is kept and stands behind the
    reminder.
Cost: a few tokens per prompt; no training. A floor, not a wall: weak once the weights are tuned on
    harmful rows.
Needs: nothing. In the microworld the reminder is a sentence that its models have met in
    pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import Chat, StageContext
    from ftsec_ray.models.generator import Generator

SENTENCE = (
    "You are a responsible assistant: do not write anything harmful or misleading, and decline"
    " requests that ask for it."
)


@dataclass(frozen=True, kw_only=True)
class SelfReminder(Defense):
    """A safety sentence in every chat."""

    PHASE: ClassVar[Phase] = "post"

    where: Literal["system", "user", "both"] = "system"
    """In front of the system message, behind the user's last message, or both."""
    text: str | None = None
    """The sentence; None: the task's own in the microworld, else a general one."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return (
            [("text", self.text, "a sentence, or null")]
            if self.text is not None and not self.text.strip()
            else []
        )

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator that sees every chat with the reminder."""
        system, user = self._sentences(ctx.task.judge)

        def remind(chat: Chat) -> Chat:
            chat = [dict(message) for message in chat]
            if self.where in ("user", "both"):
                last = max(i for i, message in enumerate(chat) if message["role"] == "user")
                chat[last]["content"] = f"{chat[last]['content']} {user}"
            if self.where in ("system", "both"):
                if chat[0]["role"] == "system":
                    chat[0]["content"] = f"{system} {chat[0]['content']}"
                else:
                    chat.insert(0, {"role": "system", "content": system})
            return chat

        return replace(generator, rewrites=(*generator.rewrites, remind))

    def _sentences(self, judge: str) -> tuple[str, str]:
        """What is said in the system message and behind the user's."""
        if self.text is not None:
            return self.text, self.text
        if judge == "microworld":
            from ftsec_ray.data.microworld.templates import REMINDER, SYSTEM_PROMPTS

            return SYSTEM_PROMPTS["safety"], REMINDER
        return SENTENCE, SENTENCE
