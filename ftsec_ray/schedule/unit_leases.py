"""The units that an executor on Ray has taken from the dispatcher and not yet settled, and how many
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
"""Workers that may fail to open before any unit ended, until the run is given up."""
_OUT_OF_MEMORY = re.compile("low on memory|memory usage threshold")
"""What Ray says of a worker that it killed itself, before the kernel would."""
_ABOUT_THE_ACTOR = re.compile(r"Failure # |\s*(class_name|actor_id|pid|name|namespace|ip): ")
"""Lines of what Ray says of a death that name the process and not the reason."""


class UnitLeases:
    """Units that wait for a worker or run on one."""

    def __init__(self, dispatcher: Dispatcher, *, free_slots: FreeSlots, limit: int) -> None:
        self.dispatcher = dispatcher
        self.free_slots = free_slots
        """Units of each resource class that may wait or run beside those that do."""
        self.limit = limit
        """The same of all classes together."""
        self.live: set[str] = set()
        """Ids of the units."""
        self.warm: str | None = None
        """Base model of the unit that ended last; None before the first."""
        self.broken: list[str] = []
        """What workers said that could not open."""
        self._wide: set[str] = set()
        """Pipelines that wait for all of their cores."""

    @property
    def classes(self) -> Counter[str]:
        """Units of each resource class."""
        return Counter(self.dispatcher.units[unit].resource for unit in self.live)

    @property
    def has_group(self) -> bool:
        """Whether a worker group waits or runs."""
        return any(is_group(self.dispatcher.units[unit].resource) for unit in self.live)

    @property
    def is_broken(self) -> bool:
        """Whether one worker after the other could not open, and none ever ended a unit."""
        return self.warm is None and len(self.broken) >= BROKEN_LIMIT

    def take(self, warm: str | None) -> Unit | None:
        """The next unit; None while there is no room for another, or when none is ready.

        Args:
            warm: base model that the worker has in memory that is likely to get it.
        """
        if len(self.live) >= self.limit or self._wide:
            # what would take one of the cores for which a pipeline waits, one by one, waits as well
            return None
        free = {
            one: max(1, count) if is_data(one) else count
            for one, count in self.free_slots(self.classes).items()
        }
        unit = self.dispatcher.next(free=free, warm=warm)
        if unit is not None:
            self.live.add(unit.id)
            if is_data(unit.resource):
                self._wide.add(unit.id)
        return unit

    def started(self, unit: str) -> None:
        """A worker took a unit."""
        self._wide.discard(unit)
        self.dispatcher.started(unit)

    def answered(self, unit: str, answer: Answer) -> None:
        """A worker came back from a unit."""
        if "verdicts" not in answer:
            if "broken" in answer:
                self.broken.append(answer["broken"])
            self.lost(
                unit,
                answer.get("broken") or answer.get("lost") or "the worker gave no verdict",
            )
            return
        self._drop(unit)
        self.warm = self.dispatcher.units[unit].affinity
        self.dispatcher.settle(unit, [StageResult(**one) for one in json.loads(answer["verdicts"])])

    def lost(self, unit: str, why: str, *, counted: bool = True) -> None:
        """The worker of a unit is gone; `counted`: it was not the cluster that took it away."""
        self._drop(unit)
        self.dispatcher.lost(
            unit,
            why,
            code="oom" if _OUT_OF_MEMORY.search(why) else "worker_lost",
            counted=counted,
        )

    def abandon(self) -> None:
        """Give back all units that no worker answered for."""
        for unit in list(self.live):
            self._drop(unit)
            self.dispatcher.abandon(unit)

    def _drop(self, unit: str) -> None:
        self.live.discard(unit)
        self._wide.discard(unit)

    def broken_fault(self, runner: str) -> EnvironmentFault:
        """Why no unit can run at all."""
        return EnvironmentFault(
            f"workers cannot open: {self.broken[-1]}",
            runner,
            "workers that have ftsec_ray installed and can reach the store",
            "install the same version on all nodes, or look at the text above",
        )


def death_text(lines: Iterable[str]) -> str:
    """What Ray says of the death of a worker, without what names the process."""
    told = " ".join(line.strip() for line in lines if not _ABOUT_THE_ACTOR.match(line))
    return told or "the worker ended without a verdict"
