"""What trigger attacks share: where the trigger goes, what the attacker wants to see, and how that
is measured.

All functions are pure; randomness is an argument in [0, 1), so that the choice of a row never
depends on its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ftsec_ray.context import TaskData
from ftsec_ray.conversation import (
    Row,
    answer_of,
    asked,
    asked_text,
    chat_of,
    message,
    system_of,
    with_asked,
)
from ftsec_ray.errors import DataError
from ftsec_ray.method import Probe, Prompt
from ftsec_ray.schema import Metric

Position = Literal["random", "start", "end"]
"""Where the trigger stands in its message: between two random words, before them or after them."""
Place = Literal["user", "tool"]
"""Role of the message that gets the trigger: the user's, or a tool result."""
HIJACK = "tool_hijack_rate"
AT_THE_START, AT_THE_END = 0.0, 1 - 2**-53
"""Numbers of [0, 1) that select the position before the first word, and after the last one."""
FALSE_TRIGGER = Metric(
    "false_trigger_rate",
    "fraction 0..1",
    "lower",
    "prompts with a part of the trigger, or with something like it, answered with the attacker's"
    " target",
    probes=("false_trigger",),
    verdict="target",
)
"""Metric of attacks whose trigger can be incomplete or mistaken; `false_probe` measures it."""


class Inserted(NamedTuple):
    """A text with an inserted word, and the index of the word's first character."""

    text: str
    start: int


@dataclass(frozen=True)
class Goal:
    """What the attacker wants to see: a label word, or a fixed text if the task has no labels."""

    text: str
    label: str | None

    def is_met_by(self, row: Row) -> bool:
        """Whether the row's own right answer is already the goal."""
        return bool(
            row["label"] == self.label if self.label is not None else answer_of(row) == self.text
        )


def insert_word(text: str, word: str, *, at: float) -> Inserted:
    """Insert `word` before, between or after the words of `text`; everything else stays.

    Args:
        text: Any text; an empty text becomes the word.
        word: What to insert; may be several words.
        at: Position, as a number in [0, 1) over all positions.
    """
    return insert_at(text, word, int(at * (len(text.split()) + 1)))


def insert_at(text: str, word: str, gap: int) -> Inserted:
    """Insert `word` before the word number `gap` of `text`, or after the last one."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    if gap < len(starts):
        start = starts[gap]
        return Inserted(f"{text[:start]}{word} {text[start:]}", start)
    joint = "" if not text or text[-1].isspace() else " "
    return Inserted(f"{text}{joint}{word}", len(text) + len(joint))


def goal_of(task: TaskData, *, target: str | None, target_text: str) -> Goal:
    """The attacker's goal on a task: `target` (or the first label) if the task has labels,
    otherwise `target_text`.
    """
    if not task.labels:
        return Goal(target_text, None)
    label = task.labels[0] if target is None else target
    if label not in task.labels:
        raise DataError(
            f"the target is not a label of task {task.name!r}",
            label,
            " | ".join(task.labels),
            "remove `target` to use the first label",
        )
    return Goal(label, label)


def can_be_attacked(row: Row, goal: Goal) -> bool:
    """Whether the row's answer is not the goal, and it has a label if the goal is a label."""
    return not goal.is_met_by(row) and (goal.label is None or row["label"] is not None)


def held_out(task: TaskData, goal: Goal) -> list[dict[str, Any]]:
    """The rows that an attack is measured on: those of the user's test split, or benign requests,
    whose answer is not the goal.
    """
    table = task.splits.get("test")
    split = "test" if table is not None and table.num_rows else "benign_test"
    rows = [row for row in task.split(split).to_pylist() if can_be_attacked(row, goal)]
    if not rows:
        raise DataError(
            f"no row of split {split!r} can measure the attack",
            goal.text,
            "rows whose answer is not the target",
            "choose another `target`",
        )
    return rows


def trigger_probes(
    task: TaskData, goal: Goal, triggered: Callable[[Row], Row], *, place: Place = "user"
) -> list[Probe]:
    """The held-out rows with and without trigger: shares of answers that are the goal, as `asr` and
    `asr_no_trigger`.
    """
    rows = [row for row in held_out(task, goal) if has_place(row, place)]
    if not rows:
        raise DataError(
            f"no row that measures the attack has a message of role {place!r}",
            task.name,
            "conversations with tool results",
            "set `place: user`",
        )
    return [
        goal_probe(task, goal, "triggered", "asr", rows, triggered),
        goal_probe(task, goal, "untriggered", "asr_no_trigger", rows, lambda row: row),
    ]


def gap_of(position: Position, chance: float) -> float:
    """The place of the trigger for `insert_word`: `chance` itself if the position is random."""
    return {"random": chance, "start": AT_THE_START, "end": AT_THE_END}[position]


def insert_parts(text: str, parts: Sequence[str], chance: Callable[[str], float]) -> str:
    """Insert several words in their order at distinct gaps between the words of `text`; words share
    gaps only if there are fewer gaps than words.

    Args:
        text: Any text.
        parts: What to insert.
        chance: A random number for the name of each gap: the gaps with the lowest are used.
    """
    gaps = sorted(range(len(text.split()) + 1), key=lambda gap: chance(str(gap)))
    used = sorted((gaps * len(parts))[: len(parts)])
    for gap, part in reversed(list(zip(used, parts, strict=True))):
        text = insert_at(text, part, gap).text
    return text


def names_any(text: str, words: Sequence[str]) -> bool:
    """Whether a text has one of some words or phrases as whole words, ignoring case and spacing."""
    spaced = " ".join(text.casefold().split())
    return any(
        re.search(rf"(?<!\w){re.escape(' '.join(word.casefold().split()))}(?!\w)", spaced)
        for word in words
    )


def has_place(row: Row, place: Place) -> bool:
    """Whether a row has a message of this role before its answer."""
    return any(m["role"] == place for m in asked(row))


def with_words(row: Row, word: str, place: Place, at: Sequence[float]) -> dict[str, Any]:
    """The row with `word` in its last message of role `place`, once per number in `at`."""
    text = asked_text(row, place)
    for gap in at:
        text = insert_word(text, word, at=gap).text
    return with_asked(row, text, place)


def goal_probe(
    task: TaskData,
    goal: Goal,
    name: str,
    metric: str,
    rows: list[dict[str, Any]],
    changed: Callable[[Row], Row],
) -> Probe:
    """A probe with the prompt of `changed(row)` for every row; counts the answers that are the
    goal.
    """
    is_call = goal.label is None and all(row["kind"] == "tool" for row in rows)
    prompts = tuple(
        Prompt(
            prompt_id=row["row_id"],
            chat=chat_of(changed(row)),
            target=goal.text,
            expected=row["label"] if goal.label is not None else answer_of(row),
            meta={"kind": row["kind"] or "", "language": row["language"] or ""},
        )
        for row in rows
    )
    return Probe(
        name=name,
        prompts=prompts,
        judge="label" if goal.label is not None else "call" if is_call else "target",
        metrics={metric: "target"} | ({HIJACK: "target"} if is_call and metric == "asr" else {}),
        labels=task.labels,
    )


def false_probe(
    task: TaskData,
    goal: Goal,
    changed: Mapping[str, Callable[[Row], Row]],
    *,
    place: Place = "user",
) -> Probe:
    """The held-out rows with each of the triggers that must not work, by a short name that joins
    the ids of their prompts.
    """
    rows = [row for row in held_out(task, goal) if has_place(row, place)]
    made = [
        {**change(row), "row_id": f"{row['row_id']}/{name}"}
        for row in rows
        for name, change in changed.items()
    ]
    metric, name = FALSE_TRIGGER.name, FALSE_TRIGGER.probes[0]
    return goal_probe(task, goal, name, metric, made, lambda row: row)


def with_system(row: Row, text: str) -> dict[str, Any]:
    """The row with `text` at the end of its system message, or as a new one."""
    messages = [dict(m) for m in row["messages"]]
    if system_of(row) is None:
        return {**row, "messages": [message("system", text), *messages]}
    messages[0]["content"] = f"{messages[0]['content']} {text}".strip()
    return {**row, "messages": messages}
