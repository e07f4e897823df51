"""A plan: the cells of a sweep, their stages merged by digest, and the stages still to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.identity import digest
from ftsec_ray.plan.search_rounds import PlannedSearch
from ftsec_ray.plan.stage import Cell, Stage, Unit


@dataclass(frozen=True, eq=False)
class Plan:
    """All cells of a sweep and all stages that they need, each stage once."""

    spec: SweepSpec
    cells: list[Cell]
    stages: dict[str, Stage]
    """By digest; inputs come before their consumers."""
    searches: tuple[PlannedSearch, ...] = ()
    """Searches with the trials proposed so far; when these are measured, the plan of an unfinished
    search grows.
    """
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason why cells cannot be measured before the fine-tune -> number of these cells."""

    @cached_property
    def digest(self) -> str:
        """Identity of the whole plan; it does not depend on the order of the cells."""
        return digest(sorted(cell.digest for cell in self.cells))

    @cached_property
    def served(self) -> Counter[str]:
        """Digest of a stage -> number of cells that use it."""
        counts: Counter[str] = Counter()
        for cell in self.cells:
            counts.update(cell.stages)
        return counts

    def cells_of(self, stage: str) -> int:
        """Number of cells that use a stage."""
        return self.served[stage]

    @property
    def naive_runs(self) -> int:
        """Number of stage runs without sharing: every cell would run all of its stages."""
        return sum(len(cell.stages) for cell in self.cells)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Digest of every stage -> its kind."""
        return {digest: stage.kind for digest, stage in self.stages.items()}

    @cached_property
    def answers(self) -> set[str]:
        """Digests of the stages whose artifacts the results read: evaluations, inspections and row
        filters of defenses.
        """
        return {digest for cell in self.cells for digest in cell.answers}

    def needed(self, done: Collection[str]) -> list[Stage]:
        """Stages to run, inputs first: those that are missing in `done` and that a missing answer
        depends on.
        """
        wanted = {stage for stage in self.answers if stage not in done}
        for stage_digest in reversed(self.stages):
            if stage_digest in wanted:
                inputs = self.stages[stage_digest].inputs
                wanted.update(given for _, given in inputs if given not in done)
        return [stage for stage in self.stages.values() if stage.digest in wanted]

    def units(self, done: Collection[str]) -> list[Unit]:
        """The stages to run, grouped into units: see `fuse`."""
        return fuse(self.needed(done))

    def with_ancestors(self, wanted: Iterable[str], *, has: Callable[[str], bool]) -> list[Stage]:
        """The stages `wanted` and all stages that they need and that are missing, inputs first.

        Args:
            wanted: Digests of stages.
            has: Whether the store has the artifact of a digest.
        """
        included: set[str] = set()
        waiting = list(wanted)
        while waiting:
            digest = waiting.pop()
            if digest not in included:
                included.add(digest)
                waiting += [given for _, given in self.stages[digest].inputs if not has(given)]
        return [stage for stage in self.stages.values() if stage.digest in included]


def fuse(stages: list[Stage]) -> list[Unit]:
    """Group stages into units: a stage joins the unit of an input if it is the only consumer of
    this input and has the same resource class.

    It joins only if all its other inputs must be done before that unit starts anyway, so joining
    delays nothing.

    Args:
        stages: The stages to run, inputs first.
    """
    todo = {stage.digest: stage for stage in stages}
    consumers = Counter(
        given
        for stage in stages
        for given in {digest for _, digest in stage.inputs}
        if given in todo
    )
    chain_of: dict[str, list[Stage]] = {}
    chains: list[list[Stage]] = []
    for stage in stages:
        chain = _joinable(stage, todo, consumers, chain_of)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(stage)
        chain_of[stage.digest] = chain
    return [_unit(chain, todo) for chain in chains]


def _joinable(
    stage: Stage, todo: dict[str, Stage], consumers: Counter[str], chain_of: dict[str, list[Stage]]
) -> list[Stage] | None:
    waits_for = {given for _, given in stage.inputs if given in todo}
    for given in waits_for:
        chain = chain_of[given]
        if (
            consumers[given] == 1
            and todo[given].resource == stage.resource
            and waits_for <= _before(given, waits_for, todo)
        ):
            return chain
    return None


def _before(last: str, wanted: set[str], todo: dict[str, Stage]) -> set[str]:
    """`last` and its ancestors in `todo`; the traversal stops when all of `wanted` are seen."""
    seen, waiting = {last}, [last]
    while waiting and not wanted <= seen:
        new = {given for _, given in todo[waiting.pop()].inputs if given in todo} - seen
        seen |= new
        waiting += new
    return seen


def _unit(chain: list[Stage], todo: Collection[str]) -> Unit:
    inside = {stage.digest for stage in chain}
    needs = dict.fromkeys(
        given
        for stage in chain
        for _, given in stage.inputs
        if given in todo and given not in inside
    )
    return Unit(chain[-1].digest, tuple(chain), tuple(needs), chain[0].resource)
