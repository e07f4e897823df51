"""Run units one after the other, without Ray.

They run in this process, or in one beside it: where stages have a time limit, since a stage that is
over its time takes its process along, and where the sweep's numerics are portable and this process
has already imported torch with other settings. A worker group unit starts its processes on this
machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.execute.dist_worker import GroupOrder
from ftsec_ray.execute.unit import Runner, StageResult, imported, run_unit
from ftsec_ray.execute.worker import Worker, WorkerLost
from ftsec_ray.numerics import put_in_force
from ftsec_ray.plan.resources import cpus_of
from ftsec_ray.plan.stage import Stage, Unit, is_group, workers_of
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.dist_launch import GroupEnded, launch_here, run_worker_group

RunUnit = Callable[[Sequence[Stage], int], list[StageResult]]
"""(stages of a unit, attempt) -> their verdicts; raises WorkerLost."""


def run_local(
    dispatcher: Dispatcher,
    runtime: Runtime,
    cache_gib: float,
    *,
    runner: Runner | str,
    session: str,
) -> None:
    """Run units until none is left, those of one base model together where priorities allow."""
    warm: str | None = None
    with _place(dispatcher, runtime, cache_gib, runner=runner, session=session) as run:
        while (unit := dispatcher.next(warm=warm)) is not None:
            dispatcher.started(unit.id)
            try:
                if is_group(unit.resource):
                    dispatcher.settle(
                        unit.id,
                        _worker_group(
                            dispatcher,
                            unit,
                            runtime,
                            cache_gib,
                            runner=str(runner),
                            session=session,
                        ),
                    )
                else:
                    dispatcher.settle(unit.id, run(unit.stages, dispatcher.attempt(unit.id)))
                    warm = unit.affinity
            except (GroupEnded, WorkerLost) as lost:
                dispatcher.lost(unit.id, str(lost))
                warm = None


@contextmanager
def _place(
    dispatcher: Dispatcher,
    runtime: Runtime,
    cache_gib: float,
    *,
    runner: Runner | str,
    session: str,
) -> Iterator[RunUnit]:
    """What runs the units that are no worker groups."""
    if runtime.timeout_s is None and _can_compute(runtime):
        here = imported(session)(dispatcher.store, runtime, cache_gib)
        yield lambda stages, attempt: run_unit(
            stages, dispatcher.store, here, runner, attempt=attempt
        )
        return
    worker = Worker(
        store=dispatcher.store.uri,
        runtime=runtime,
        cache_gib=cache_gib,
        runner=str(runner),
        session=session,
    )
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


def _worker_group(
    dispatcher: Dispatcher,
    unit: Unit,
    runtime: Runtime,
    cache_gib: float,
    *,
    runner: str,
    session: str,
) -> list[StageResult]:
    cores = cpus_of(unit.resource, dispatcher.plan.spec) / workers_of(unit.resource)
    order = GroupOrder(
        stages=unit.stages,
        store=dispatcher.store.uri,
        runtime=runtime,
        cache_gib=cache_gib,
        runner=runner,
        session=session,
        attempt=dispatcher.attempt(unit.id),
        threads=max(1, int(cores)),
    )
    return run_worker_group(order, launch_here, dispatcher.store)
