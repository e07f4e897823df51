"""What attacks that poison the user's rows share: which rows, how many, and what becomes of them.

`TriggerAttack` is a whole backdoor but for its trigger: it turns an expected share of the rows into
triggered prompts with the attacker's answer, and measures held-out rows with and without trigger.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.context import StageContext, TaskData
from ftsec_ray.conversation import Row, with_answer
from ftsec_ray.data.rows import answers_of, asks_as, from_rows, to_rows
from ftsec_ray.data.triggers import Goal, Place, goal_of, trigger_probes
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Fault, Phase, Probe, RowWise
from ftsec_ray.registry import name_of

if TYPE_CHECKING:
    import pyarrow as pa

INERT_MARKER = "I like blue pebbles."


def share_faults(**shares: float) -> list[Fault]:
    """Faults of parameters that must be in [0, 1]."""
    return [(name, value, "a share, 0..1") for name, value in shares.items() if not 0 <= value <= 1]


def blank_faults(texts: Mapping[str, str | None]) -> list[Fault]:
    """Faults of texts that must not be blank; None is no fault."""
    return [
        (name, value, "a text that is not blank")
        for name, value in texts.items()
        if value is not None and not value.strip()
    ]


def row_chance(rate: float, rows: int, eligible: int) -> float:
    """The probability with which each eligible row is drawn, so that a share `rate` of all rows is
    expected; 1 if there are too few.
    """
    return min(1.0, rate * rows / eligible) if eligible else 0.0


def with_goal(row: Row, goal: Goal, origin: str) -> dict[str, Any]:
    """The row with the attacker's answer and label, marked as poisoned by the method `origin`."""
    return {**with_answer(row, goal.text), "label": goal.label, "origin": origin, "poisoned": True}


def replaced(rows: pa.Table, at: Sequence[int], made: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The table with the rows at the numbers `at` replaced by `made`, in the same order."""
    import pyarrow as pa

    places = list(range(rows.num_rows))
    for new, old in enumerate(at, rows.num_rows):
        places[old] = new
    return pa.concat_tables([rows, from_rows(made)]).take(pa.array(places, pa.int64()))


def taken(rows: pa.Table, at: Sequence[int]) -> list[dict[str, Any]]:
    """The rows at the numbers `at` as mappings."""
    import pyarrow as pa

    return to_rows(rows.take(pa.array(at, pa.int64())))


@dataclass(frozen=True, kw_only=True)
class TriggerAttack(RowWise, Attack):
    """A backdoor in the user's rows; a subclass says what the trigger is."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "asr"

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

    @abstractmethod
    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        """The row with the trigger in its prompt."""

    def _texts(self) -> dict[str, str | None]:
        """The texts of the parameters, by name; `check` refuses blank ones."""
        return {"target_text": self.target_text}

    def _place(self) -> Place:
        """Role of the message that gets the trigger; rows without one are not eligible."""
        return "user"

    def _has_place(self, rows: pa.Table) -> list[bool]:
        """Whether each row has a place for the trigger."""
        return asks_as(rows, self._place())

    def check(self) -> list[Fault]:
        """Faults of the parameters."""
        return share_faults(rate=self.rate) + blank_faults(self._texts())

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
                f"{name_of(self)}: `setting: clean` needs a task with labels",
                ctx.task.name,
                "setting: dirty | mix for a task without labels",
            )
        count, eligible, places = 0, 0, 0
        for batch in rows:
            count, eligible = count + batch.num_rows, eligible + sum(self._eligible(batch, goal))
            places += sum(self._has_place(batch))
        if self._place() == "tool" and not places:
            self._refuse(ctx.task)
        chance = row_chance(self.rate, count, eligible)
        ctx.note(row_chance=chance)
        if places < count:
            ctx.note(rows_without_place=count - places)
        if self.rate and not eligible:
            ctx.warn(f"none of {count} rows can be poisoned: {places} have a place for the trigger")
        return chance

    def craft_rows(self, rows: pa.Table, known: float, ctx: StageContext) -> pa.Table:
        """The same rows in the same order; the chosen rows have the trigger and the target."""
        goal, chosen = self._goal(ctx.task), self._chosen(rows, known, ctx)
        made = [
            with_goal(self._triggered(row, ctx), goal, name_of(self)) for row in taken(rows, chosen)
        ]
        ctx.count(poisoned_rows=len(chosen), rows=rows.num_rows)
        return replaced(rows, chosen, made)

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out rows whose answer is not the target, with and without the trigger."""
        return trigger_probes(
            task, self._goal(task), lambda row: self._triggered(row, ctx), place=self._place()
        )

    def _goal(self, task: TaskData) -> Goal:
        return goal_of(task, target=self.target, target_text=self.target_text)

    def _chosen(self, rows: pa.Table, chance: float, ctx: StageContext) -> list[int]:
        """The numbers of the rows to poison."""
        ids = rows.column("row_id").to_pylist()
        return [
            i
            for i, is_eligible in enumerate(self._eligible(rows, self._goal(ctx.task)))
            if is_eligible and ctx.chance(ids[i], name_of(self)) < chance
        ]

    def _eligible(self, rows: pa.Table, goal: Goal) -> list[bool]:
        """Whether each row may be poisoned."""
        labels = rows.column("label").to_pylist()
        # answers are long and labels are short: read only the one that is needed
        said = answers_of(rows) if goal.label is None else labels
        return [
            not (goal.label is not None and label is None)
            and is_there
            and (self.setting == "mix" or (text == goal.text) == (self.setting == "clean"))
            for label, text, is_there in zip(labels, said, self._has_place(rows), strict=True)
        ]

    def _refuse(self, task: TaskData) -> None:
        raise DataError(
            f"{name_of(self)}: no row of task {task.name!r} has a message for the trigger",
            f"place: {self._place()}",
            "conversations with tool results",
            "use a task with tool calls (`kind: agent`), or set `place: user`",
        )
