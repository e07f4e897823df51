"""Builds the plan of a sweep: every cell becomes a chain of stages, and stages with equal digests
are merged.

The order inside a cell is that of the lifecycle: at every hook the attack acts first, then the
defenses in the order of their stack. Neither torch nor Ray is imported, and no model is loaded:
local models and rows are identified by the hash of their bytes.
"""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from ftsec_ray.config.method_entries import NONE, is_excluded
from ftsec_ray.config.sweep import AttackSearch, ModelSpec, SweepSpec, TaskSpec, TrainingConfig
from ftsec_ray.errors import SpecError, SpecFaults
from ftsec_ray.identity import digests
from ftsec_ray.lifecycle import ROLES_BEFORE, StageKind, kind_of, part_in_tune
from ftsec_ray.method import Method
from ftsec_ray.plan.benchmark_origin import benchmark_faults
from ftsec_ray.plan.cost_estimate import Tariff
from ftsec_ray.plan.evaluation_faults import evaluation_faults
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.model_structure import (
    quantization_faults,
    structure_faults,
    structure_needs,
    target_faults,
    with_structure,
)
from ftsec_ray.plan.search_rounds import (
    OutcomeLookup,
    PlannedSearch,
    nothing_known,
    search_key,
    walk,
)
from ftsec_ray.plan.stage import Cell, Searched, Step
from ftsec_ray.plan.stage_set import CellStart, StageSet
from ftsec_ray.plan.stage_templates import StageTemplate, Templates
from ftsec_ray.plan.starts import Starts
from ftsec_ray.plan.task_splits import split_faults
from ftsec_ray.registry import ATTACKS, name_of


@contextmanager
def _collection_paused() -> Iterator[None]:
    """No passes of the garbage collector: a plan is many objects that all stay and hold no cycles,
    and looking at them again and again took 40 % of the time of planning 8,000 cells.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_collection_paused()
def build_plan(spec: SweepSpec, look: OutcomeLookup = nothing_known) -> Plan:
    """The plan of a sweep; SpecFaults lists everything that cannot work, such as a method that
    needs a split that a task lacks.

    Args:
        spec: The sweep.
        look: Returns the outcome of a cell, or None if it is not measured yet; searches are planned
            as far as their trials are measured.
    """
    unknown = [*evaluation_faults(spec), *benchmark_faults(spec.evaluation.benchmarks)]
    if unknown:
        raise SpecFaults(f"sweep {spec.name!r}", unknown)
    builder = _PlanBuilder(spec)
    cells, searches = builder.cells(look)
    stages, faults = builder.stages.stages, builder.stages.faults
    if not cells:
        why = "; ".join(f"{reason} ({count} cells)" for reason, count in builder.left_out.items())
        fault = SpecError(
            "no cell can be measured before the fine-tune",
            why,
            "measure: after",
            "add methods that act on models or answers",
        )
        faults["measure",] = ("measure", fault)
    try:
        Tariff(spec).check(stage.resource for stage in stages.values())
    except SpecError as fault:
        faults["prices",] = ("prices", fault)
    needs = structure_needs(spec, cells)
    faults |= structure_faults(cells, needs) | target_faults(spec, cells)
    faults |= quantization_faults(spec, cells) | split_faults(cells)
    if faults:
        raise SpecFaults(f"sweep {spec.name!r}", list(faults.values()))
    return Plan(
        spec,
        cells,
        with_structure(stages, cells, needs),
        tuple(searches),
        left_out=dict(builder.left_out),
    )


class _Place(NamedTuple):
    """The cell, and the point in it, at which a method needs another model."""

    start: CellStart
    stack: tuple[Method, ...]
    roles: Mapping[str, str | None]
    """Digests of the models that the cell has, by role; None for a missing unaligned twin."""
    given: Mapping[str, str]
    """Digests. `model`: the model before the fine-tune; `rows`: a set of as many rows as the
    fine-tune gets.
    """
    seed: int


class _PlanBuilder:
    """Makes the cells of the grid and of the searches, whose fine-tunes may have other settings."""

    def __init__(
        self,
        spec: SweepSpec,
        stages: StageSet | None = None,
        templates: Templates | None = None,
    ) -> None:
        self.spec = spec
        self.stages = stages or StageSet(spec)
        self._templates = templates or Templates(spec)
        self._starts = Starts(self.stages, self._templates)
        self._tuned: dict[TrainingConfig, _PlanBuilder] = {spec.training: self}
        self._steps: dict[str, Step] = {}
        self._none = ATTACKS.get(NONE)()
        self._clean: dict[tuple[str, str, int], Cell] = {}
        self.left_out: Counter[str] = Counter()
        """Reason why cells cannot be measured before the fine-tune -> number of these cells."""

    def cells(self, look: OutcomeLookup) -> tuple[list[Cell], list[PlannedSearch]]:
        """All cells of the grid that no rule excludes, each once, then those of the searches; and
        the searches.
        """
        cells: dict[str, Cell] = {}
        searches: list[PlannedSearch] = []
        spec = self.spec
        for model, task in itertools.product(spec.models, spec.tasks):
            start = self._starts.of(model, task)
            rules = [rule for rule in spec.exclude if rule.concerns(model.name, task.name)]
            for attack, stack, seed in itertools.product(spec.attacks, spec.defenses, spec.seeds):
                is_left_out = is_excluded(rules, attack, stack, seed)
                if not is_left_out and self._can_be_measured(model, attack, stack):
                    cell = self.cell(start, task, attack, stack, seed)
                    cells.setdefault(cell.digest, cell)
            for entry, stack in itertools.product(spec.searches, spec.defenses):
                if not self._can_be_measured(model, entry.attack, stack):
                    continue
                seeds = [
                    seed for seed in spec.seeds if not is_excluded(rules, entry.attack, stack, seed)
                ]
                if seeds:
                    searches.append(self._search(start, task, entry, stack, seeds, look))
        for search in searches:
            for cell in search.cells:
                cells.setdefault(cell.digest, cell)
        return list(cells.values()), searches

    def _can_be_measured(self, model: ModelSpec, attack: Method, stack: tuple[Method, ...]) -> bool:
        """Whether the cell can be measured at the `measured` time of its model; cells that cannot
        are counted in `left_out`.
        """
        if model.measured == "after":
            return True
        parts = [(method, part_in_tune(method)) for method in (attack, *stack)]
        reasons = [f"{name_of(method)} {part}" for method, part in parts if part]
        self.left_out.update(reasons[:1])
        return not reasons

    def _search(
        self,
        start: CellStart,
        task: TaskSpec,
        entry: AttackSearch,
        stack: tuple[Method, ...],
        seeds: Sequence[int],
        look: OutcomeLookup,
    ) -> PlannedSearch:
        """The search of one attack on one model, task and defense stack."""
        none = next((attack for attack in self.spec.attacks if name_of(attack) == NONE), None)
        references, fixed = (
            tuple(self.cell(start, task, attack, stack, seed) for seed in seeds)
            for attack in (none or self._none, entry.attack)
        )
        key = search_key(entry, fixed[0])

        def setting(values: Mapping[str, Any], trial: int | None) -> tuple[Cell, ...]:
            """See `plan.search_rounds.Setting`."""
            attack, training = entry.configured(values, self.spec.training)
            if attack.check():
                return ()
            searched = Searched(key, entry, training, trial)
            return tuple(
                self._searched_cell(start, task, attack, stack, seed, searched)
                for seed in (seeds if trial is None else seeds[:1])
            )

        return walk(entry, key, references, fixed, setting, look)

    def _searched_cell(
        self,
        start: CellStart,
        task: TaskSpec,
        attack: Method,
        stack: tuple[Method, ...],
        seed: int,
        searched: Searched,
    ) -> Cell:
        """A cell whose fine-tune may have other settings than the sweep's.

        Stages before the fine-tune keep the sweep's settings; banks of clean adapters use those of
        the cell. Raises SpecError, and adds nothing to the plan, if the fine-tune fits on no
        machine.
        """
        training = searched.training
        if training not in self._tuned:
            stages = self.stages.tuned_otherwise(training)
            templates = self._templates.tuned_otherwise(training)
            self._tuned[training] = _PlanBuilder(self.spec, stages, templates)
        builder = self._tuned[training]
        sizing = builder.stages.sizing
        takes = sizing.resource(start.model)
        if sizing.is_split(start.model):
            sizing.worker_group(start.model, (attack, *stack), trains_all=False)
        return builder.cell(replace(start, resource=takes), task, attack, stack, seed, searched)

    def cell(
        self,
        start: CellStart,
        task: TaskSpec,
        attack: Method,
        stack: tuple[Method, ...],
        seed: int,
        searched: Searched | None = None,
        *,
        measures: bool = True,
    ) -> Cell:
        """One cell, with its new stages added to the plan; with `measures=False` only the stages
        whose output other stages use.
        """
        lifecycle = self._templates.lifecycle(attack, stack)
        roles = dict(zip(ROLES_BEFORE, (start.reference, start.unaligned), strict=True))
        flow = {"model": start.reference, "rows": start.task}
        tuned_from, counted = start.reference, start.task
        chain, steps = list(start.stages), []
        is_trial = searched is not None and searched.trial is not None
        for template in self._followed(lifecycle.templates, start, task, is_trial=is_trial):
            kind = template.kind
            if kind.gives is None and not measures:
                continue
            clean: dict[str, str] = {}
            if kind.takes_clean:
                clean, beside = self._clean_flow(kind, start, task, seed)
                if all(clean[name] == flow[name] for name in clean):
                    continue
                chain += beside
            if kind.names_input is not None:
                roles[kind.names_input] = tuned_from = flow["model"]
            needs: tuple[tuple[str, str], ...] = ()
            if template.needs:
                place = _Place(start, stack, roles, {"model": tuned_from, "rows": counted}, seed)
                needs = tuple(
                    (role, self._role(role, method, place)) for role, method in template.needs
                )
                chain += [digest for _, digest in needs]
            others = ((f"clean_{name}", digest) for name, digest in clean.items())
            taken = ((name, flow[name]) for name in kind.takes)
            inputs = (*taken, *others, ("task", start.task), *needs)
            digest = self.stages.add(template, inputs, seed, start)
            chain.append(digest)
            step = self._steps.get(digest)
            if step is None:
                step = Step(kind.name, template.method or "", digest, template.answers)
                self._steps[digest] = step
            steps.append(step)
            if kind.gives is not None:
                flow[kind.gives] = digest
            if kind.gives == "rows" and not template.keeps_rows:
                counted = digest
        key = digests.of_cell(
            lifecycle.key,
            model=start.model.name,
            task=task.name,
            seed=seed,
            answers=[step.digest for step in steps if step.answers],
            search=searched.key if searched else None,
            trial=searched.trial if searched else None,
        )
        stages = tuple(dict.fromkeys(chain))
        return Cell(key, start.model, task, attack, stack, seed, tuple(steps), stages, searched)

    def _clean_flow(
        self, kind: StageKind, start: CellStart, task: TaskSpec, seed: int
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """The inputs that a kind takes from the clean cell, which has neither attack nor defense
        and need not be in the grid.

        Returns:
            Name -> digest, and all stages of the clean cell up to its answers.
        """
        place = start.model.name, task.name, seed
        if place not in self._clean:
            self._clean[place] = self.cell(start, task, self._none, (), seed, measures=False)
        cell = self._clean[place]
        given = {kind_of(step.kind).gives: step.digest for step in cell.steps}
        return {name: given[name] for name in kind.takes_clean}, cell.stages

    def _followed(
        self,
        templates: Sequence[StageTemplate],
        start: CellStart,
        task: TaskSpec,
        *,
        is_trial: bool,
    ) -> Iterator[StageTemplate]:
        """The templates of a cell's stages, adapted to its model and task."""
        for template in templates:
            kind = template.kind
            is_of_later_tune = kind.tunes and start.model.measured == "before"
            if is_of_later_tune or (is_trial and kind.measures):
                continue
            own = self._templates.asking(template, start.model) if kind.asks_model else template
            yield self._templates.judged(own, task) if "scoring" in kind.settings else own

    def _role(self, role: str, method: Method, place: _Place) -> str:
        """Digest of the model that a method needs in a role; records a fault if there is none."""
        start, roles = place.start, place.roles
        if role not in roles:
            template = self._templates.provider(role, method, place.stack)
            needs = tuple((name, self._role(name, who, place)) for name, who in template.needs)
            flow = tuple((name, place.given[name]) for name in template.kind.takes)
            inputs = (*flow, ("task", start.task), *needs)
            return self.stages.add(template, inputs, place.seed, start)
        digest = roles[role]
        if digest is not None:
            return digest
        name, model = name_of(method), start.model
        self.stages.faults[method.KIND, name, model.name, role] = (
            f"{method.KIND} {name}",
            SpecError(
                f"{method.KIND} {name!r} needs the unaligned twin of model {model.name!r}, and the"
                " sweep gives none",
                model.source,
                "`unaligned: SOURCE`, or `align:` (the loaded model is then the unaligned twin)",
                f"add one of them to {model.name!r}, or exclude {{model: {model.name},"
                f" {method.KIND}: {name}}}",
            ),
        )
        return start.reference
