"""Run a plan in this process, one unit after the other: for debugging and for machines without Ray."""

from __future__ import annotations

from typing import Any

from ftsec_ray.execute.unit import Runner, run_unit
from ftsec_ray.execute.worker import Worker, WorkerLost
from ftsec_ray.schedule.conductor import Conductor


def run_local(conductor: Conductor, session: Any, runner: Runner | str) -> None:  # noqa: ANN401
    """Run units until none is left, those of one base model together where priorities allow."""
    warm: str | None = None
    while (unit := conductor.next(warm=warm)) is not None:
        conductor.started(unit.id)
        attempt = conductor.attempt(unit.id)
        conductor.settle(unit.id, run_unit(unit.stages, conductor.store, session, runner, attempt=attempt))
        warm = unit.affinity


def run_beside(conductor: Conductor, worker: Worker) -> None:
    """The same in one process beside this one, since a stage that is over its time takes its process along."""
    warm: str | None = None
    try:
        while (unit := conductor.next(warm=warm)) is not None:
            conductor.started(unit.id)
            try:
                conductor.settle(unit.id, worker.run(unit.stages, conductor.attempt(unit.id)))
                warm = unit.affinity
            except WorkerLost as error:
                conductor.lost(unit.id, str(error))
                warm = None
    finally:
        worker.close()
