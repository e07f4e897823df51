"""Runs units on plain Ray actors (`ray.remote` and `ray.wait`), without Ray Tune.

Units are taken from the dispatcher while there are free slots. A unit runs on an idle actor of its
resource class, else on the first one that becomes idle or has started. As many actors are started
as units wait, so that an autoscaler sees the demand. If an actor dies, its unit is retried on
another one; the dispatcher counts the attempts.
"""

from __future__ import annotations

import time
from collections import Counter, deque

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.plan.stage import Unit
from ftsec_ray.schedule.actor_pool import ActorPool, PooledActor
from ftsec_ray.schedule.cluster_capacity import (
    MAX_RESTARTS,
    ClusterCapacity,
    GrowthMonitor,
    connected_capacity,
    is_stalled,
    stall_fault,
)
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.unit_leases import UnitLeases, death_text

WAKE_S = 1.0
"""Longest wait for an answer of an actor before the run checks its state, in seconds."""


def run_actors(
    dispatcher: Dispatcher,
    spec: WorkerSpec,
    resources: ResourceSpec,
    *,
    address: str | None,
    workers: int | None,
) -> None:
    """Run all units of a dispatcher on Ray actors; see `executors.Executor`."""
    with connected_capacity(dispatcher, resources, address=address, workers=workers) as capacity:
        run = _ActorRun(dispatcher, spec, capacity)
        try:
            while not dispatcher.finished:
                run.step()
        finally:
            run.close()


class _ActorRun:
    """The units that wait for an actor, and the actors."""

    def __init__(self, dispatcher: Dispatcher, spec: WorkerSpec, capacity: ClusterCapacity) -> None:
        self._dispatcher = dispatcher
        self._spec = spec
        self._capacity = capacity
        free_slots, limit = capacity.free_slots_and_limit()
        self._leases = UnitLeases(dispatcher, free_slots=free_slots, limit=limit)
        self._growth = GrowthMonitor(capacity)
        self._pool = ActorPool(spec, capacity)
        self._waiting: dict[str, deque[Unit]] = {}
        """Resource class -> units that have no actor yet."""
        self._restarts = 0
        self._asked_at = time.monotonic()
        """Monotonic time of the last restart of actors after a stall."""

    def step(self) -> None:
        """Start units on free slots, and process the answers of actors."""
        self._hand_out()
        waiting = {resource: len(units) for resource, units in self._waiting.items()}
        self._pool.start(waiting)
        self._pool.make_way(waiting, has_group=self._leases.has_group)
        self._listen()
        self._watch()

    def close(self) -> None:
        """Stop all actors."""
        self._pool.discard(self._pool.actors)

    def _hand_out(self) -> None:
        for units in self._waiting.values():
            while units and self._run(units[0]):
                units.popleft()
        while (unit := self._leases.take(self._pool.warm)) is not None:
            queue = self._waiting.setdefault(unit.resource, deque())
            if queue or not self._run(unit):
                queue.append(unit)

    def _run(self, unit: Unit) -> bool:
        is_taken = self._pool.run(unit, self._dispatcher.attempt(unit.id))
        if is_taken:
            self._leases.started(unit.id)
        return is_taken

    def _listen(self) -> None:
        """Wait until an actor has started, answers or dies, for at most WAKE_S."""
        import ray

        actors = {actor.waits_for: actor for actor in self._pool.actors if not actor.is_idle}
        if not actors:
            return
        if ray.wait(list(actors), timeout=WAKE_S)[0]:
            for reference in ray.wait(list(actors), num_returns=len(actors), timeout=0)[0]:
                self._hear(actors[reference])

    def _hear(self, actor: PooledActor) -> None:
        import ray

        try:
            answer = ray.get(actor.waits_for)
        except ray.exceptions.RayError as error:
            self._lost(actor, error)
            return
        unit = actor.unit
        self._pool.became_idle(actor)
        if unit is not None:
            self._leases.answered(unit.id, answer)
            self._give_up_if_broken()

    def _lost(self, actor: PooledActor, error: Exception) -> None:
        """Handle the death of an actor that ran a unit, was starting for one, or was idle."""
        self._pool.discard([actor])
        self._pool.probe_idle()
        unit, why = actor.unit, death_text(str(error).splitlines())
        if unit is None and actor.is_starting:
            if "creation task" in why:  # it could not import this package
                self._leases.broken.append(why)
                self._give_up_if_broken()
            queue = self._waiting.get(actor.resource)
            unit = queue.popleft() if queue else None
        if unit is not None:
            self._leases.lost(unit.id, why, counted=not getattr(error, "preempted", False))

    def _give_up_if_broken(self) -> None:
        if self._leases.is_broken:
            raise self._leases.broken_fault(self._spec.runner)

    def _watch(self) -> None:
        """Check whether the cluster has grown, and whether waiting units get no actor."""
        leases = self._leases
        running = {actor.resource for actor in self._pool.actors if actor.unit is not None}
        last_event = max(self._dispatcher.last_event, self._asked_at)
        if self._growth.is_due:
            self._pool.measure()
            leases.free_slots, leases.limit = self._capacity.free_slots_and_limit()
            fault = self._growth.look(leases.classes, running, last_event)
            if fault is not None:
                raise fault
        waiting = Counter({resource: len(units) for resource, units in self._waiting.items()})
        if (
            +waiting
            and is_stalled(time.monotonic() - last_event, is_running=bool(running))
            and self._capacity.has_capacity(+waiting)
        ):
            if self._restarts == MAX_RESTARTS:
                raise stall_fault(waiting.total(), self._capacity.bundles)
            self._restarts += 1
            self._asked_at = time.monotonic()
            self._pool.discard(actor for actor in self._pool.actors if actor.is_starting)
