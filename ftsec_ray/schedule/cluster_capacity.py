"""How many units the cluster at hand has room for, now and when it grows, and whether its nodes can
hold them at all.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.plan.stage import is_data, is_group, workers_of
from ftsec_ray.schedule.capacity import (
    Bundles,
    FreeSlots,
    bundles_of,
    fits,
    fixed_capacity,
    growing_capacity,
    request_of,
    share_of,
    slots_of,
    total_of,
)
from ftsec_ray.schedule.cluster_address import cluster_address
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.ray_session import ray_session

SURPLUS = 16
"""Units that wait beyond the slots of a given cluster: an autoscaler sees them. A Ray of our own
cannot grow and has none.
"""
STALL_S = 300.0
"""Seconds without an event, with room for a unit and none running, after which workers are asked
for anew.
"""
MAX_RESTARTS = 3
"""Times that they are."""
NO_NODE_S = 600.0
"""Seconds for which units wait without any other at work, where no node can hold them and none is
on its way, until the run is given up.
"""
GROWTH_S = 5.0
"""Between two looks at how large a cluster is that may grow."""


class ClusterCapacity:
    """What the units of a run occupy, and what the connected cluster has."""

    def __init__(self, dispatcher: Dispatcher, *, workers: int | None, can_grow: bool) -> None:
        import ray

        plan = dispatcher.plan
        bundles = bundles_of(plan.spec, {stage.resource for stage in plan.stages.values()})
        have = ray.cluster_resources()
        self.can_grow = can_grow
        self.used = {unit.resource for unit in dispatcher.units.values()}
        """Resource classes of the units that are left."""
        self.requests = {one: request_of(one, bundle, have) for one, bundle in bundles.items()}
        """Resource class -> the bundles that one unit asks for."""
        self.bundles: Bundles = bundles | {
            one: total_of(group) for one, group in self.requests.items() if is_data(one)
        }
        """Resource class -> what one unit occupies."""
        self._workers = workers
        if not can_grow:
            self._check_nodes()

    def _check_nodes(self) -> None:
        """EnvironmentFault when a class fits on no node: this cluster will not grow, and its units
        would wait for ever.
        """
        import ray

        for one in self.used:
            least = self.bundles[one] if is_group(one) else self.requests[one][-1]
            if not any(fits(least, node["Resources"]) for node in ray.nodes() if node["Alive"]):
                raise EnvironmentFault(
                    f"no room on this machine for a unit of class {one!r}",
                    ray.cluster_resources(),
                    f"at least {least}",
                    "lower `resources` in the sweep, or give --address of a cluster",
                )

    def free_slots_and_limit(self, *, least: int = 1) -> tuple[FreeSlots, int]:
        """Units of each class that may wait or run, and of all classes together.

        Args:
            least: the latter is at least so many, whatever the sweep's `workers`.
        """
        import ray

        have = ray.cluster_resources()
        slots = {
            one: max(1, count)
            for one, count in slots_of({one: self.bundles[one] for one in self.used}, have).items()
        }
        if self.can_grow:
            slots = {
                one: count if is_group(one) else max(count, self._workers or 0) + SURPLUS
                for one, count in slots.items()
            }
        limit = min(sum(slots.values()), max(self._workers or 2**31, least))
        free_slots = (
            growing_capacity(slots, self.bundles, ray.cluster_resources)
            if self.can_grow
            else fixed_capacity(self.bundles, have)
        )
        return free_slots, limit

    def has_capacity(self, classes: Collection[str]) -> bool:
        """Whether the cluster could start a unit of one of the classes right now."""
        import ray

        free = ray.available_resources()
        return any(fits(self.bundles[one], free) for one in classes)


@contextmanager
def connected_capacity(
    dispatcher: Dispatcher,
    resources: ResourceSpec,
    *,
    address: str | None,
    workers: int | None,
    switches: Mapping[str, str] | None = None,
) -> Iterator[ClusterCapacity]:
    """The capacity of a cluster for the units of a dispatcher, while this process is connected to
    it. A cluster at an address, or at that of `RAY_ADDRESS`, may grow.
    """
    address = cluster_address(address)
    used = {unit.resource for unit in dispatcher.units.values()}
    least_cpus = max(
        (
            bundle["CPU"]
            for one, bundle in bundles_of(dispatcher.plan.spec, used).items()
            if is_group(one)
        ),
        default=0.0,
    )
    with ray_session(address, workers, resources, least_cpus, switches=switches):
        yield ClusterCapacity(dispatcher, workers=workers, can_grow=address is not None)


class GrowthMonitor:
    """Looks now and then at a cluster that may grow: how much it has, and whether what waits can
    ever run.
    """

    def __init__(self, capacity: ClusterCapacity) -> None:
        self._capacity = capacity
        self._looked = self._had_node = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return self._capacity.can_grow and time.monotonic() - self._looked >= GROWTH_S

    def look(
        self, live: Collection[str], running: Collection[str], last_event: float
    ) -> EnvironmentFault | None:
        """A fault when all that is left waits for nodes of which there are none and none are
        coming.

        Args:
            live: classes of the units that wait or run.
            running: of those that have a worker.
            last_event: monotonic time of the latest event.
        """
        import ray

        now = self._looked = time.monotonic()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        waiting = set(live)
        homeless = {one for one in waiting if not self._has_nodes(one, nodes)}
        # The driver of a worker group runs while its workers wait.
        is_running = any(not (is_group(one) and one in homeless) for one in running)
        if is_running or not waiting or waiting != homeless or is_growing():
            self._had_node = now
            return None
        if now - max(self._had_node, last_event) <= NO_NODE_S:
            return None
        return EnvironmentFault(
            "no node of the cluster has room for a unit of class"
            f" {' or '.join(map(repr, sorted(waiting)))}, and none is on its way",
            sorted({_shape(node) for node in nodes}),
            " or ".join(self._asked(one) for one in sorted(waiting)),
            "lower `resources` in the sweep, or add a node type with room for it to the"
            " cluster, then run again: what is done stays done",
        )

    def _has_nodes(self, one: str, nodes: Collection[Mapping[str, float]]) -> bool:
        """Whether the nodes, were nothing else at work, could run a unit of a class: workers of one
        unit may be on several.
        """
        share = share_of(one, self._capacity.bundles[one])
        slots = sum(slots_of({one: share}, node)[one] for node in nodes)
        return slots >= (workers_of(one) if is_group(one) else 1)

    def _asked(self, one: str) -> str:
        each = _shape(share_of(one, self._capacity.bundles[one])) + " on one node"
        return f"{workers_of(one)} x {each}" if is_group(one) else each


def is_stalled(quiet_s: float, *, is_running: bool) -> bool:
    """Whether units wait for workers that do not come."""
    return not is_running and quiet_s > STALL_S


def stall_fault(waiting: int, bundles: Bundles) -> EnvironmentFault:
    """Why a run is given up whose workers never came."""
    import ray

    return EnvironmentFault(
        f"Ray started none of {waiting} waiting units, {MAX_RESTARTS + 1} times over",
        ray.available_resources(),
        f"room for one of {bundles}",
        "look at `ray status` and at the cluster's log, then run again",
    )


def is_growing() -> bool:
    """Whether an autoscaler has nodes on their way."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_launches or status.pending_nodes)


def _shape(resources: Mapping[str, float]) -> str:
    """Cores and GPUs in words."""
    return " + ".join(
        f"{resources.get(name, 0.0):g} {name}"
        for name in ("CPU", "GPU")
        if name == "CPU" or name in resources
    )
