"""What stages take and cost: hours, GPU-hours and money, done and to come, and whether that is
within a budget.

A stage pays for the share of a node that it asks for, on the cheapest node type of the price table
that has room. That is the price of a cluster whose nodes are full: idle nodes, nodes that start and
work lost with a spot node come on top.
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
_UNITS = {"usd": "usd", "gpu_hours": "GPU-hours", "hours": "hours of stages"}


class BudgetError(SpecError):
    """The sweep would take more than its `budget` allows."""

    code = "budget"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spend:
    """What stages took or will take."""

    hours: float = 0.0
    """Of stages, one after the other."""
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    usd: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        return Spend(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def limited(self, limits: Iterable[str]) -> dict[str, float]:
        """The figures that have a limit."""
        return {name: getattr(self, name) for name in limits}


class Tariff:
    """What an hour of each resource class takes, by the `resources` and `prices` of a sweep."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        self._nodes: dict[str, NodeType | None] = {}

    def node(self, resource: str) -> NodeType | None:
        """The cheapest node type that has room for a stage of a class; None when none has."""
        if resource not in self._nodes:
            fitting = [
                (self._share(node, resource) * node.usd_per_hour, node.name, node)
                for node in self._spec.prices
                if self._fits(node, resource)
            ]
            self._nodes[resource] = min(fitting, key=lambda one: one[:2])[2] if fitting else None
        return self._nodes[resource]

    def _fits(self, node: NodeType, resource: str) -> bool:
        # The workers of a stage may be on several nodes.
        workers, resources = workers_of(resource), self._spec.resources
        gpus, cpus = gpus_of(resource) / workers, cpus_of(resource, self._spec) / workers
        # Shares were measured by the memory of one GPU, so that a smaller one would not hold the
        # stage.
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
        """What a stage of a class takes in so many seconds; no money where no node type has room
        for it.
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
        """SpecError when the price table has no machine for a class."""
        for resource in sorted(set(resources)):
            if self._spec.prices and self.node(resource) is None:
                raise SpecError(
                    f"no node type has room for a stage that asks for {self.asks(resource)}",
                    ", ".join(
                        f"{node.name}: {node.gpus} GPUs, {node.cpus} CPUs"
                        for node in self._spec.prices
                    ),
                    "a node type with at least that",
                    "add one to `prices`, or ask for less in `resources`",
                )

    def asks(self, resource: str) -> str:
        """What a class asks for, in words."""
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
    """Node type by the price table."""
    spot: bool
    asks: str
    stages: int
    spend: Spend


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What the stages to come take, by resource class."""

    rows: tuple[BillRow, ...]
    basis_frac: Mapping[str, float]
    """Share of the hours by where their estimate comes from: records, scaled, prior."""
    guessed: tuple[str, ...] = ()
    """Models whose size nothing tells."""

    @cached_property
    def total(self) -> Spend:
        """All rows together."""
        return sum((row.spend for row in self.rows), Spend())


def bill_of(plan: Plan, stages: Iterable[Stage], costs: Costs) -> Bill:
    """What stages of a plan are expected to take."""
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
    whole = sum(basis.values())
    guessed = tuple(model.name for model in plan.spec.models if named_parameters(model) is None)
    return Bill(
        rows=tuple(rows),
        basis_frac={one.value: basis[one.value] / whole if whole else 0.0 for one in Basis},
        guessed=guessed,
    )


def spent(
    plan: Plan, records: Mapping[str, Mapping[str, Any]], failures: Mapping[str, Mapping[str, Any]]
) -> Spend:
    """What this sweep's stages took so far: those done, by their records, and the last attempt of
    those that failed.

    A stage that a sweep of another name made, and this one found in the store, is not this sweep's
    expense.
    """
    tariff, total = Tariff(plan.spec), Spend()
    for digest, stage in plan.stages.items():
        told = records.get(digest) or failures.get(digest)
        if told is None or told.get("where", {}).get("sweep", plan.spec.name) != plan.spec.name:
            continue
        resource = str(told.get("resource") or stage.resource)
        priced = resource if tariff.node(resource) or not plan.spec.prices else stage.resource
        total += tariff.of(priced, float(told.get("wall_s") or 0.0))
    return total


def shortfall(plan: Plan, before: Spend, to_come: Bill) -> BudgetError | None:
    """The error of a sweep that would go past its budget; None when it would not, or has none, or
    has nothing left to do.
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
        f"{took[name] + takes[name]:.3g} {_UNITS[name]} (spent {took[name]:.3g}, to come"
        f" {takes[name]:.3g})"
        for name in over
    ]
    rough = to_come.basis_frac[Basis.PRIOR.value]
    doubt = (
        f"; {rough:.0%} of what is to come is a rough prior, and `--limit N` runs the first cells"
        " to learn from"
        if rough
        else ""
    )
    return BudgetError(
        f"sweep {plan.spec.name!r} would take " + ", ".join(words),
        over,
        ", ".join(f"at most {limit:g} {_UNITS[name]}" for name, limit in over.items()),
        "raise `budget`, or take cells out" + doubt,
    )


def spent_of(plan: Plan, store: Any, done: Collection[str]) -> Spend:
    """What the sweep took so far, by a store."""
    return spent(plan, store.records(set(done) & set(plan.stages)), store.failures())
