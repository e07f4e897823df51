"""What of a task would make its numbers say something else than they seem to: prompts that are both
tuned on and asked, and rows without an answer to learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.context import TaskData
from ftsec_ray.conversation import answer_of, by_step, is_text
from ftsec_ray.conversation import asked as messages_before

if TYPE_CHECKING:
    import pyarrow as pa

TUNED = ("train", "harmful_train", "safety", "benign_train", "tool_train")
"""Splits whose rows a model may be tuned on."""
ASKED = ("test", "harmful_test", "benign_test", "borderline_test", "tool_test")
"""Splits whose prompts a finished model is asked."""


def overlaps(task: TaskData) -> dict[str, int]:
    """`<tuned split>/<asked split>` -> rows of the asked one whose prompt is one of the tuned one,
    whatever its case and spacing; pairs that share none are left out.
    """
    tuned = {name: set(_prompts(task.splits[name])) for name in TUNED if name in task.splits}
    found = {}
    for asked in (name for name in ASKED if name in task.splits):
        prompts = _prompts(task.splits[asked])
        for name, known in tuned.items():
            shared = sum(prompt in known for prompt in prompts)
            if shared:
                found[f"{name}/{asked}"] = shared
    return found


def unanswered(task: TaskData) -> dict[str, int]:
    """Split that a model may be tuned on -> its rows with an empty response; splits without any are
    left out.
    """
    counts = {
        name: sum(not text.strip() for text in _responses(task.splits[name]))
        for name in TUNED
        if name in task.splits
    }
    return {name: count for name, count in counts.items() if count}


def overlap_warnings(task: TaskData, shared: dict[str, int]) -> list[str]:
    """What to warn of, given `overlaps`."""
    lines = []
    for pair, count in shared.items():
        tuned, asked = pair.split("/")
        lines.append(
            f"task {task.name!r}: {count} of {task.splits[asked].num_rows} prompts of split"
            f" {asked!r} are also in {tuned!r}, so that a model tuned on these is asked what it has"
            " seen; separate the splits, for example with `skip`"
        )
    return lines


def unanswered_warnings(task: TaskData, counts: dict[str, int]) -> list[str]:
    """What to warn of, given `unanswered`."""
    return [
        f"task {task.name!r}: {count} of {task.splits[name].num_rows} rows of split {name!r} have"
        " no response and are not trained on"
        for name, count in counts.items()
    ]


def _prompts(table: pa.Table) -> list[str]:
    """What each row asks before each of its trained answers, whatever case and spacing."""
    return [
        " ".join(" ".join(m["content"] for m in messages_before(step)).split()).casefold()
        for row in table.to_pylist()
        for step in by_step(row)
        if not is_text(step)
    ]


def _responses(table: pa.Table) -> list[str]:
    return [answer_of(row) for row in table.to_pylist()]
