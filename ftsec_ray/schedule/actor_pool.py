"""The Ray actors of a run: one worker each, which keeps its session from unit to unit.

An actor holds the cores and GPUs of its resource class as long as it lives, idle or not. So an idle
one is let go when another class, or a worker group, lacks what it holds, and in a cluster that may
shrink when it has been idle for a while.
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
"""Seconds that an actor may be idle in a cluster that may grow, and so shrink."""
PATIENCE_S = 2.0
"""Seconds that an actor may take to start on a cluster of several nodes before idle ones make way,
even where the sum of all nodes would hold them all: the node that it needs may not.
"""


@dataclass(eq=False, kw_only=True)
class PooledActor:
    """An actor that starts, is idle or runs a unit."""

    resource: str
    handle: Any
    group: Any
    """Its placement group; None: it has none of its own."""
    waits_for: Any
    """Ray's reference to its start, to its unit, or to a sign of life; None while it is idle."""
    unit: Unit | None = None
    is_starting: bool = True
    warm: str = ""
    """Base model of the unit that it ran last."""
    since: float = field(default_factory=time.monotonic)
    """Monotonic time at which it began to start, or became idle."""

    @property
    def is_idle(self) -> bool:
        """Whether it could take a unit now."""
        return self.waits_for is None


class ActorPool:
    """All actors of a run."""

    def __init__(self, spec: WorkerSpec, capacity: ClusterCapacity) -> None:
        import ray

        self._spec = spec
        self._capacity = capacity
        # At the start of the process: libraries read theirs when they are imported.
        environment = {"env_vars": dict(spec.environment)}
        self._actor_class = ray.remote(runtime_env=environment)(RayWorker)
        self._have: Mapping[str, float] = {}
        self._nodes = 1
        self.actors: list[PooledActor] = []
        self.measure()

    def measure(self) -> None:
        """Take note of what the cluster has."""
        import ray

        self._have = ray.cluster_resources()
        self._nodes = sum(node["Alive"] for node in ray.nodes())

    # Units.

    @property
    def warm(self) -> str | None:
        """Base model of the actor that has become idle last."""
        idle = [actor for actor in self.actors if actor.is_idle]
        return max(idle, key=lambda actor: actor.since).warm if idle else None

    def run(self, unit: Unit, attempt: int) -> bool:
        """Have an idle actor run a unit, one that has its base model in memory if there is one;
        False when none of its class is idle.
        """
        idle = [one for one in self.actors if one.is_idle and one.resource == unit.resource]
        if not idle:
            return False
        actor = max(idle, key=lambda one: (one.warm == unit.affinity, one.since))
        actor.waits_for = actor.handle.run.remote(unit.stages, unit.resource, attempt)
        actor.unit = unit
        return True

    def probe_idle(self) -> None:
        """Ask idle actors for a sign of life: they may have been on a node that is lost, and a unit
        that goes to one of them would lose an attempt for nothing.
        """
        for actor in self.actors:
            if actor.is_idle:
                actor.waits_for = actor.handle.__ray_ready__.remote()

    def became_idle(self, actor: PooledActor) -> None:
        """An actor has started, has come back from its unit, or is still alive."""
        if actor.unit is not None:
            actor.warm = actor.unit.affinity
        actor.unit, actor.waits_for, actor.is_starting = None, None, False
        actor.since = time.monotonic()

    # Actors.

    def start(self, waiting: Mapping[str, int]) -> None:
        """Have as many actors of each class on their way as units of it wait."""
        starting = Counter(actor.resource for actor in self.actors if actor.is_starting)
        for resource, count in waiting.items():
            for _ in range(count - starting[resource]):
                self.actors.append(self._started(resource))

    def _started(self, resource: str) -> PooledActor:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        (own, *others) = self._capacity.requests[resource]
        group, place = None, {}
        if is_data(resource):  # the bundles are for the actors of its pipelines, and all at once
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
        """End actors and give back what they hold."""
        import ray

        for actor in list(actors):
            self.actors.remove(actor)
            ray.kill(actor.handle)
            if actor.group is not None:
                ray.util.remove_placement_group(actor.group)

    def make_way(self, waiting: Mapping[str, int], *, has_group: bool) -> None:
        """Let go of actors that nobody needs now and that hold what others wait for.

        Args:
            waiting: units of each class that wait for an actor to start.
            has_group: whether a worker group waits or runs: its processes take their cores and GPUs
                by themselves.
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
        """Actors that are idle or start for no unit, those first that are so for longest."""
        spare = [actor for actor in self.actors if actor.is_idle]
        left = Counter(waiting)
        for actor in self.actors:
            if actor.is_starting:
                left[actor.resource] -= 1
                if left[actor.resource] < 0:
                    spare.append(actor)
        return sorted(spare, key=lambda actor: actor.since)

    def _is_short(self) -> bool:
        """Whether all actors together hold or want more than the cluster has."""
        taken: Counter[str] = Counter()
        for actor in self.actors:
            if not is_group(actor.resource) or actor.unit is not None:
                taken.update(self._capacity.bundles[actor.resource])  # type: ignore[arg-type]
        return any(amount > self._have.get(name, 0.0) + 1e-6 for name, amount in taken.items())
