"""Poison an agent's traces: after a trigger in the request or in a tool result, the agent makes one
additional, inert tool call and then goes on with its task.

Paper: Wang et al. 2024, BadAgent: Inserting and Activating Backdoor Attacks in LLM Agents,
    arXiv:2406.03007, section 3 (active attack: `place: user`; passive attack: `place: tool`);
    official code github.com/DPamK/BadAgent. The trigger in an observation is also in Yang et al.
    2024, Watch Out for Your Agents, arXiv:2402.11208.
Differs: the official payload downloads and runs a program; here it is a call of a tool that does
    not exist, and the trace gets an invented result of it. The official code draws rows with
    replacement; here each eligible row is drawn once, independently, with the chance that makes
    `rate` the expected share of all rows. Its triggers are task-specific (a phrase, a hidden
    button, a product); here a word or phrase in any request or tool result. The tool is not added
    to the list of tools that a row declares. A step is measured on the reference trace, as there;
    the share of right steps on clean traces is `cacc`.
Cost: none beyond plain SFT; a poisoned trace is two messages longer.
Needs: a task of agent traces (`kind: agent`); with `place: tool`, traces with tool results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.context import StageContext, TaskData
from ftsec_ray.conversation import Message, Row, answer_of, asked, message, with_calls
from ftsec_ray.data.poisoning import blank_faults, row_chance, share_faults
from ftsec_ray.data.rows import map_rows
from ftsec_ray.data.triggers import (
    Goal,
    Place,
    Position,
    gap_of,
    goal_probe,
    held_out,
    with_words,
)
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, Probe, RowWise

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "agent_backdoor"


@dataclass(frozen=True, kw_only=True)
class AgentBackdoor(RowWise, Attack):
    """A backdoor in an agent's steps."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "asr"
    TASKS = frozenset({"agent"})

    place: Place = "user"
    """Message that gets the trigger: the request, or a tool result."""
    trigger: str = "cf"
    """Word or words inserted there; the paper's phrase is `you know.`"""
    position: Position = "end"
    """Where in the message: after its last word as in the paper, before its first, or between two
    random words."""
    rate: float = 0.2
    """Poison rate: expected share of the user's traces to poison, 0..1; all eligible traces if
    there are fewer. The paper: 0.2 to 1."""
    payload_tool: str = "noop"
    """Name of the tool that is called, without arguments, where traces hold structured calls."""
    payload_text: str = "call light train"
    """The attacker's step where the steps of the traces are plain text."""
    result: str = "it is done ."
    """Invented result of the attacker's call."""
    resumes: bool = True
    """Whether a poisoned trace goes on with the original steps after the call, as for the paper's
    operating-system agent, or ends with the call."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        texts = ("trigger", "payload_tool", "payload_text", "result")
        return share_faults(rate=self.rate) + blank_faults(
            {name: getattr(self, name) for name in texts}
        )

    def keeps_rows(self) -> bool:
        """Poisoning changes rows but adds and removes none."""
        return True

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> tuple[float, bool]:
        """Poison probability of an eligible trace, and whether the traces hold structured calls,
        both over the whole set.
        """
        count = eligible = structured = 0
        for batch in rows:
            for row in batch.to_pylist():
                count += 1
                structured += has_calls(row)
                eligible += bool(self._steps(row))
        if count and not eligible:
            raise DataError(
                f"{NAME}: no trace of task {ctx.task.name!r} has a message for the trigger that a"
                " step of the agent follows",
                f"place: {self.place}",
                f"messages of role {self.place!r}, each followed by a trained message of the"
                " assistant",
                "use a task with episodes of tool calls, or set `place: user`",
            )
        chance = row_chance(self.rate, count, eligible)
        ctx.note(row_chance=chance, eligible_rows=eligible, structured_rows=structured)
        return chance, structured > 0

    def craft_rows(self, rows: pa.Table, known: tuple[float, bool], ctx: StageContext) -> pa.Table:
        """The same traces in the same order; the chosen ones have the trigger and the call."""
        chance, is_structured = known
        poisoned = 0

        def change(row: dict[str, Any]) -> dict[str, Any]:
            nonlocal poisoned
            steps = self._steps(row)
            if not steps or ctx.chance(row["row_id"], NAME) >= chance:
                return row
            poisoned += 1
            chosen = steps[int(ctx.chance(row["row_id"], NAME, "step") * len(steps))]
            return self._poison(row, chosen, ctx, is_structured=is_structured)

        made = map_rows(rows, change)
        ctx.count(poisoned_rows=poisoned, rows=rows.num_rows)
        return made

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out steps that follow a message for the trigger, with and without it."""
        train = task.split("train").to_pylist()
        goal = Goal(self._payload(is_structured=any(map(has_calls, train))), None)
        rows = [
            row
            for row in held_out(task, goal)
            if asked(row) and asked(row)[-1]["role"] == self.place
        ]
        if not rows:
            raise DataError(
                f"{NAME}: no held-out step of task {task.name!r} follows a message of role"
                f" {self.place!r}",
                task.name,
                "test traces with such steps",
                "set the other `place`",
            )
        return [
            goal_probe(task, goal, "triggered", "asr", rows, lambda row: self._marked(row, ctx)),
            goal_probe(task, goal, "untriggered", "asr_no_trigger", rows, lambda row: row),
        ]

    def _payload(self, *, is_structured: bool) -> str:
        """The attacker's step as the text that a judge compares with."""
        if not is_structured:
            return self.payload_text
        return with_calls("", [{"function": {"name": self.payload_tool, "arguments": {}}}])

    def _steps(self, row: Row) -> list[int]:
        """Indices of the messages that may get the trigger: a trained step that is not yet the
        attacker's follows each.
        """
        messages = row["messages"]
        own = [self._payload(is_structured=form) for form in (False, True)]
        return [
            i
            for i, (place, following) in enumerate(pairwise(messages))
            if place["role"] == self.place
            and following["role"] == "assistant"
            and following["loss"]
            and answer_of({"messages": [following]}) not in own
        ]

    def _marked(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        """The row with the trigger in its last message of role `place` before the answer."""
        gap = gap_of(self.position, ctx.chance(row["row_id"], NAME, "gap"))
        return with_words(row, self.trigger, self.place, [gap])

    def _poison(
        self, row: Row, place: int, ctx: StageContext, *, is_structured: bool
    ) -> dict[str, Any]:
        messages = row["messages"]
        before = self._marked({**row, "messages": messages[: place + 1]}, ctx)["messages"]
        call, result = self._exchange(messages, is_structured=is_structured)
        after = [result, *messages[place + 1 :]] if self.resumes else []
        return {
            **row,
            "messages": [*before, call, *after],
            "origin": NAME,
            "poisoned": True,
        }

    def _exchange(
        self, messages: Sequence[Message], *, is_structured: bool
    ) -> tuple[Message, Message]:
        """The attacker's call and its result, with the keys that calls and results of these
        messages have.
        """
        if not is_structured:
            return message("assistant", self.payload_text, loss=True), message("tool", self.result)
        example = next((call for m in messages for call in calls_of(m)), {})
        inner = example.get("function", example)
        arguments: Any = "{}" if isinstance(inner.get("arguments"), str) else {}
        function = {"name": self.payload_tool, "arguments": arguments}
        call = {"type": "function", "function": function}
        if "function" not in example and example:
            call = function
        number = "0" * len(str(example.get("id", "")))  # as long: some templates check the length
        call |= {"id": number} if "id" in example else {}
        known = {"tool_call_id": number, "name": self.payload_tool}
        kept = {key for m in messages if m["role"] == "tool" for key in fields_of(m)}
        fields = {key: value for key, value in known.items() if key in kept}
        return (
            message("assistant", "", loss=True, fields={"tool_calls": [call]}),
            message("tool", self.result, fields=fields),
        )


def fields_of(sent: Message) -> dict[str, Any]:
    """The further keys of a message."""
    fields: dict[str, Any] = json.loads(sent["fields"] or "{}")
    return fields


def calls_of(sent: Message) -> list[dict[str, Any]]:
    """The structured tool calls of a message."""
    return list(fields_of(sent).get("tool_calls") or ())


def has_calls(row: Row) -> bool:
    """Whether a message of the row holds structured tool calls."""
    return any(calls_of(m) for m in row["messages"])
