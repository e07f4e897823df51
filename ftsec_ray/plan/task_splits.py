"""Checks that the tasks of a sweep are of the kinds that its methods work with, that they have the
splits that these need, and that their data sets are pinned.
"""

from __future__ import annotations

from collections.abc import Iterable

from ftsec_ray import lifecycle
from ftsec_ray.config.sweep import TaskSpec
from ftsec_ray.data.tasks import splits_of, unpinned_splits
from ftsec_ray.errors import SpecError
from ftsec_ray.method import Method
from ftsec_ray.plan.stage import Cell
from ftsec_ray.registry import name_of

Fault = tuple[str, SpecError]
WHAT = {"trusted": "clean rows of the task, used neither for training nor for evaluation"}
"""Split -> explanation of its rows, if the name is not clear."""


def split_faults(cells: Iterable[Cell]) -> dict[tuple[str, ...], Fault]:
    """A fault for every task of a kind that a method cannot work with, for every split that a
    method needs and a task of its cells lacks, and for every data set of a task that has no commit.
    """
    faults: dict[tuple[str, ...], Fault] = {}
    roles, known = set(lifecycle.roles()), dict[str, frozenset[str] | None]()
    for cell in cells:
        task = cell.task
        if task.name not in known:
            known[task.name] = splits_of(task)
            faults |= _unpinned(task)
        for method in (cell.attack, *cell.defenses):
            if method.TASKS and task.kind not in method.TASKS:
                faults.setdefault(
                    ("kind", task.name, method.KIND, name_of(method)), _kind_fault(method, task)
                )
        has = known[task.name]
        if has is None:
            continue
        for method in (cell.attack, *cell.defenses):
            for split in sorted(method.needs() - roles - has):
                key = ("split", task.name, method.KIND, name_of(method), split)
                faults.setdefault(key, _fault(method, task, split, has))
    return faults


def _unpinned(task: TaskSpec) -> dict[tuple[str, ...], Fault]:
    return {
        ("unpinned", task.name, split): (
            f"task {task.name}",
            SpecError(
                f"the data set of split {split!r} has no commit",
                dataset,
                f"{dataset} with the commit of its rows, 40 hex digits",
                "add `revision: <commit>`, copied from the data set's page",
            ),
        )
        for split, dataset in unpinned_splits(task).items()
    }


def _kind_fault(method: Method, task: TaskSpec) -> Fault:
    name = name_of(method)
    return (
        f"{method.KIND} {name}",
        SpecError(
            f"{method.KIND} {name!r} cannot work with task {task.name!r}",
            f"kind: {task.kind}",
            " | ".join(f"kind: {kind}" for kind in sorted(method.TASKS)),
            f"change the task, or exclude {{task: {task.name}, {method.KIND}: {name}}}",
        ),
    )


def _fault(method: Method, task: TaskSpec, split: str, has: frozenset[str]) -> Fault:
    name = name_of(method)
    what = f" ({WHAT[split]})" if split in WHAT else ""
    return (
        f"{method.KIND} {name}",
        SpecError(
            f"{method.KIND} {name!r} needs a split that task {task.name!r} lacks",
            " | ".join(sorted(has)),
            f"a split {split!r}{what}",
            f"give the task a source for {split!r}, or exclude {{task: {task.name}, {method.KIND}:"
            f" {name}}}",
        ),
    )
