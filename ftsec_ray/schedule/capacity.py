"""How many units of each resource class a cluster can run: pure arithmetic on cores and GPUs.

The worker of a worker group unit is a driver that asks for next to nothing; the processes of the
group ask for their resources themselves. So what a unit occupies and what its worker asks for
differ, and it is by the former that worker groups are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.plan.resources import cpus_of, gpus_of
from ftsec_ray.plan.stage import is_data, is_group, workers_of

Bundles = Mapping[str, Mapping[str, float]]
"""Resource class -> what one unit of it occupies."""
Requests = Mapping[str, list[dict[str, float]]]
"""Resource class -> the bundles that the worker of one unit asks for, the first one for itself."""
DRIVER = {"memory": 1.0}
"""What the driver of a worker group asks for: Ray wants something, and a byte leaves every core to
the group.
"""
FreeSlots = Callable[[Mapping[str, int]], Mapping[str, int]]
"""Units of each class that wait or run -> how many more may."""


def bundles_of(spec: SweepSpec, classes: Iterable[str]) -> dict[str, dict[str, float]]:
    """What one unit of each resource class occupies."""
    found = {}
    for one in sorted(classes):
        gpus = gpus_of(one)
        found[one] = {"CPU": cpus_of(one, spec), **({"GPU": gpus} if gpus else {})}
    return found


def fits(bundle: Mapping[str, float], have: Mapping[str, float]) -> bool:
    """Whether these resources hold a unit that occupies the bundle."""
    return all(have.get(name, 0.0) >= amount for name, amount in bundle.items())


def request_of(
    one: str, bundle: Mapping[str, float], have: Mapping[str, float]
) -> list[dict[str, float]]:
    """The bundles that the worker of a unit asks for, the first one for itself.

    The processes of a worker group are not among them. A `data` class has a worker that asks for
    nothing and a bundle for each worker of its pipeline. These are as many as it asks for, or as
    many as the cluster can run: with fewer of them the pipeline is slower and gives the same.
    """
    if is_group(one):
        return [dict(DRIVER)]
    if not is_data(one):
        return [dict(bundle)]
    each = share_of(one, bundle)
    return [{}, *[each] * min(workers_of(one), slots_of({one: each}, have)[one] or workers_of(one))]


def share_of(one: str, bundle: Mapping[str, float]) -> dict[str, float]:
    """What one process of a unit occupies."""
    return {name: amount / workers_of(one) for name, amount in bundle.items()}


def total_of(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What several bundles occupy."""
    found: Counter[str] = Counter()
    for bundle in bundles:
        found.update(bundle)  # type: ignore[arg-type]  # a Counter adds floats as well
    return dict(found)


def slots_of(bundles: Bundles, have: Mapping[str, float]) -> dict[str, int]:
    """Units of each class that these resources run at a time, if those of no other class run beside
    them.
    """
    return {
        one: int(min(have.get(name, 0.0) / amount for name, amount in bundle.items()) + 1e-6)
        for one, bundle in bundles.items()
    }


def fixed_capacity(bundles: Bundles, have: Mapping[str, float]) -> FreeSlots:
    """Free slots of a cluster that does not grow: classes share its cores and GPUs, and the first
    unit always gets its turn.
    """

    def free_slots(taken: Mapping[str, int]) -> Mapping[str, int]:
        left = {
            name: amount - sum(count * bundles[one].get(name, 0.0) for one, count in taken.items())
            for name, amount in have.items()
        }
        least = 0 if any(taken.values()) else 1
        return {one: max(least, count) for one, count in slots_of(bundles, left).items()}

    return free_slots


def growing_capacity(
    most: Mapping[str, int], bundles: Bundles, have: Callable[[], Mapping[str, float]]
) -> FreeSlots:
    """Free slots of a cluster that may grow: so many of each class, whatever the others take.

    Beside a worker group it is what the cluster has now: units that wait for more would take what
    becomes free, one after the other, and a worker group needs all of its share at once.
    """

    def free_slots(taken: Mapping[str, int]) -> Mapping[str, int]:
        ahead = {one: count - taken.get(one, 0) for one, count in most.items()}
        if not any(count for one, count in taken.items() if is_group(one)):
            return ahead
        beside = fixed_capacity(bundles, have())(taken)
        return {one: min(count, beside[one]) for one, count in ahead.items()}

    return free_slots
