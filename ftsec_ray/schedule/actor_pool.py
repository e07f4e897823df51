"""The Ray actors of a run: one worker each, which keeps its session between units.

An actor holds the CPU cores and GPUs of its resource class until it ends, even while it is idle. So
an idle actor is stopped if another class or a worker group needs its resources, or if it is idle
for some time in a cluster that can shrink.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.plan.stage import Unit, is_data, is_group
from ftsec_ray.schedule.cluster_capacity import ClusterCapacity
from ftsec_ray.schedule.ray_worker import RayWorker

IDLE_S = 60.0
"""Seconds that an actor may be idle in a cluster that can grow and shrink."""
PATIENCE_S = 2.0
"""Seconds that an actor may wait to start on a cluster of several nodes before idle actors are
stopped: the nodes together may have enough resources, but no single node.
"""


@dataclass(eq=False, kw_only=True)
class PooledActor:
    """An actor that is starting, idle, or running a unit."""

    resource: str
    handle: Any
    group: Any
    """Its own placement group, or None."""
    waits_for: Any
    """Ray's reference to its start, to its unit, or to a health check; None while it is idle."""
    unit: Unit | None = None
    is_starting: bool = True
    warm: str = ""
    """Base model of its last unit."""
    since: float = field(default_factory=time.monotonic)
    """Monotonic time when it began to start or became idle."""

    @property
    def is_idle(self) -> bool:
        """Whether it can take a unit now."""
        return self.waits_for is None


class ActorPool:
    """All actors of a run."""

    def __init__(self, spec: WorkerSpec, capacity: ClusterCapacity) -> None:
        import ray

        self._spec = spec
        self._capacity = capacity
        # Set when the process starts, because libraries read these variables on import.
        environment = {"env_vars": dict(spec.environment)}
        self._actor_class = ray.remote(runtime_env=environment)(RayWorker)
        self._have: Mapping[str, float] = {}
        self._nodes = 1
        self.actors: list[PooledActor] = []
        self.measure()

    def measure(self) -> None:
        """Update the resources and the number of nodes of the cluster."""
        import ray

        self._have = ray.cluster_resources()
        self._nodes = sum(node["Alive"] for node in ray.nodes())

    # Units.

    @property
    def warm(self) -> str | None:
        """Base model of the actor that became idle most recently."""
        idle = [actor for actor in self.actors if actor.is_idle]
        return max(idle, key=lambda actor: actor.since).warm if idle else None

    def run(self, unit: Unit, attempt: int) -> bool:
        """Start a unit on an idle actor, if possible one with its base model in memory; False if no
        actor of its resource class is idle.
        """
        idle = [actor for actor in self.actors if actor.is_idle and actor.resource == unit.resource]
        if not idle:
            return False
        actor = max(idle, key=lambda candidate: (candidate.warm == unit.affinity, candidate.since))
        actor.waits_for = actor.handle.run.remote(unit.stages, unit.resource, attempt)
        actor.unit = unit
        return True

    def probe_idle(self) -> None:
        """Start a health check of all idle actors: their node may be lost, and a unit sent to such
        an actor would waste an attempt.
        """
        for actor in self.actors:
            if actor.is_idle:
                actor.waits_for = actor.handle.__ray_ready__.remote()

    def became_idle(self, actor: PooledActor) -> None:
        """Mark an actor as idle: it has started, finished its unit, or passed a health check."""
        if actor.unit is not None:
            actor.warm = actor.unit.affinity
        actor.unit, actor.waits_for, actor.is_starting = None, None, False
        actor.since = time.monotonic()

    # Actors.

    def start(self, waiting: Mapping[str, int]) -> None:
        """Start actors until each resource class has as many starting actors as waiting units."""
        starting = Counter(actor.resource for actor in self.actors if actor.is_starting)
        for resource, count in waiting.items():
            for _ in range(count - starting[resource]):
                self.actors.append(self._started(resource))

    def _started(self, resource: str) -> PooledActor:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        (own, *others) = self._capacity.requests[resource]
        group, place = None, {}
        if is_data(resource):  # reserves the bundles of the pipeline's actors, all at once
            group = ray.util.placement_group(others)
            place["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_capture_child_tasks=True
            )
        options = {
            "num_cpus": own.get("CPU", 0.0),
            "num_gpus": own.get("GPU", 0.0),
            "memory": own.get("memory"),
            **place,
        }
        handle = self._actor_class.options(**options).remote(self._spec, self._capacity.bundles)
        return PooledActor(
            resource=resource,
            handle=handle,
            group=group,
            waits_for=handle.__ray_ready__.remote(),
        )

    def discard(self, actors: Iterable[PooledActor]) -> None:
        """Stop actors and release their resources."""
        import ray

        for actor in list(actors):
            self.actors.remove(actor)
            ray.kill(actor.handle)
            if actor.group is not None:
                ray.util.remove_placement_group(actor.group)

    def make_way(self, waiting: Mapping[str, int], *, has_group: bool) -> None:
        """Stop spare actors that hold resources which others wait for.

        Args:
            waiting: Resource class -> number of units that wait for an actor to start.
            has_group: Whether a worker group waits or runs: its processes request their cores and
                GPUs themselves.
        """
        now = time.monotonic()
        spare = self._spare(waiting)
        if has_group:
            self.discard(actor for actor in spare if not is_group(actor.resource))
            return
        needed = [actor for actor in self.actors if actor.is_starting and actor not in spare]
        if self._nodes > 1 and any(now - actor.since > PATIENCE_S for actor in needed):
            self.discard(spare)
        elif needed:
            while spare and self._is_short():
                self.discard([spare.pop(0)])
        if self._capacity.can_grow:
            self.discard(
                actor
                for actor in self._spare(waiting)
                if actor.is_starting or now - actor.since > IDLE_S
            )

    def _spare(self, waiting: Mapping[str, int]) -> list[PooledActor]:
        """Actors that are idle, or that are starting without a waiting unit; longest first."""
        spare = [actor for actor in self.actors if actor.is_idle]
        left = Counter(waiting)
        for actor in self.actors:
            if actor.is_starting:
                left[actor.resource] -= 1
                if left[actor.resource] < 0:
                    spare.append(actor)
        return sorted(spare, key=lambda actor: actor.since)

    def _is_short(self) -> bool:
        """Whether all actors together hold or request more than the cluster has."""
        taken: Counter[str] = Counter()
        for actor in self.actors:
            if not is_group(actor.resource) or actor.unit is not None:
                taken.update(self._capacity.bundles[actor.resource])  # type: ignore[arg-type]
        return any(amount > self._have.get(name, 0.0) + 1e-6 for name, amount in taken.items())
