"""Faults of a task that make its metrics misleading: prompts that occur both in training and in
evaluation splits, and rows without an answer to learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.context import TaskData
from ftsec_ray.conversation import answer_of, by_step, is_text
from ftsec_ray.conversation import asked as messages_before

if TYPE_CHECKING:
    import pyarrow as pa

TUNED = ("train", "harmful_train", "safety", "benign_train", "tool_train")
"""Splits that a model may be fine-tuned on."""
ASKED = ("test", "harmful_test", "benign_test", "borderline_test", "tool_test")
"""Splits that a finished model is evaluated on."""


def overlaps(task: TaskData) -> dict[str, int]:
    """`<training split>/<evaluation split>` -> number of evaluation rows whose prompt is also a
    prompt of the training split, ignoring case and spacing; pairs without any are left out.
    """
    tuned = {name: set(_prompts(task.splits[name])) for name in TUNED if name in task.splits}
    shared_rows = {}
    for asked in (name for name in ASKED if name in task.splits):
        prompts = _prompts(task.splits[asked])
        for name, known in tuned.items():
            shared = sum(prompt in known for prompt in prompts)
            if shared:
                shared_rows[f"{name}/{asked}"] = shared
    return shared_rows


def unanswered(task: TaskData) -> dict[str, int]:
    """Training split -> number of its rows with an empty response, where there are any."""
    counts = {
        name: sum(not text.strip() for text in _responses(task.splits[name]))
        for name in TUNED
        if name in task.splits
    }
    return {name: count for name, count in counts.items() if count}


def overlap_warnings(task: TaskData, shared: dict[str, int]) -> list[str]:
    """Warnings about the result of `overlaps`."""
    lines = []
    for pair, count in shared.items():
        tuned, asked = pair.split("/")
        lines.append(
            f"task {task.name!r}: {count} of {task.splits[asked].num_rows} prompts of split"
            f" {asked!r} are also in split {tuned!r}, so that a model fine-tuned on {tuned!r} has"
            " seen them; separate the splits, for example with `skip`"
        )
    return lines


def unanswered_warnings(task: TaskData, counts: dict[str, int]) -> list[str]:
    """Warnings about the result of `unanswered`."""
    return [
        f"task {task.name!r}: {count} of {task.splits[name].num_rows} rows of split {name!r} have"
        " no response and are not trained on"
        for name, count in counts.items()
    ]


def _prompts(table: pa.Table) -> list[str]:
    """The prompt of each trained answer of each row, without differences in case and spacing."""
    return [
        " ".join(" ".join(m["content"] for m in messages_before(step)).split()).casefold()
        for row in table.to_pylist()
        for step in by_step(row)
        if not is_text(step)
    ]


def _responses(table: pa.Table) -> list[str]:
    return [answer_of(row) for row in table.to_pylist()]
