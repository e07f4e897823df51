"""`prices` and `budget` of a sweep: the price of each machine, and the limits of the whole sweep.

`prices: {a100-spot: {gpus: 8, cpus: 96, gpu_memory_gib: 80, usd_per_hour: 14.7, spot: true}}`,
`budget: {usd: 200}`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ftsec_ray.config.faults import Faults, name_or_none
from ftsec_ray.config.sweep import BudgetSpec, NodeType, ResourceSpec
from ftsec_ray.config.typed import build

_PRICES = "node type -> {gpus, cpus, gpu_memory_gib, usd_per_hour, spot}"


def prices_of(given: object, faults: Faults) -> tuple[NodeType, ...]:
    """The node types of a sweep, in the order of the file."""
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not given:
        faults.add(
            "prices", "not a price table", given, _PRICES, "without prices, leave `prices` out"
        )
        return ()
    nodes = []
    for key, entry in given.items():
        place = f"prices.{key}"
        name = name_or_none(key, place, faults)
        node = build(NodeType, entry, place, faults, name=str(name))
        nodes += [node] if name is not None and node is not None else []
    return tuple(nodes)


def budget_of(
    given: object, resources: object, *, has_prices: bool, faults: Faults
) -> BudgetSpec | None:
    """The budget of a sweep; a limit that cannot be measured is a fault."""
    if given is None:
        return None
    budget = build(BudgetSpec, given, "budget", faults)
    if budget is None:
        return None
    if budget.usd is not None and not has_prices:
        faults.add(
            "budget.usd",
            "a limit in USD needs prices",
            budget.usd,
            "prices: " + _PRICES,
            "add `prices`, or limit gpu_hours or hours",
        )
    if (
        budget.gpu_hours is not None
        and isinstance(resources, ResourceSpec)
        and not resources.wants_gpus
    ):
        faults.add(
            "budget.gpu_hours",
            "a limit in GPU-hours, but no stage requests a GPU",
            budget.gpu_hours,
            "resources.gpus_per_stage above 0",
            "set resources.gpus_per_stage (a number or auto), or limit hours",
        )
    return budget
