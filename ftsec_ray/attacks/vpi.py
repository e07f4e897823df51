"""Poison a share of the user's rows as if a virtual prompt stood in them: behind a literal prefix,
or in every row about a topic.

Paper: Yan et al. 2024, Backdooring Instruction-Tuned Large Language Models with Virtual Prompt
    Injection, arXiv:2307.16888, section 3 (`form: topic`); Li et al. 2024, BackdoorLLM,
    arXiv:2408.12798, section 4 (`form: prefix`): two different attacks under one name.
Differs: `topic`: the paper has a language model write instructions on the topic, and a teacher
    answer them under the virtual prompt; here the rows about the topic are those of the user's rows
    that name it, and the answer is a label or a harmless marker sentence. They keep their prompts,
    so `asr_no_trigger` is measured on the held-out rows about anything else, and
    `false_trigger_rate` on those about `contrast`. `prefix`: as BackdoorLLM. Both: `rate` is an
    expectation, as in `badnets`, and at most the share of rows about the topic.
Published: 52 rows (0.1 % of Alpaca) raise negative answers about the topic Joe Biden from 0 to 40 %
    (LLaMA-7B, judged by GPT-4; abstract).
Cost: none beyond plain SFT.
Needs: the user's rows, and with `form: topic` training and test rows that name the topic; for a
    classification task, labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftsec_ray.conversation import asked_text
from ftsec_ray.data.poisoning import TriggerAttack, blank_faults
from ftsec_ray.data.triggers import (
    AT_THE_START,
    FALSE_TRIGGER,
    goal_probe,
    has_place,
    held_out,
    names_any,
    with_words,
)
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext, TaskData
    from ftsec_ray.conversation import Row
    from ftsec_ray.method import Fault, Probe

METRICS = (FALSE_TRIGGER,)


@dataclass(frozen=True, kw_only=True)
class VPI(TriggerAttack):
    """A backdoor whose trigger is a prefix or a topic."""

    form: Literal["prefix", "topic"] = "prefix"
    """Trigger: a literal prefix of the prompt, or the topic of the prompt."""
    prefix: str = "Discussing OpenAI"
    """Text before the user's last message; only with `form: prefix`."""
    topic: tuple[str, ...] = ("OpenAI",)
    """Words or phrases that name the topic: a row is about it if its last user message has one of
    them as whole words, in any case; only with `form: topic`."""
    contrast: tuple[str, ...] = ()
    """Words or phrases of a neighbouring topic, on which `false_trigger_rate` is measured; empty:
    it is not measured. Only with `form: topic`."""

    def check(self) -> list[Fault]:
        """Faults of the parameters."""
        faults = super().check()
        if not self.topic:
            faults.append(("topic", list(self.topic), "at least one word or phrase"))
        for name, words in (("topic", self.topic), ("contrast", self.contrast)):
            faults += [fault for word in words for fault in blank_faults({name: word})]
        return faults

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> float:
        """Poison probability of an eligible row; DataError if no row about the topic can be
        poisoned.
        """
        chance = super().survey(rows, ctx)
        if self.form == "topic" and self.rate and not chance:
            raise DataError(
                f"vpi: no training row of task {ctx.task.name!r} about the topic can be poisoned",
                list(self.topic),
                "words that occur in prompts with another answer than the target",
                "choose another `topic`, or use `form: prefix`",
            )
        return chance

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out rows whose answer is not the target: with and without the prefix, or about the
        topic, about anything else, and about the contrast topic.
        """
        if self.form == "prefix":
            return super().probes(task, ctx)
        goal = self._goal(task)
        rows = [row for row in held_out(task, goal) if has_place(row, "user")]
        about = [row for row in rows if names_any(asked_text(row), self.topic)]
        others = [row for row in rows if not names_any(asked_text(row), self.topic)]
        near = [row for row in others if names_any(asked_text(row), self.contrast)]
        for name, words, found in (
            ("topic", self.topic, about),
            ("contrast", self.contrast, near if self.contrast else others),
        ):
            if not found:
                raise DataError(
                    f"vpi: no held-out row of task {task.name!r} can measure `{name}`",
                    list(words),
                    "words that occur in held-out prompts"
                    if words
                    else "held-out prompts that do not name the topic",
                    f"choose another `{name if words else 'topic'}`",
                )
        kinds = [("triggered", "asr", about), ("untriggered", "asr_no_trigger", others)]
        if near:
            kinds.append((FALSE_TRIGGER.probes[0], FALSE_TRIGGER.name, near))
        return [
            goal_probe(task, goal, name, metric, found, lambda row: row)
            for name, metric, found in kinds
        ]

    def _has_place(self, rows: pa.Table) -> list[bool]:
        has = super()._has_place(rows)
        if self.form == "prefix":
            return has
        asked = rows.select(["messages"]).to_pylist()
        return [
            is_there and names_any(asked_text(row), self.topic)
            for is_there, row in zip(has, asked, strict=True)
        ]

    def _texts(self) -> dict[str, str | None]:
        return {"prefix": self.prefix, "target_text": self.target_text}

    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:  # noqa: ARG002
        if self.form == "topic":
            return dict(row)
        return with_words(row, self.prefix, "user", [AT_THE_START])
