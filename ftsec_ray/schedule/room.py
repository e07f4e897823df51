"""How many units of each resource class a cluster has room for: pure arithmetic on cores and GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from ftsec_ray.plan.resources import cpus_of, gpus_of, workers_of
from ftsec_ray.spec.sweep import SweepSpec

Bundles = Mapping[str, Mapping[str, float]]
"""Resource class -> what one unit of it occupies."""
Pieces = Mapping[str, list[dict[str, float]]]
"""Resource class -> the bundles of the placement group of one unit."""
Room = Callable[[Mapping[str, int]], Mapping[str, int]]
"""Trials of each class that wait or run -> how many more may."""


def bundles_of(spec: SweepSpec, classes: Iterable[str]) -> dict[str, dict[str, float]]:
    """What one unit of each resource class occupies."""
    found = {}
    for one in sorted(classes):
        gpus = gpus_of(one)
        found[one] = {"CPU": cpus_of(one, spec), **({"GPU": gpus} if gpus else {})}
    return found


def pieces_of(one: str, bundle: Mapping[str, float], have: Mapping[str, float]) -> list[dict[str, float]]:
    """The bundles of a unit's placement group, the first one for its trial.

    A `data` class has a trial that asks for nothing and a bundle for each worker of its pipeline. Its workers are as many as it
    asks for, or as many as the cluster has room for: with fewer of them the pipeline is slower and gives the same.
    """
    workers = workers_of(one)
    if not workers:
        return [dict(bundle)]
    each = {name: amount / workers for name, amount in bundle.items()}
    return [{}, *[each] * min(workers, slots_of({one: each}, have)[one] or workers)]


def together(pieces: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What several bundles occupy."""
    found: Counter[str] = Counter()
    for piece in pieces:
        found.update(piece)  # type: ignore[arg-type]  # a Counter adds floats as well
    return dict(found)


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
