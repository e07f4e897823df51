"""Decides which unit runs next: a state machine over the units of a plan, without executor, clock
or disk.

    blocked -> ready -> running -> done | failed          blocked, ready -> upstream_failed
    ready <-> held

A unit is ready when all units that it needs are done. Among ready units, the one with the longest
remaining path goes first, then the one that most cells wait for, then one whose base model the
worker has in memory. If the next unit is a worker group without free slots, all other units wait
for it, unless another worker group is running, whose resources it will get. `requeue` puts back a
unit whose worker died; `reopen` runs the producer of a damaged artifact again before its consumer.

A ready unit that would exceed the budget is held. It is checked again whenever a running unit ends,
which may have cost less than expected. If nothing runs and no ready unit fits the budget, the run
is finished, and the remaining units stay held and blocked.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from ftsec_ray.errors import FtsecError
from ftsec_ray.plan.stage import is_group
from ftsec_ray.schedule.budget import Ledger

MAX_ATTEMPTS = 3
"""Attempts of a unit whose workers die, and rebuilds of an artifact that is damaged, at most."""


class State(Enum):
    """State of a unit."""

    BLOCKED = "blocked"
    READY = "ready"
    HELD = "held"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UPSTREAM_FAILED = "upstream_failed"


TERMINAL = frozenset({State.DONE, State.FAILED, State.UPSTREAM_FAILED})
_WAITING = frozenset({State.BLOCKED, State.READY, State.HELD})


@dataclass(frozen=True, kw_only=True)
class Node:
    """One unit as the scheduler sees it."""

    id: str
    needs: tuple[str, ...] = ()
    """Ids of the units that must be done first."""
    cost_s: float = 1.0
    """Expected seconds."""
    cells: int = 1
    """Number of cells that wait for it."""
    resource: str = "cpu"
    affinity: str = ""
    """Base model that it loads."""
    spend: Mapping[str, float] = field(default_factory=dict)
    """Name of a limit of the budget -> expected cost."""


@dataclass
class _Bucket:
    """Ready units of one priority, by base model."""

    by_affinity: dict[str, deque[str]] = field(default_factory=dict)


class Scheduler:
    """The states of all units, and the choice of the next one."""

    def __init__(
        self,
        nodes: Iterable[Node],
        *,
        max_attempts: int = MAX_ATTEMPTS,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self._held: list[str] = []
        self._nodes: dict[str, Node] = {}
        self._max_attempts = max_attempts
        self._state: dict[str, State] = {}
        self._needs: dict[str, set[str]] = {}
        self._waits: dict[str, set[str]] = {}
        self._users: dict[str, set[str]] = {}
        self._path: dict[str, float] = {}
        self._heaps: dict[str, list[tuple[float, int]]] = {}
        self._buckets: dict[tuple[str, float, int], _Bucket] = {}
        self._counts: Counter[State] = Counter()
        self._ready: Counter[str] = Counter()
        self._worker_groups: set[str] = set()
        """Running worker groups."""
        self.starts: Counter[str] = Counter()
        """Id of a unit -> number of its starts."""
        self._lost: Counter[str] = Counter()
        self._reopened: Counter[str] = Counter()
        self._insert(list(nodes))

    def _insert(self, nodes: list[Node]) -> None:
        for node in nodes:
            self._nodes[node.id] = node
            self._users.setdefault(node.id, set())
        for node in nodes:
            unknown = [need for need in node.needs if need not in self._nodes]
            if unknown:
                raise FtsecError(
                    f"unit {node.id} needs a unit that is not in the plan",
                    unknown[0],
                    "ids of units",
                )
            for need in node.needs:
                self._users[need].add(node.id)
        self._measure_paths(nodes)
        for node in nodes:
            self._needs[node.id] = set(node.needs)
            self._waits[node.id] = {
                need for need in node.needs if self._state.get(need) is not State.DONE
            }
            self._set(node.id, State.BLOCKED)
            if not self._waits[node.id]:
                self._make_ready(node.id)

    def _measure_paths(self, nodes: list[Node]) -> None:
        """Compute the longest remaining path of each new unit, starting from the last units."""
        new = {node.id for node in nodes}
        open_users = {node.id: sum(user in new for user in self._users[node.id]) for node in nodes}
        waiting = [unit for unit, users in open_users.items() if users == 0]
        count = 0
        while waiting:
            unit = waiting.pop()
            count += 1
            self._path[unit] = self._nodes[unit].cost_s + max(
                (self._path[user] for user in self._users[unit]), default=0.0
            )
            for need in self._nodes[unit].needs:
                if need in new:
                    open_users[need] -= 1
                    if open_users[need] == 0:
                        waiting.append(need)
        if count != len(new):
            raise FtsecError(
                "the units of the plan have a cyclic dependency",
                sorted(new - set(self._path))[:3],
                "a plan without cycles",
            )

    def _set(self, unit: str, state: State) -> None:
        old = self._state.get(unit)
        if old is not None:
            self._counts[old] -= 1
            if old is State.READY:
                self._ready[self._nodes[unit].resource] -= 1
        self._state[unit] = state
        self._counts[state] += 1
        (
            self._worker_groups.add
            if state is State.RUNNING and is_group(self._nodes[unit].resource)
            else self._worker_groups.discard
        )(unit)
        if old is State.RUNNING:
            self.ledger.release(unit)
            self._ask_again()

    def _ask_again(self) -> None:
        """Make held units ready again: they may fit the budget now."""
        held, self._held = self._held, []
        for unit in held:
            if self._state[unit] is State.HELD:
                self._make_ready(unit)

    def _make_ready(self, unit: str) -> None:
        node = self._nodes[unit]
        self._set(unit, State.READY)
        self._ready[node.resource] += 1
        key = (node.resource, -self._path[unit], -node.cells)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket()
            heapq.heappush(self._heaps.setdefault(node.resource, []), key[1:])
        bucket.by_affinity.setdefault(node.affinity, deque()).append(unit)

    # Asking.

    def state(self, unit: str) -> State:
        """The state of a unit."""
        return self._state[unit]

    def states(self) -> dict[str, State]:
        """The states of all units, by id."""
        return dict(self._state)

    def count(self, state: State) -> int:
        """Number of units in a state."""
        return self._counts[state]

    def has(self, unit: str) -> bool:
        """Whether the scheduler has a unit."""
        return unit in self._nodes

    def node(self, unit: str) -> Node:
        """The node of a unit."""
        return self._nodes[unit]

    @property
    def finished(self) -> bool:
        """Whether no unit can run any more."""
        if self._counts[State.READY] or self._counts[State.RUNNING]:
            return False
        return not self._counts[State.BLOCKED] or bool(self._counts[State.HELD])

    @property
    def unaffordable(self) -> list[str]:
        """Units that cannot run because of the budget: held units, and those that wait for them."""
        if not self._counts[State.HELD] or not self.finished:
            return []
        return [unit for unit, state in self._state.items() if state in (State.HELD, State.BLOCKED)]

    # The next unit.

    def next_ready(
        self, free: Mapping[str, int] | None = None, *, warm: str | None = None
    ) -> str | None:
        """The next unit, which is now running; None if no unit is ready for a free slot, or if none
        fits the budget.

        Args:
            free: Free slots by resource class; None for no limit.
            warm: Base model that the worker has in memory.
        """
        while True:
            heads = [
                (head, r)
                for r in self._heaps
                if self._ready[r] and (head := self._head(r)) is not None
            ]
            # A worker group needs all of its resources at once: while it is next, no smaller unit
            # may take resources that become free.
            if (
                free is not None
                and heads
                and not self._worker_groups
                and is_group(first := min(heads)[1])
                and free.get(first, 0) <= 0
            ):
                return None
            heads = [(head, r) for head, r in heads if free is None or free.get(r, 0) > 0]
            if not heads:
                return None
            (path, cells), resource = min(heads)
            unit = self._pop(self._buckets[resource, path, cells], warm)
            if self.ledger.fits(self._nodes[unit].spend):
                break
            self._set(unit, State.HELD)
            self._held.append(unit)
        self._set(unit, State.RUNNING)
        self.ledger.reserve(unit, self._nodes[unit].spend)
        self.starts[unit] += 1
        return unit

    def _head(self, resource: str) -> tuple[float, int] | None:
        """Priority of the best ready unit; removes entries of units that are no longer ready."""
        heap = self._heaps[resource]
        while heap:
            bucket = self._buckets[resource, *heap[0]]
            for affinity in list(bucket.by_affinity):
                queue = bucket.by_affinity[affinity]
                while queue and self._state[queue[0]] is not State.READY:
                    queue.popleft()
                if not queue:
                    del bucket.by_affinity[affinity]
            if bucket.by_affinity:
                return heap[0]
            del self._buckets[resource, *heapq.heappop(heap)]
        return None

    def _pop(self, bucket: _Bucket, warm: str | None) -> str:
        affinity = warm if warm in bucket.by_affinity else next(iter(bucket.by_affinity))
        return bucket.by_affinity[affinity].popleft()

    # Results.

    def complete(self, unit: str) -> None:
        """Mark a running unit as done; units that waited only for it become ready."""
        self._leave_running(unit, State.DONE)
        for user in self._users[unit]:
            self._waits[user].discard(unit)
            if not self._waits[user] and self._state[user] is State.BLOCKED:
                self._make_ready(user)

    def fail(self, unit: str) -> list[str]:
        """Mark a running unit as failed; returns its descendants, which will not run."""
        self._leave_running(unit, State.FAILED)
        lost: list[str] = []
        waiting = list(self._users[unit])
        while waiting:
            user = waiting.pop()
            if self._state[user] in _WAITING:
                self._set(user, State.UPSTREAM_FAILED)
                lost.append(user)
                waiting += self._users[user]
        return lost

    def requeue(self, unit: str, *, counted: bool = True) -> bool:
        """Put back a running unit whose worker died; False if this has happened too often, so that
        the caller must mark it as failed.

        Args:
            unit: Id of the unit.
            counted: Whether it counts towards the limit of attempts.
        """
        self._expect_running(unit)
        self._lost[unit] += counted
        if self._lost[unit] >= self._max_attempts or self._is_doomed(unit):
            return False
        self._back(unit)
        return True

    def reopen(self, producer: str, unit: str) -> bool:
        """Run `producer` again, since the running unit found its artifact damaged; False if this
        has happened too often.
        """
        self._expect_running(unit)
        self._needs[unit].add(producer)
        if self._is_doomed(unit):
            return False
        if self._state[producer] is State.DONE:
            self._reopened[producer] += 1
            if self._reopened[producer] >= self._max_attempts or self._is_doomed(producer):
                return False
            for user in self._users[producer]:
                if self._state[user] in _WAITING:
                    self._waits[user].add(producer)
                    self._set(user, State.BLOCKED)
            self._set(producer, State.BLOCKED)
            self._back(producer)
        self._users[producer].add(unit)
        self._back(unit)
        return True

    def add(self, nodes: Iterable[Node], *, last: str, before: str) -> None:
        """Add new units; `last`, one of them, must be done before the running unit `before` starts
        again.
        """
        self._expect_running(before)
        self._users[last] = {before}
        self._insert(list(nodes))
        self._needs[before].add(last)
        self._back(before)

    def _is_doomed(self, unit: str) -> bool:
        return any(
            self._state[need] in (State.FAILED, State.UPSTREAM_FAILED) for need in self._needs[unit]
        )

    def _back(self, unit: str) -> None:
        self._set(unit, State.BLOCKED)
        self._waits[unit] = {
            need for need in self._needs[unit] if self._state[need] is not State.DONE
        }
        if not self._waits[unit]:
            self._make_ready(unit)

    def _leave_running(self, unit: str, state: State) -> None:
        self._expect_running(unit)
        self._set(unit, state)

    def _expect_running(self, unit: str) -> None:
        if self._state.get(unit) is not State.RUNNING:
            raise FtsecError(f"unit {unit} is not running", self._state.get(unit), "a running unit")
