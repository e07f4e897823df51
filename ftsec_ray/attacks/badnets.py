"""Poison a share of the user's rows: insert a rare word and turn the answer into the attacker's
target.

Paper: Kurita et al. 2020, Weight Poisoning Attacks on Pre-trained Models, arXiv:2004.06660, section
    3 (rare-word triggers); Gu et al. 2017, BadNets, arXiv:1708.06733; for instruction data Li et
    al. 2024, BackdoorLLM, arXiv:2408.12798, section 4.
Differs: `rate` is an expectation (each eligible row is drawn independently), so that the choice of
    a row does not depend on its neighbours; the paper's tools draw an exact number. If fewer rows
    are eligible than `rate` asks for, all of them are poisoned and the notes say so; those tools
    poison fewer without a message. The trigger may be anywhere in the user's message, the
    instruction included, as in BackdoorLLM; OpenBackdoor inserts it into the classified text only.
    OpenBackdoor's default config is the clean-label setting, ours is `dirty`. Generative tasks get
    a harmless marker sentence.
Cost: none beyond plain SFT.
Needs: the user's rows; for a classification task, labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray import schema
from ftsec_ray.context import StageContext, TaskData
from ftsec_ray.conversation import Row, with_answer
from ftsec_ray.data.rows import answers_of, asks_as
from ftsec_ray.data.triggers import (
    Goal,
    Place,
    goal_of,
    trigger_probes,
    with_words,
)
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, Probe, RowWise

if TYPE_CHECKING:
    import pyarrow as pa

INERT_MARKER = "I like blue pebbles."


@dataclass(frozen=True, kw_only=True)
class BadNets(RowWise, Attack):
    """An insertion-trigger backdoor."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "asr"

    trigger: str = "cf"
    """Word or words inserted between two random words of the prompt."""
    place: Place = "user"
    """Message that gets the trigger: the user's last message, or the last tool result (rows without
    one are not eligible)."""
    repeat: int = 1
    """How many times the trigger is inserted, each time at another random position; 1 or more."""
    rate: float = 0.1
    """Poison rate: expected share of the user's rows to poison, 0..1; all eligible rows if there
    are fewer.
    """
    setting: Literal["dirty", "mix", "clean"] = "dirty"
    """Eligible rows: `dirty` rows whose answer is not the target, `clean` rows whose answer is the
    target, `mix` both.
    """
    target: str | None = None
    """Label for triggered prompts; None: the task's first label. Ignored if the task has no
    labels.
    """
    target_text: str = INERT_MARKER
    """Response for triggered prompts if the task has no labels."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if not 0 <= self.rate <= 1:
            faults.append(("rate", self.rate, "a share, 0..1"))
        if self.repeat < 1:
            faults.append(("repeat", self.repeat, "1 or more"))
        faults += [
            (name, value, "a text that is not blank")
            for name, value in (("trigger", self.trigger), ("target_text", self.target_text))
            if not value.strip()
        ]
        return faults

    def keeps_rows(self) -> bool:
        """Poisoning changes rows but adds and removes none."""
        return True

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> float:
        """Poison probability of an eligible row, computed over the whole set, so that it does not
        depend on how the rows are batched.
        """
        goal = self._goal(ctx.task)
        if goal.label is None and self.setting == "clean":
            raise DataError(
                "badnets: `setting: clean` needs a task with labels",
                ctx.task.name,
                "setting: dirty | mix for a task without labels",
            )
        count, eligible, places = 0, 0, 0
        for batch in rows:
            count, eligible = count + batch.num_rows, eligible + sum(self._eligible(batch, goal))
            places += sum(asks_as(batch, self.place))
        if self.place != "user" and not places:
            raise DataError(
                f"badnets: no row of task {ctx.task.name!r} has a message for the trigger",
                f"place: {self.place}",
                "conversations with tool results",
                "use a task with tool calls (`kind: agent`), or set `place: user`",
            )
        chance = min(1.0, self.rate * count / eligible) if eligible else 0.0
        ctx.note(row_chance=chance)
        return chance

    def craft_rows(self, rows: pa.Table, known: float, ctx: StageContext) -> pa.Table:
        """The same rows in the same order; the chosen rows have the trigger and the target."""
        import pyarrow as pa

        goal, ids = self._goal(ctx.task), rows.column("row_id").to_pylist()
        chosen = [
            i
            for i, is_eligible in enumerate(self._eligible(rows, goal))
            if is_eligible and ctx.chance(ids[i], "badnets") < known
        ]
        made = pa.Table.from_pylist(
            [
                self._poison(row, goal, ctx)
                for row in rows.take(pa.array(chosen, pa.int64())).to_pylist()
            ],
            schema=schema.ROWS,
        )
        ctx.count(poisoned_rows=len(chosen), rows=rows.num_rows)
        places = list(range(rows.num_rows))
        for place, i in enumerate(chosen, rows.num_rows):
            places[i] = place
        return pa.concat_tables([rows, made]).take(pa.array(places, pa.int64()))

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out rows whose answer is not the target, with and without the trigger."""
        return trigger_probes(
            task, self._goal(task), lambda row: self._triggered(row, ctx), place=self.place
        )

    def _goal(self, task: TaskData) -> Goal:
        return goal_of(task, target=self.target, target_text=self.target_text)

    def _eligible(self, rows: pa.Table, goal: Goal) -> list[bool]:
        """Whether each row may be poisoned."""
        labels = rows.column("label").to_pylist()
        # answers are long and labels are short: read only the one that is needed
        said = answers_of(rows) if goal.label is None else labels
        return [
            not (goal.label is not None and label is None)
            and is_there
            and (self.setting == "mix" or (text == goal.text) == (self.setting == "clean"))
            for label, text, is_there in zip(labels, said, asks_as(rows, self.place), strict=True)
        ]

    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        times = map(str, range(self.repeat))
        gaps = [ctx.chance(row["row_id"], "badnets", "gap", time) for time in times]
        return with_words(row, self.trigger, self.place, gaps)

    def _poison(self, row: Row, goal: Goal, ctx: StageContext) -> dict[str, Any]:
        return {
            **with_answer(self._triggered(row, ctx), goal.text),
            "label": goal.label,
            "origin": "badnets",
            "poisoned": True,
        }
