"""Run a plan in this process, one unit after the other: for debugging and for machines without Ray.

A gang unit starts its processes on this machine and waits for them.
"""

from __future__ import annotations

from ftsec_ray.context import Runtime
from ftsec_ray.execute.gang import GangOrder
from ftsec_ray.execute.unit import Runner, StageVerdict, imported, run_unit
from ftsec_ray.plan.resources import cpus_of
from ftsec_ray.plan.stage import Unit, is_gang, workers_of
from ftsec_ray.schedule.conductor import Conductor
from ftsec_ray.schedule.gang import GangEnded, launch_here, run_gang


def run_local(conductor: Conductor, runtime: Runtime, cache_gib: float, *, runner: Runner | str, session: str) -> None:
    """Run units until none is left, those of one base model together where priorities allow."""
    warm: str | None = None
    here = imported(session)(conductor.store, runtime, cache_gib)
    while (unit := conductor.next(warm=warm)) is not None:
        conductor.started(unit.id)
        if is_gang(unit.resource):
            try:
                conductor.settle(unit.id, _gang(conductor, unit, runtime, cache_gib, runner=str(runner), session=session))
            except GangEnded as ended:
                conductor.lost(unit.id, str(ended))
        else:
            attempt = conductor.attempt(unit.id)
            conductor.settle(unit.id, run_unit(unit.stages, conductor.store, here, runner, attempt=attempt))
            warm = unit.affinity


def _gang(conductor: Conductor, unit: Unit, runtime: Runtime, cache_gib: float, *, runner: str, session: str) -> list[StageVerdict]:
    cores = cpus_of(unit.resource, conductor.plan.spec) / workers_of(unit.resource)
    order = GangOrder(stages=unit.stages, store=conductor.store.uri, runtime=runtime, cache_gib=cache_gib, runner=runner, session=session,
                      attempt=conductor.attempt(unit.id), threads=max(1, int(cores)))
    return run_gang(order, launch_here, conductor.store)
