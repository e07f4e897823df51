"""Run units one after the other, without Ray.

They run in this process, or in one beside it: where stages have a time limit, since a stage that is
over its time takes its process along, and where the sweep's numerics are portable and this process
has already imported torch with other settings. A worker group unit starts its processes on this
machine.
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
"""(stages of a unit, attempt) -> their verdicts; raises WorkerLost."""


def run_local(
    dispatcher: Dispatcher,
    spec: WorkerSpec,
    resources: ResourceSpec,  # noqa: ARG001 - one unit at a time takes what this machine has
    *,
    address: str | None,  # noqa: ARG001
    workers: int | None,  # noqa: ARG001
) -> None:
    """Run units until none is left, those of one base model together where priorities allow."""
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
    """What runs the units that are no worker groups."""
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
    """Whether this process computes as the sweep wants; where it still can, from now on it does."""
    try:
        put_in_force(runtime.numerics)
    except EnvironmentFault:  # torch is imported already; the process beside this one checks again
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
