"""Run units one after the other, without Ray.

They run in this process, or where stages have a time limit in one beside it, since a stage that is over its time takes its process
along. A gang unit starts its processes on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ftsec_ray.context import Runtime
from ftsec_ray.execute.gang import GangOrder
from ftsec_ray.execute.unit import Runner, StageVerdict, imported, run_unit
from ftsec_ray.execute.worker import Worker, WorkerLost
from ftsec_ray.plan.resources import cpus_of
from ftsec_ray.plan.stage import Stage, Unit, is_gang, workers_of
from ftsec_ray.schedule.conductor import Conductor
from ftsec_ray.schedule.gang import GangEnded, launch_here, run_gang

RunUnit = Callable[[Sequence[Stage], int], list[StageVerdict]]
"""(stages of a unit, attempt) -> their verdicts; raises WorkerLost."""


def run_local(conductor: Conductor, runtime: Runtime, cache_gib: float, *, runner: Runner | str, session: str) -> None:
    """Run units until none is left, those of one base model together where priorities allow."""
    warm: str | None = None
    with _place(conductor, runtime, cache_gib, runner=runner, session=session) as run:
        while (unit := conductor.next(warm=warm)) is not None:
            conductor.started(unit.id)
            try:
                if is_gang(unit.resource):
                    conductor.settle(unit.id, _gang(conductor, unit, runtime, cache_gib, runner=str(runner), session=session))
                else:
                    conductor.settle(unit.id, run(unit.stages, conductor.attempt(unit.id)))
                    warm = unit.affinity
            except (GangEnded, WorkerLost) as lost:
                conductor.lost(unit.id, str(lost))
                warm = None


@contextmanager
def _place(conductor: Conductor, runtime: Runtime, cache_gib: float, *, runner: Runner | str, session: str) -> Iterator[RunUnit]:
    """What runs the units that are no gangs."""
    if runtime.timeout_s is None:
        here = imported(session)(conductor.store, runtime, cache_gib)
        yield lambda stages, attempt: run_unit(stages, conductor.store, here, runner, attempt=attempt)
        return
    worker = Worker(store=conductor.store.uri, runtime=runtime, cache_gib=cache_gib, runner=str(runner), session=session)
    try:
        yield worker.run
    finally:
        worker.close()


def _gang(conductor: Conductor, unit: Unit, runtime: Runtime, cache_gib: float, *, runner: str, session: str) -> list[StageVerdict]:
    cores = cpus_of(unit.resource, conductor.plan.spec) / workers_of(unit.resource)
    order = GangOrder(stages=unit.stages, store=conductor.store.uri, runtime=runtime, cache_gib=cache_gib, runner=runner, session=session,
                      attempt=conductor.attempt(unit.id), threads=max(1, int(cores)))
    return run_gang(order, launch_here, conductor.store)
