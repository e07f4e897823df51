"""How many units of each resource class a cluster has room for: pure arithmetic on cores and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ftsec_ray.plan.resources import cpus_of, gpus_of
from ftsec_ray.spec.sweep import SweepSpec

Bundles = Mapping[str, Mapping[str, float]]
"""Resource class -> what one unit of it occupies."""
Room = Callable[[Mapping[str, int]], Mapping[str, int]]
"""Trials of each class that wait or run -> how many more may."""


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


def slots_of(bundles: Bundles, have: Mapping[str, float]) -> dict[str, int]:
    """Units of each class that these resources run at a time, if those of no other class run beside them."""
    return {one: int(min(have.get(name, 0.0) / amount for name, amount in bundle.items()) + 1e-6) for one, bundle in bundles.items()}


def room_beside(bundles: Bundles, have: Mapping[str, float]) -> Room:
    """Room in a cluster that does not grow: classes share its cores and GPUs, and the first unit always gets its turn."""
    def room(taken: Mapping[str, int]) -> Mapping[str, int]:
        left = {name: amount - sum(count * bundles[one].get(name, 0.0) for one, count in taken.items()) for name, amount in have.items()}
        least = 0 if any(taken.values()) else 1
        return {one: max(least, count) for one, count in slots_of(bundles, left).items()}

    return room


def room_ahead(most: Mapping[str, int]) -> Room:
    """Room in a cluster that may grow: so many of each class, whatever the others take."""
    return lambda taken: {one: count - taken.get(one, 0) for one, count in most.items()}
