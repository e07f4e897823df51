"""How many units of each resource class a cluster can run, computed from its CPU cores and GPUs.

For a worker group, the worker of the unit is only a driver that requests almost nothing; the
processes of the group request their resources themselves. So the resources that a unit uses (its
bundle) differ from those that its worker requests. Slots are counted by bundles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.plan.resources import cpus_of, gpus_of
from ftsec_ray.plan.stage import is_data, is_group, workers_of

Bundles = Mapping[str, Mapping[str, float]]
"""Resource class -> resources that one unit uses."""
Requests = Mapping[str, list[dict[str, float]]]
"""Resource class -> bundles that the worker of one unit requests, the first one for itself."""
DRIVER = {"memory": 1.0}
"""Request of the driver of a worker group: Ray requires a request, and one byte of memory leaves
all cores to the group.
"""
FreeSlots = Callable[[Mapping[str, int]], Mapping[str, int]]
"""Number of live units (waiting or running) of each class -> number of units that may be added."""


def bundles_of(spec: SweepSpec, classes: Iterable[str]) -> dict[str, dict[str, float]]:
    """Resource class -> resources that one unit uses."""
    bundles = {}
    for resource in sorted(classes):
        gpus = gpus_of(resource)
        bundles[resource] = {"CPU": cpus_of(resource, spec), **({"GPU": gpus} if gpus else {})}
    return bundles


def fits(bundle: Mapping[str, float], have: Mapping[str, float]) -> bool:
    """Whether the resources `have` are enough for a bundle."""
    return all(have.get(name, 0.0) >= amount for name, amount in bundle.items())


def request_of(
    resource: str, bundle: Mapping[str, float], have: Mapping[str, float]
) -> list[dict[str, float]]:
    """The bundles that the worker of a unit requests, the first one for itself.

    They do not include the processes of a worker group. For a `data` class, the worker requests
    nothing for itself, and one bundle for each worker of its pipeline. If the cluster cannot run
    all of these workers, fewer are requested: the pipeline is then slower, with the same result.

    Args:
        resource: Resource class of the unit.
        bundle: Resources that the unit uses.
        have: Resources of the cluster.
    """
    if is_group(resource):
        return [dict(DRIVER)]
    if not is_data(resource):
        return [dict(bundle)]
    each, workers = share_of(resource, bundle), workers_of(resource)
    return [{}, *[each] * min(workers, slots_of({resource: each}, have)[resource] or workers)]


def share_of(resource: str, bundle: Mapping[str, float]) -> dict[str, float]:
    """Resources that one process of a unit uses."""
    return {name: amount / workers_of(resource) for name, amount in bundle.items()}


def total_of(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of several bundles."""
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)  # type: ignore[arg-type]  # a Counter adds floats as well
    return dict(total)


def slots_of(bundles: Bundles, have: Mapping[str, float]) -> dict[str, int]:
    """Number of units of each class that these resources can run at once, without units of other
    classes.
    """
    return {
        resource: int(min(have.get(name, 0.0) / amount for name, amount in bundle.items()) + 1e-6)
        for resource, bundle in bundles.items()
    }


def fixed_capacity(bundles: Bundles, have: Mapping[str, float]) -> FreeSlots:
    """Free slots of a cluster that cannot grow: all classes share its cores and GPUs; if nothing is
    live, there is always one free slot.
    """

    def free_slots(taken: Mapping[str, int]) -> Mapping[str, int]:
        left = {
            name: amount
            - sum(count * bundles[resource].get(name, 0.0) for resource, count in taken.items())
            for name, amount in have.items()
        }
        least = 0 if any(taken.values()) else 1
        return {resource: max(least, count) for resource, count in slots_of(bundles, left).items()}

    return free_slots


def growing_capacity(
    most: Mapping[str, int], bundles: Bundles, have: Callable[[], Mapping[str, float]]
) -> FreeSlots:
    """Free slots of a cluster that can grow: at most `most` of each class, independent of the other
    classes.

    While a worker group is live, slots are limited to the current resources of the cluster: other
    waiting units would take each free core at once, but the group needs all of its resources
    together.

    Args:
        most: Largest number of live units of each class.
        bundles: Resources that a unit of each class uses.
        have: Returns the current resources of the cluster.
    """

    def free_slots(taken: Mapping[str, int]) -> Mapping[str, int]:
        free = {resource: count - taken.get(resource, 0) for resource, count in most.items()}
        if not any(count for resource, count in taken.items() if is_group(resource)):
            return free
        now = fixed_capacity(bundles, have())(taken)
        return {resource: min(count, now[resource]) for resource, count in free.items()}

    return free_slots
