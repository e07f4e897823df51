"""Cost of stages in hours, GPU-hours and USD, spent and expected, and whether it is within the
budget.

A stage is charged for the fraction of a node that it requests, on the cheapest node type of the
price table that is large enough. This assumes full nodes: idle time, start-up time and work lost
with a spot node are not included.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ftsec_ray.config.sweep import NodeType, SweepSpec
from ftsec_ray.errors import SpecError
from ftsec_ray.plan.durations import Basis, Costs, named_parameters
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.resources import cpus_of, gpu_memory_of, gpus_of
from ftsec_ray.plan.stage import Stage, is_group, workers_of

HOUR_S = 3600.0
_UNITS = {"usd": "USD", "gpu_hours": "GPU-hours", "hours": "hours of stages"}


class BudgetError(SpecError):
    """The sweep would take more than its `budget` allows."""

    code = "budget"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spend:
    """Time and cost of some stages, spent or expected."""

    hours: float = 0.0
    """Hours of all stages, as if they ran one after the other."""
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    usd: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        return Spend(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def limited(self, limits: Iterable[str]) -> dict[str, float]:
        """The figures with these names."""
        return {name: getattr(self, name) for name in limits}


class Tariff:
    """The cost of an hour of each resource class, by the `resources` and `prices` of a sweep."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        self._nodes: dict[str, NodeType | None] = {}

    def node(self, resource: str) -> NodeType | None:
        """The cheapest node type that is large enough for a resource class; None if none is."""
        if resource not in self._nodes:
            fitting = [
                (self._share(node, resource) * node.usd_per_hour, node.name, node)
                for node in self._spec.prices
                if self._fits(node, resource)
            ]
            self._nodes[resource] = min(fitting, key=lambda node: node[:2])[2] if fitting else None
        return self._nodes[resource]

    def _fits(self, node: NodeType, resource: str) -> bool:
        # The workers of a stage may be on several nodes.
        workers, resources = workers_of(resource), self._spec.resources
        gpus, cpus = gpus_of(resource) / workers, cpus_of(resource, self._spec) / workers
        # GPU fractions were sized for `gpu_memory_of`; a smaller GPU would run out of memory.
        too_small = (
            gpus
            and resources.gpus_per_stage == "auto"
            and (node.gpu_memory_gib or float("inf")) < gpu_memory_of(self._spec)
        )
        return node.gpus >= gpus and node.cpus >= cpus and not too_small

    def _share(self, node: NodeType, resource: str) -> float:
        gpus = gpus_of(resource)
        return max(cpus_of(resource, self._spec) / node.cpus, gpus / node.gpus if gpus else 0.0)

    def of(self, resource: str, seconds: float) -> Spend:
        """The cost of a stage of a resource class that runs for `seconds`; 0 USD if no node type is
        large enough.
        """
        hours, node = seconds / HOUR_S, self.node(resource)
        usd = self._share(node, resource) * node.usd_per_hour * hours if node else 0.0
        return Spend(
            hours=hours,
            gpu_hours=gpus_of(resource) * hours,
            cpu_hours=cpus_of(resource, self._spec) * hours,
            usd=usd,
        )

    def check(self, resources: Iterable[str]) -> None:
        """Raise SpecError if the price table has no node type for one of the resource classes."""
        for resource in sorted(set(resources)):
            if self._spec.prices and self.node(resource) is None:
                raise SpecError(
                    f"no node type is large enough for a stage that requests {self.asks(resource)}",
                    ", ".join(
                        f"{node.name}: {node.gpus} GPUs, {node.cpus} CPUs"
                        for node in self._spec.prices
                    ),
                    "a node type with at least these resources",
                    "add one to `prices`, or request less in `resources`",
                )

    def asks(self, resource: str) -> str:
        """The GPUs and CPUs that a resource class requests, in words."""
        gpus, cpus = gpus_of(resource), cpus_of(resource, self._spec)
        share = f"1/{1 / gpus:g}" if 0 < gpus < 1 and (1 / gpus).is_integer() else f"{gpus:g}"
        memory = (
            f" of {gpu_memory_of(self._spec):g} GiB"
            if self._spec.resources.gpus_per_stage == "auto"
            else ""
        )
        worker_group = f" in a worker group of {workers_of(resource)}" if is_group(resource) else ""
        return (f"{share} GPU{memory}, " if gpus else "") + f"{cpus:g} CPU{worker_group}"


@dataclass(frozen=True, kw_only=True)
class BillRow:
    """The stages of one resource class."""

    node: str | None
    """Node type of the price table; None without prices."""
    spot: bool
    asks: str
    stages: int
    spend: Spend


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Expected cost of the stages to run, by resource class."""

    rows: tuple[BillRow, ...]
    basis_frac: Mapping[str, float]
    """Basis of an estimate (records, scaled, prior) -> fraction of the hours that it covers."""
    guessed: tuple[str, ...] = ()
    """Names of the models of unknown size."""

    @cached_property
    def total(self) -> Spend:
        """Sum of all rows."""
        return sum((row.spend for row in self.rows), Spend())


def bill_of(plan: Plan, stages: Iterable[Stage], costs: Costs) -> Bill:
    """The expected cost of stages of a plan."""
    tariff, basis = Tariff(plan.spec), Counter[str]()
    seconds: dict[str, list[float]] = defaultdict(list)
    for stage in stages:
        expected, source = costs.estimate(stage)
        seconds[stage.resource].append(expected)
        basis[source.value] += expected  # type: ignore[assignment]  # a Counter adds floats as well
    rows = []
    for resource, each in sorted(seconds.items(), key=lambda item: (-gpus_of(item[0]), item[0])):
        node = tariff.node(resource)
        rows.append(
            BillRow(
                node=node.name if node else None,
                spot=bool(node and node.spot),
                asks=tariff.asks(resource),
                stages=len(each),
                spend=tariff.of(resource, sum(each)),
            )
        )
    total_s = sum(basis.values())
    guessed = tuple(model.name for model in plan.spec.models if named_parameters(model) is None)
    return Bill(
        rows=tuple(rows),
        basis_frac={b.value: basis[b.value] / total_s if total_s else 0.0 for b in Basis},
        guessed=guessed,
    )


def spent(
    plan: Plan, records: Mapping[str, Mapping[str, Any]], failures: Mapping[str, Mapping[str, Any]]
) -> Spend:
    """The cost of this sweep's stages so far: finished stages, and the last attempt of failed ones.

    A stage that a sweep of another name made and this one reuses from the store costs nothing.

    Args:
        plan: The plan.
        records: Digest -> record of a finished stage.
        failures: Digest -> record of a failed stage.
    """
    tariff, total = Tariff(plan.spec), Spend()
    for digest, stage in plan.stages.items():
        record = records.get(digest) or failures.get(digest)
        if record is None:
            continue
        if record.get("where", {}).get("sweep", plan.spec.name) != plan.spec.name:
            continue
        resource = str(record.get("resource") or stage.resource)
        priced = resource if tariff.node(resource) or not plan.spec.prices else stage.resource
        total += tariff.of(priced, float(record.get("wall_s") or 0.0))
    return total


def shortfall(plan: Plan, before: Spend, to_come: Bill) -> BudgetError | None:
    """The error for a sweep that would exceed its budget; None if it would not, has no budget, or
    has no stages left to run.

    Args:
        plan: The plan.
        before: The cost so far.
        to_come: The expected cost of the stages to run.
    """
    limits = plan.spec.budget.limits if plan.spec.budget and to_come.rows else {}
    took, takes = before.limited(limits), to_come.total.limited(limits)
    over = {
        name: limit
        for name, limit in limits.items()
        if took[name] + takes[name] > limit * (1 + 1e-9)
    }
    if not over:
        return None
    words = [
        f"{took[name] + takes[name]:.3g} {_UNITS[name]} (spent {took[name]:.3g}, expected"
        f" {takes[name]:.3g} more)"
        for name in over
    ]
    rough = to_come.basis_frac[Basis.PRIOR.value]
    doubt = (
        f"; {rough:.0%} of the expected cost is a rough guess: run a few cells first with"
        " `--limit N` to get measured durations"
        if rough
        else ""
    )
    return BudgetError(
        f"sweep {plan.spec.name!r} would exceed its budget: " + ", ".join(words),
        over,
        ", ".join(f"at most {limit:g} {_UNITS[name]}" for name, limit in over.items()),
        "raise `budget`, or remove cells" + doubt,
    )


def spent_of(plan: Plan, store: Any, done: Collection[str]) -> Spend:
    """The cost of the sweep so far, by the records of a store."""
    return spent(plan, store.records(set(done) & set(plan.stages)), store.failures())
