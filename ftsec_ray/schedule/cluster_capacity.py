"""How many units the connected cluster can run, now and if it grows, and whether any of its nodes
is large enough.
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
"""Units that may wait in addition to the slots of an external cluster, so that an autoscaler sees
the demand. A local Ray cannot grow and gets none.
"""
STALL_S = 300.0
"""A run is stalled after so many seconds without an event, with free resources for a waiting unit
and no unit running; its workers are then restarted.
"""
MAX_RESTARTS = 3
"""Restarts of workers after a stall, at most."""
NO_NODE_S = 600.0
"""A run is given up after so many seconds in which nothing runs, no node is large enough for a
waiting unit, and no node is being added.
"""
GROWTH_S = 5.0
"""Seconds between two checks of the size of a cluster that can grow."""


class ClusterCapacity:
    """The resources that the units of a run use, and those of the connected cluster."""

    def __init__(self, dispatcher: Dispatcher, *, workers: int | None, can_grow: bool) -> None:
        import ray

        plan = dispatcher.plan
        bundles = bundles_of(plan.spec, {stage.resource for stage in plan.stages.values()})
        have = ray.cluster_resources()
        self.can_grow = can_grow
        self.used = {unit.resource for unit in dispatcher.units.values()}
        """Resource classes of the units to run."""
        self.requests = {
            resource: request_of(resource, bundle, have) for resource, bundle in bundles.items()
        }
        """Resource class -> bundles that the worker of one unit requests."""
        self.bundles: Bundles = bundles | {
            resource: total_of(group)
            for resource, group in self.requests.items()
            if is_data(resource)
        }
        """Resource class -> resources that one unit uses."""
        self._workers = workers
        if not can_grow:
            self._check_nodes()

    def _check_nodes(self) -> None:
        """Raise EnvironmentFault if a resource class fits on no node: this cluster cannot grow, so
        its units would wait forever.
        """
        import ray

        for resource in self.used:
            least = self.bundles[resource] if is_group(resource) else self.requests[resource][-1]
            if not any(fits(least, node["Resources"]) for node in ray.nodes() if node["Alive"]):
                raise EnvironmentFault(
                    f"this machine is too small for a unit of resource class {resource!r}",
                    ray.cluster_resources(),
                    f"at least {least}",
                    "lower `resources` in the sweep, or use a cluster with --address",
                )

    def free_slots_and_limit(self, *, least: int = 1) -> tuple[FreeSlots, int]:
        """The free slots of each resource class, and the limit of live units (waiting or running)
        of all classes together.

        Args:
            least: Lower bound of the limit, regardless of the sweep's `workers`.
        """
        import ray

        have = ray.cluster_resources()
        used = {resource: self.bundles[resource] for resource in self.used}
        slots = {resource: max(1, count) for resource, count in slots_of(used, have).items()}
        if self.can_grow:
            slots = {
                resource: count if is_group(resource) else max(count, self._workers or 0) + SURPLUS
                for resource, count in slots.items()
            }
        limit = min(sum(slots.values()), max(self._workers or 2**31, least))
        free_slots = (
            growing_capacity(slots, self.bundles, ray.cluster_resources)
            if self.can_grow
            else fixed_capacity(self.bundles, have)
        )
        return free_slots, limit

    def has_capacity(self, classes: Collection[str]) -> bool:
        """Whether the cluster has free resources for a unit of one of the classes now."""
        import ray

        free = ray.available_resources()
        return any(fits(self.bundles[resource], free) for resource in classes)


@contextmanager
def connected_capacity(
    dispatcher: Dispatcher,
    resources: ResourceSpec,
    *,
    address: str | None,
    workers: int | None,
    switches: Mapping[str, str] | None = None,
) -> Iterator[ClusterCapacity]:
    """Connect to Ray, and give the capacity of the cluster for the units of a dispatcher.

    Args:
        dispatcher: The units to run.
        resources: The `resources` of the sweep.
        address: Address of a cluster; None for that of `RAY_ADDRESS`, else a local Ray. Only a
            cluster with an address can grow.
        workers: Units to run at once.
        switches: Environment variables of this process during the run.
    """
    address = cluster_address(address)
    used = {unit.resource for unit in dispatcher.units.values()}
    least_cpus = max(
        (
            bundle["CPU"]
            for resource, bundle in bundles_of(dispatcher.plan.spec, used).items()
            if is_group(resource)
        ),
        default=0.0,
    )
    with ray_session(address, workers, resources, least_cpus, switches=switches):
        yield ClusterCapacity(dispatcher, workers=workers, can_grow=address is not None)


class GrowthMonitor:
    """Checks from time to time whether a cluster that can grow will ever run the waiting units."""

    def __init__(self, capacity: ClusterCapacity) -> None:
        self._capacity = capacity
        self._looked = self._had_node = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next check."""
        return self._capacity.can_grow and time.monotonic() - self._looked >= GROWTH_S

    def look(
        self, live: Collection[str], running: Collection[str], last_event: float
    ) -> EnvironmentFault | None:
        """The fault of a run in which all units wait for nodes that do not exist and are not being
        added; None otherwise.

        Args:
            live: Resource classes of the units that wait or run.
            running: Resource classes of the units that run.
            last_event: Monotonic time of the latest event.
        """
        import ray

        now = self._looked = time.monotonic()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        waiting = set(live)
        too_large = {resource for resource in waiting if not self._has_nodes(resource, nodes)}
        # The driver of a worker group runs while its workers wait.
        is_running = any(not (is_group(resource) and resource in too_large) for resource in running)
        if is_running or not waiting or waiting != too_large or is_growing():
            self._had_node = now
            return None
        if now - max(self._had_node, last_event) <= NO_NODE_S:
            return None
        return EnvironmentFault(
            "no node of the cluster is large enough for a unit of resource class"
            f" {' or '.join(map(repr, sorted(waiting)))}, and no node is being added",
            sorted({_shape(node) for node in nodes}),
            " or ".join(self._asked(resource) for resource in sorted(waiting)),
            "lower `resources` in the sweep, or add a larger node type to the cluster; then run"
            " again: finished stages are kept",
        )

    def _has_nodes(self, resource: str, nodes: Collection[Mapping[str, float]]) -> bool:
        """Whether the nodes could run a unit of a resource class if they were empty; the workers of
        one unit may run on several nodes.
        """
        share = share_of(resource, self._capacity.bundles[resource])
        slots = sum(slots_of({resource: share}, node)[resource] for node in nodes)
        return slots >= (workers_of(resource) if is_group(resource) else 1)

    def _asked(self, resource: str) -> str:
        each = _shape(share_of(resource, self._capacity.bundles[resource])) + " on one node"
        return f"{workers_of(resource)} x {each}" if is_group(resource) else each


def is_stalled(quiet_s: float, *, is_running: bool) -> bool:
    """Whether units have waited too long for workers to start."""
    return not is_running and quiet_s > STALL_S


def stall_fault(waiting: int, bundles: Bundles) -> EnvironmentFault:
    """The error of a run whose workers never started."""
    import ray

    return EnvironmentFault(
        f"Ray started none of {waiting} waiting units, in {MAX_RESTARTS + 1} attempts",
        ray.available_resources(),
        f"free resources for one of {bundles}",
        "check `ray status` and the logs of the cluster, then run again",
    )


def is_growing() -> bool:
    """Whether an autoscaler is adding nodes."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_launches or status.pending_nodes)


def _shape(resources: Mapping[str, float]) -> str:
    """CPU cores and GPUs as text."""
    return " + ".join(
        f"{resources.get(name, 0.0):g} {name}"
        for name in ("CPU", "GPU")
        if name == "CPU" or name in resources
    )
