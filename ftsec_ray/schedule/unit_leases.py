"""The live units of an executor on Ray: taken from the dispatcher and not yet settled; and how many
more it may take.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.execute.unit import StageResult
from ftsec_ray.plan.stage import Unit, is_data, is_group
from ftsec_ray.schedule.capacity import FreeSlots
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.ray_worker import Answer

BROKEN_LIMIT = 3
"""A run is given up after so many workers failed to start and no unit has ended."""
_OUT_OF_MEMORY = re.compile("low on memory|memory usage threshold")
"""Ray's messages for a worker that it killed for its memory."""
_ABOUT_THE_ACTOR = re.compile(r"Failure # |\s*(class_name|actor_id|pid|name|namespace|ip): ")
"""Lines of Ray's error message that name the process, not the reason."""


class UnitLeases:
    """Live units: they wait for a worker or run on one."""

    def __init__(self, dispatcher: Dispatcher, *, free_slots: FreeSlots, limit: int) -> None:
        self.dispatcher = dispatcher
        self.free_slots = free_slots
        """Returns how many more units of each resource class may be taken."""
        self.limit = limit
        """Limit of live units of all classes together."""
        self.live: set[str] = set()
        """Ids of the live units."""
        self.warm: str | None = None
        """Base model of the unit that ended last; None before the first."""
        self.broken: list[str] = []
        """Errors of workers that failed to start."""
        self._wide: set[str] = set()
        """Ids of data pipelines that wait for all of their resources."""

    @property
    def classes(self) -> Counter[str]:
        """Number of live units of each resource class."""
        return Counter(self.dispatcher.units[unit].resource for unit in self.live)

    @property
    def has_group(self) -> bool:
        """Whether a worker group waits or runs."""
        return any(is_group(self.dispatcher.units[unit].resource) for unit in self.live)

    @property
    def is_broken(self) -> bool:
        """Whether several workers failed to start and no unit has ended."""
        return self.warm is None and len(self.broken) >= BROKEN_LIMIT

    def take(self, warm: str | None) -> Unit | None:
        """The next unit; None if there is no free slot or no unit is ready.

        Args:
            warm: Base model in the memory of the worker that will probably run it.
        """
        if len(self.live) >= self.limit or self._wide:
            # While a data pipeline waits for its cores, no smaller unit may take them one by one.
            return None
        free = {
            resource: max(1, count) if is_data(resource) else count
            for resource, count in self.free_slots(self.classes).items()
        }
        unit = self.dispatcher.next(free=free, warm=warm)
        if unit is not None:
            self.live.add(unit.id)
            if is_data(unit.resource):
                self._wide.add(unit.id)
        return unit

    def started(self, unit: str) -> None:
        """Report that a worker started a unit."""
        self._wide.discard(unit)
        self.dispatcher.started(unit)

    def answered(self, unit: str, answer: Answer) -> None:
        """Process the answer of a worker for a unit."""
        if "verdicts" not in answer:
            if "broken" in answer:
                self.broken.append(answer["broken"])
            self.lost(
                unit,
                answer.get("broken") or answer.get("lost") or "the worker returned no result",
            )
            return
        self._drop(unit)
        self.warm = self.dispatcher.units[unit].affinity
        results = [StageResult(**plain) for plain in json.loads(answer["verdicts"])]
        self.dispatcher.settle(unit, results)

    def lost(self, unit: str, why: str, *, counted: bool = True) -> None:
        """Report that the worker of a unit died; `counted` is False if its node was preempted."""
        self._drop(unit)
        self.dispatcher.lost(
            unit,
            why,
            code="oom" if _OUT_OF_MEMORY.search(why) else "worker_lost",
            counted=counted,
        )

    def abandon(self) -> None:
        """Put back all live units, which got no answer."""
        for unit in list(self.live):
            self._drop(unit)
            self.dispatcher.abandon(unit)

    def _drop(self, unit: str) -> None:
        self.live.discard(unit)
        self._wide.discard(unit)

    def broken_fault(self, runner: str) -> EnvironmentFault:
        """The error of a run in which no worker can start."""
        return EnvironmentFault(
            f"workers fail to start: {self.broken[-1]}",
            runner,
            "workers that have ftsec_ray installed and can reach the store",
            "install the same version on all nodes, or fix the error above",
        )


def death_text(lines: Iterable[str]) -> str:
    """Ray's error message for a dead worker, without the lines that name the process."""
    reason = " ".join(line.strip() for line in lines if not _ABOUT_THE_ACTOR.match(line))
    return reason or "the worker ended without a result"
