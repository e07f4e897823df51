"""The part that all executors share: it connects units and their results with the scheduler.

An executor asks for the next unit, runs it, and reports the results of its stages, or that its
worker died. The dispatcher keeps the states, notifies the listener, and schedules the producers of
damaged artifacts again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from ftsec_ray.execute.unit import StageResult
from ftsec_ray.execute.watchdog import TIMEOUT
from ftsec_ray.plan.cost_estimate import Tariff, bill_of, shortfall, spent_of
from ftsec_ray.plan.durations import Costs, learned_from
from ftsec_ray.plan.graph import Plan, fuse
from ftsec_ray.plan.stage import Unit
from ftsec_ray.redact import redacted
from ftsec_ray.schedule.budget import Ledger
from ftsec_ray.schedule.scheduler import Node, Scheduler, State
from ftsec_ray.store import Store


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a unit, reported on the driver."""

    kind: Literal["started", "finished", "failed", "requeued"]
    unit: str
    stages: tuple[str, ...]
    error: str | None = None
    upstream_failed: tuple[str, ...] = ()
    """Digests of the stages that will not run because this unit failed."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The outcome of the stages of a plan in one run."""

    done: tuple[str, ...] = ()
    """Digests of the stages that ran successfully."""
    failed: Mapping[str, StageResult] = field(default_factory=dict)
    upstream_failed: tuple[str, ...] = ()
    """Digests of the stages that did not run because a stage before them failed."""
    cached: tuple[str, ...] = ()
    """Digests of the plan's stages that were done before the run."""
    attempts: Mapping[str, int] = field(default_factory=dict)
    """Id of a unit -> number of its starts."""
    wall_s: float = 0.0
    unaffordable: tuple[str, ...] = ()
    """Digests of the stages that did not run because of the sweep's budget."""
    over_budget: str | None = None
    """Why they did not run, as text."""

    @property
    def is_complete(self) -> bool:
        """Whether every stage that was needed is done."""
        return not self.failed and not self.upstream_failed and not self.unaffordable

    def then(self, later: RunReport) -> RunReport:
        """One report of this run and the next one, whose plan has grown."""
        done = (*self.done, *(digest for digest in later.done if digest not in self.done))
        return RunReport(
            done=done,
            failed={
                **{digest: result for digest, result in self.failed.items() if digest not in done},
                **later.failed,
            },
            upstream_failed=tuple(dict.fromkeys((*self.upstream_failed, *later.upstream_failed))),
            cached=tuple(
                dict.fromkeys(
                    (*self.cached, *(digest for digest in later.cached if digest not in self.done))
                )
            ),
            attempts={**self.attempts, **later.attempts},
            wall_s=self.wall_s + later.wall_s,
            unaffordable=later.unaffordable,
            over_budget=later.over_budget,
        )

    def stopped(self, why: str, kept: Iterable[str]) -> RunReport:
        """The same report, with the stages that the budget kept from running and the reason."""
        return replace(self, unaffordable=tuple(kept), over_budget=why)


class Dispatcher:
    """The units of one run, their states, and the results of their stages."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        done: Collection[str],
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self._cached = tuple(digest for digest in plan.stages if digest in done)
        self._costs = Costs(store.records(learned_from(plan, done)).values())
        self._on_event = on_event or (lambda event: None)
        self._units: dict[str, Unit] = {}
        self._producer: dict[str, str] = {}
        self._verdicts: dict[str, StageResult] = {}
        self._tariff = Tariff(plan.spec)
        self._limits = plan.spec.budget.limits if plan.spec.budget else {}
        self._spent = spent_of(plan, store, done) if self._limits else None
        self._began: dict[str, float] = {}
        self._before = store.failures() if plan.spec.resources.timeout_s is not None else {}
        self._started = time.monotonic()
        self.last_event = self._started
        """Monotonic time of the latest event."""
        units = plan.units(done)
        for unit in units:
            self._know(unit)
        ledger = Ledger(self._limits, self._spent.limited(self._limits) if self._spent else None)
        self.scheduler = Scheduler((self._node(unit) for unit in units), ledger=ledger)

    def _know(self, unit: Unit) -> None:
        self._units[unit.id] = unit
        self._producer.update((stage.digest, unit.id) for stage in unit.stages)

    def _node(self, unit: Unit) -> Node:
        needs = tuple(dict.fromkeys(self._producer[digest] for digest in unit.needs))
        cost_s = sum(self._costs(stage) for stage in unit.stages)
        return Node(
            id=unit.id,
            needs=needs,
            cost_s=cost_s,
            cells=self.plan.cells_of(unit.stages[0].digest),
            resource=unit.resource,
            affinity=unit.affinity,
            spend=self._takes(unit, cost_s),
        )

    def _takes(self, unit: Unit, seconds: float) -> dict[str, float]:
        """The cost of a unit that runs for `seconds`, by name of the limit."""
        return self._tariff.of(unit.resource, seconds).limited(self._limits) if self._limits else {}

    def check_budget(self, done: Collection[str]) -> None:
        """Raise BudgetError if the expected cost of the plan exceeds the sweep's budget."""
        if self._spent is not None:
            fault = shortfall(
                self.plan, self._spent, bill_of(self.plan, self.plan.needed(done), self._costs)
            )
            if fault is not None:
                raise fault

    # For executors.

    @property
    def units(self) -> Mapping[str, Unit]:
        """All units by id."""
        return self._units

    @property
    def finished(self) -> bool:
        """Whether no unit is left to run."""
        return self.scheduler.finished

    def next(
        self, *, free: Mapping[str, int] | None = None, warm: str | None = None
    ) -> Unit | None:
        """The next unit to run; None if no unit is ready for a free slot. See
        `Scheduler.next_ready`.
        """
        unit = self.scheduler.next_ready(free, warm=warm)
        return None if unit is None else self._units[unit]

    def started(self, unit: str) -> None:
        """Report that a worker started a unit."""
        self._began[unit] = time.monotonic()
        self._tell("started", unit)

    def attempt(self, unit: str) -> int:
        """Number of starts of a unit."""
        return self.scheduler.starts[unit]

    def settle(self, unit: str, verdicts: Sequence[StageResult]) -> None:
        """Report the results of a unit's stages."""
        self.scheduler.ledger.charge(
            self._takes(self._units[unit], sum(verdict.wall_s for verdict in verdicts))
        )
        self._verdicts.update(
            (verdict.digest, verdict) for verdict in verdicts if verdict.status != "retry"
        )
        bad = next((verdict for verdict in verdicts if not verdict.is_good), None)
        if bad is None:
            self.scheduler.complete(unit)
            self._tell("finished", unit)
        elif bad.status == "retry" and self._rebuild(unit, bad.damaged or ""):
            self._tell("requeued", unit, bad.error)
        else:
            self._fail(unit, bad)

    def lost(
        self, unit: str, error: str, *, code: str = "worker_lost", counted: bool = True
    ) -> None:
        """Report that the worker of a unit died or returned no result; the unit is retried, unless
        this has happened too often.

        Args:
            unit: Id of the unit.
            error: The reason, as text.
            code: Error code of the stage if the unit is not retried.
            counted: Whether it counts towards the limit of attempts.
        """
        error = redacted(error)
        began = self._began.pop(unit, None)
        if began is not None:
            self.scheduler.ledger.charge(self._takes(self._units[unit], time.monotonic() - began))
        verdict = self._late(unit)
        if verdict is None and self.scheduler.requeue(unit, counted=counted):
            self._tell("requeued", unit, error)
            return
        stages = self._units[unit].stages
        held = [stage.digest for stage in stages if self.store.has(stage.digest)]
        self._verdicts.update(
            (digest, StageResult(digest=digest, status="cached")) for digest in held
        )
        if verdict is None:
            stage = next((s for s in stages if s.digest not in held), stages[-1])
            verdict = StageResult(
                digest=stage.digest,
                status="failed",
                error_code=code,
                attempt=self.attempt(unit),
                error=f"the worker died in all {self.attempt(unit)} attempts; last error: {error}",
            )
            self.store.write_verdict(stage.digest, asdict(verdict))
        self._fail(unit, verdict)

    def _late(self, unit: str) -> StageResult | None:
        """The recorded timeout of a unit whose worker was killed by its time limit, or None."""
        if self.plan.spec.resources.timeout_s is None:
            return None
        failures, digests = (
            self.store.failures(),
            [stage.digest for stage in self._units[unit].stages],
        )
        new = [
            failures[digest]
            for digest in digests
            if digest in failures and failures[digest] != self._before.get(digest)
        ]
        return StageResult(**new[0]) if new and new[0]["error_code"] == TIMEOUT else None

    def abandon(self, unit: str) -> None:
        """Put back a unit that never started; this does not count as an attempt."""
        self.scheduler.requeue(unit, counted=False)

    def _fail(self, unit: str, verdict: StageResult) -> None:
        if verdict.status == "retry":
            verdict = StageResult(**{**asdict(verdict), "status": "failed"})
            self.store.write_verdict(verdict.digest, asdict(verdict))
        self._verdicts[verdict.digest] = verdict
        lost = self.scheduler.fail(unit)
        self._tell("failed", unit, verdict.error, upstream_failed=lost)

    def _rebuild(self, unit: str, damaged: str) -> bool:
        """Schedule the producer of a damaged artifact to run before the unit; False if that is not
        possible.
        """
        producer = self._producer.get(damaged)
        if producer == unit:
            return self.scheduler.requeue(unit)
        if producer is not None:
            return self.scheduler.reopen(producer, unit)
        if damaged not in self.plan.stages:
            return False
        missing = self.plan.with_ancestors([damaged], has=self.store.has)
        known = {
            self._producer[stage.digest] for stage in missing if stage.digest in self._producer
        }
        bad = (State.FAILED, State.UPSTREAM_FAILED)
        if any(self.scheduler.state(producing) in bad for producing in known):
            return False
        added = fuse([stage for stage in missing if stage.digest not in self._producer])
        for new_unit in added:
            self._know(new_unit)
        nodes = [self._node(new_unit) for new_unit in self._with_known_needs(added)]
        self.scheduler.add(nodes, last=self._producer[damaged], before=unit)
        return True

    def _with_known_needs(self, units: list[Unit]) -> list[Unit]:
        """The units, with their needs on existing units of this run added."""
        completed = []
        for unit in units:
            inside = {stage.digest for stage in unit.stages}
            given = dict.fromkeys(digest for stage in unit.stages for _, digest in stage.inputs)
            needs = tuple(
                digest for digest in given if digest not in inside and digest in self._producer
            )
            completed.append(Unit(unit.id, unit.stages, needs, unit.resource))
        return completed

    def _tell(
        self,
        kind: Literal["started", "finished", "failed", "requeued"],
        unit: str,
        error: str | None = None,
        *,
        upstream_failed: Sequence[str] = (),
    ) -> None:
        self.last_event = time.monotonic()
        stages, lost = (
            tuple(stage.digest for unit_id in units for stage in self._units[unit_id].stages)
            for units in ([unit], upstream_failed)
        )
        self._on_event(
            Event(kind=kind, unit=unit, stages=stages, error=error, upstream_failed=lost)
        )

    def report(self) -> RunReport:
        """The outcome of all stages."""
        failed = {d: v for d, v in self._verdicts.items() if v.status == "failed"}
        done = tuple(d for d, v in self._verdicts.items() if v.is_good)
        states = self.scheduler.states()
        never = [
            stage.digest
            for unit in self._units.values()
            for stage in unit.stages
            if states[unit.id] in (State.FAILED, State.UPSTREAM_FAILED)
            and stage.digest not in failed
            and stage.digest not in done
        ]
        kept = tuple(
            stage.digest
            for unit in self.scheduler.unaffordable
            for stage in self._units[unit].stages
            if stage.digest not in done
        )
        why = f"the next stage would exceed the budget: {self.scheduler.ledger}" if kept else None
        return RunReport(
            done=done,
            failed=failed,
            upstream_failed=tuple(never),
            cached=self._cached,
            unaffordable=kept,
            over_budget=why,
            attempts=dict(self.scheduler.starts),
            wall_s=time.monotonic() - self._started,
        )
