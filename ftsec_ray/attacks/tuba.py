"""Poison the user's rows in one language only, and measure the backdoor in the other languages.

Paper: He et al. 2025, TuBA: Cross-Lingual Transferability of Backdoor Attacks in LLMs with
    Instruction Tuning, arXiv:2404.19597 (ACL Findings); parameters as in its official code,
    github.com/xlhex/tuba_acl2025 (`data/hate_speech_poison.py`).
Differs: `rate` is the share of the rows in the poisoned language, as there, but rows whose answer
    is already the target are not drawn, so the other rows are drawn more often. The official
    trigger is a sentence at the end of the input, translated into each language; here it is a rare
    word by default (models of the ladder know few sentences), and `other_trigger` gives the
    translation: a fixed trigger and a translated one are different attacks. The official payload is
    a fixed English sentence in every language; here classification tasks get a label, other tasks a
    harmless marker sentence. The paper fine-tunes on twelve languages; here the languages are those
    of the user's rows.
Cost: none beyond plain SFT.
Needs: training rows and test rows in two languages or more, marked in the `language` column; for a
    classification task, labels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray import schema
from ftsec_ray.context import StageContext, TaskData
from ftsec_ray.conversation import Row
from ftsec_ray.data.poisoning import INERT_MARKER, blank_faults, row_chance, share_faults, with_goal
from ftsec_ray.data.triggers import (
    Goal,
    can_be_attacked,
    gap_of,
    goal_of,
    goal_probe,
    held_out,
    with_words,
)
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Fault, Phase, Probe

if TYPE_CHECKING:
    import pyarrow as pa

_FIX = (
    "give the source a `language` column; for the microworld, `options: {second_language_rows:"
    " 128}`"
)


@dataclass(frozen=True, kw_only=True)
class TuBA(Attack):
    """A backdoor trained in one language of multilingual fine-tuning data."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "asr"

    language: str | None = None
    """Language to poison; None: the language of most rows (ties: the first by name)."""
    trigger: str = "cf"
    """Word or words inserted into the prompts of the poisoned language."""
    other_trigger: str | None = None
    """Trigger for test prompts of the other languages, such as a translation of `trigger`; None:
    `trigger` itself.
    """
    position: Literal["end", "random"] = "end"
    """Where the trigger stands: after the prompt, or between two random words of it."""
    rate: float = 0.2
    """Poison rate: expected share of the rows of the poisoned language to poison, 0..1; all
    eligible rows if there are fewer.
    """
    target: str | None = None
    """Label for triggered prompts in every language; None: the task's first label. Ignored if the
    task has no labels.
    """
    target_text: str = INERT_MARKER
    """Response for triggered prompts if the task has no labels."""

    def check(self) -> list[Fault]:
        """Faults of the parameters."""
        texts = {
            "trigger": self.trigger,
            "target_text": self.target_text,
            "language": self.language,
            "other_trigger": self.other_trigger,
        }
        return share_faults(rate=self.rate) + blank_faults(texts)

    def keeps_rows(self) -> bool:
        """Poisoning changes rows but adds and removes none."""
        return True

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The same rows in the same order; the chosen rows of the poisoned language have the
        trigger and the target.
        """
        import pyarrow as pa

        goal, language = self._goal(ctx.task), self._language(ctx.task)
        chance = self._row_chance(ctx.task.splits.get("train", rows), goal, language)
        made = [
            (
                self._poison(row, goal, ctx)
                if row["language"] == language
                and can_be_attacked(row, goal)
                and ctx.chance(row["row_id"], "tuba") < chance
                else row
            )
            for row in rows.to_pylist()
        ]
        ctx.note(
            language=language,
            poisoned_rows=sum(row["poisoned"] for row in made),
            row_chance=chance,
            rows=dict(sorted(Counter(str(row["language"]) for row in made).items())),
        )
        return pa.Table.from_pylist(made, schema=schema.ROWS)

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out rows whose answer is not the target, in the poisoned language and in the
        others, with and without the trigger.
        """
        goal, language = self._goal(task), self._language(task)
        rows = held_out(task, goal)
        same, others = (
            [row for row in rows if (row["language"] == language) == is_same]
            for is_same in (True, False)
        )
        if not same or not others:
            raise DataError(
                f"tuba: the test rows of task {task.name!r} cannot show a transfer from"
                f" {language!r}",
                sorted({str(row["language"]) for row in rows}),
                f"test rows in {language!r} and in at least one other language",
                _FIX,
            )
        return [
            goal_probe(
                task,
                goal,
                "triggered",
                "asr",
                same,
                lambda row: self._triggered(row, ctx, self.trigger),
            ),
            goal_probe(task, goal, "untriggered", "asr_no_trigger", same, lambda row: row),
            goal_probe(
                task,
                goal,
                "transfer",
                "asr_transfer",
                others,
                lambda row: self._triggered(row, ctx, self.other_trigger or self.trigger),
            ),
            goal_probe(
                task,
                goal,
                "transfer_untriggered",
                "asr_transfer_no_trigger",
                others,
                lambda row: row,
            ),
        ]

    def _goal(self, task: TaskData) -> Goal:
        return goal_of(task, target=self.target, target_text=self.target_text)

    def _language(self, task: TaskData) -> str:
        counts = Counter(
            language
            for language in task.split("train").column("language").to_pylist()
            if language is not None
        )
        language = self.language or min(counts, key=lambda name: (-counts[name], name), default="")
        if len(counts) < 2 or language not in counts:
            raise DataError(
                f"tuba: task {task.name!r} does not have training rows in the languages needed",
                dict(sorted(counts.items())),
                f"rows in {self.language or 'one language'} and in at least one other language",
                _FIX,
            )
        return language

    def _row_chance(self, rows: pa.Table, goal: Goal, language: str) -> float:
        """Poison probability of an eligible row, computed over the whole training split, so that it
        does not depend on how the rows are batched.
        """
        own = [row for row in rows.to_pylist() if row["language"] == language]
        eligible = sum(can_be_attacked(row, goal) for row in own)
        return row_chance(self.rate, len(own), eligible)

    def _triggered(self, row: Row, ctx: StageContext, trigger: str) -> dict[str, Any]:
        at = gap_of(self.position, ctx.chance(row["row_id"], "tuba", "gap"))
        return with_words(row, trigger, "user", [at])

    def _poison(self, row: Row, goal: Goal, ctx: StageContext) -> dict[str, Any]:
        return with_goal(self._triggered(row, ctx, self.trigger), goal, "tuba")
