"""Runs units one after the other, without Ray.

They run in this process, except in two cases, where they run in a child process: if stages have a
time limit (a stage that exceeds it is killed with its process), and if the sweep's numerics are
portable but this process has already imported torch with other settings. A worker group starts its
processes on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.execute.dist_worker import GroupOrder
from ftsec_ray.execute.unit import StageResult, imported, run_unit
from ftsec_ray.execute.worker import Worker, WorkerLost
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.numerics import put_in_force
from ftsec_ray.plan.resources import cpus_of
from ftsec_ray.plan.stage import Stage, Unit, is_group, workers_of
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.dist_launch import GroupEnded, launch_here, run_worker_group

RunUnit = Callable[[Sequence[Stage], int], list[StageResult]]
"""(stages of a unit, attempt) -> their results; raises WorkerLost."""


def run_local(
    dispatcher: Dispatcher,
    spec: WorkerSpec,
    resources: ResourceSpec,  # noqa: ARG001 - one unit at a time takes what this machine has
    *,
    address: str | None,  # noqa: ARG001
    workers: int | None,  # noqa: ARG001
) -> None:
    """Run all units of a dispatcher, if possible those of one base model together; see
    `executors.Executor`.
    """
    warm: str | None = None
    with _place(dispatcher, spec) as run:
        while (unit := dispatcher.next(warm=warm)) is not None:
            dispatcher.started(unit.id)
            try:
                if is_group(unit.resource):
                    dispatcher.settle(unit.id, _worker_group(dispatcher, unit, spec))
                else:
                    dispatcher.settle(unit.id, run(unit.stages, dispatcher.attempt(unit.id)))
                    warm = unit.affinity
            except (GroupEnded, WorkerLost) as lost:
                dispatcher.lost(unit.id, str(lost))
                warm = None


@contextmanager
def _place(dispatcher: Dispatcher, spec: WorkerSpec) -> Iterator[RunUnit]:
    """The function that runs units other than worker groups."""
    if spec.runtime.timeout_s is None and _can_compute(spec.runtime):
        here = imported(spec.session)(dispatcher.store, spec.runtime, spec.cache_gib)
        yield lambda stages, attempt: run_unit(
            stages, dispatcher.store, here, spec.runner, attempt=attempt
        )
        return
    worker = Worker(spec)
    try:
        yield worker.run
    finally:
        worker.close()


def _can_compute(runtime: Runtime) -> bool:
    """Whether this process can use the sweep's numerics; if so, it switches to them."""
    try:
        put_in_force(runtime.numerics)
    except EnvironmentFault:  # torch is already imported; the child process checks again
        return False
    return True


def _worker_group(dispatcher: Dispatcher, unit: Unit, spec: WorkerSpec) -> list[StageResult]:
    cores = cpus_of(unit.resource, dispatcher.plan.spec) / workers_of(unit.resource)
    order = GroupOrder(
        stages=unit.stages,
        worker=spec,
        attempt=dispatcher.attempt(unit.id),
        threads=max(1, int(cores)),
    )
    return run_worker_group(order, launch_here, dispatcher.store)
