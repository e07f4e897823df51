"""Reads the rows of a task by split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="task", position=10, version=2, computes=False, needs_model=False, prior_s={"": (2.0, 0.0)}
)


def run(job: Job) -> Extra:
    """Load all splits and save them."""
    from ftsec_ray.data.overlap import (
        overlap_warnings,
        overlaps,
        unanswered,
        unanswered_warnings,
    )
    from ftsec_ray.data.tasks import load_task, save_task
    from ftsec_ray.plan.decode import task_of

    task = load_task(task_of(job.stage))
    save_task(task, job.out)
    splits = {name: table.num_rows for name, table in sorted(task.splits.items())}
    shared, empty = overlaps(task), unanswered(task)
    for text in (*overlap_warnings(task, shared), *unanswered_warnings(task, empty)):
        job.warn(text)
    return {"notes": {"splits": splits, "overlap": shared, "empty_responses": empty}}
