"""From a sweep to its plan: every cell becomes the chain of its stages, and equal stages merge by
digest.

The order inside a cell is that of the lifecycle (see `method`): the attack moves first at every
hook, the defenses answer in the order of their stack. Neither torch nor ray is imported, and no
model is opened: local models and rows enter by the hash of their bytes.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from ftsec_ray.config.method_entries import NONE
from ftsec_ray.config.sweep import AttackSearch, ModelSpec, SweepSpec, TaskSpec, TrainingConfig
from ftsec_ray.errors import SpecError, SpecFaults
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method, RowWise, hooks_of
from ftsec_ray.plan import digests
from ftsec_ray.plan.code import imports_fingerprint, kind_fingerprint
from ftsec_ray.plan.cost_estimate import Tariff
from ftsec_ray.plan.durations import parameters_of, prior_s
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.origin import Origin, model_origin, task_origin
from ftsec_ray.plan.resources import Sizing, data_resource, group_name, is_large
from ftsec_ray.plan.search_rounds import (
    OutcomeLookup,
    PlannedSearch,
    nothing_known,
    search_key,
    walk,
)
from ftsec_ray.plan.stage import ROLES, Cell, Resource, Searched, Stage
from ftsec_ray.registry import ATTACKS, identity_of, name_of

Inputs = tuple[tuple[str, str], ...]
_DEFAULT_BANK = 8


def build_plan(spec: SweepSpec, look: OutcomeLookup = nothing_known) -> Plan:
    """The plan of a sweep; SpecFaults with every method that needs what a model or a task cannot
    give.

    Args:
        spec: The sweep.
        look: What is known of a cell: searches of attackers go as far as it leads.
    """
    builder = _PlanBuilder(spec)
    cells, searches = builder.cells(look)
    try:
        Tariff(spec).check(stage.resource for stage in builder.stages.values())
    except SpecError as fault:
        builder.faults["prices",] = ("prices", fault)
    if builder.faults:
        raise SpecFaults(f"sweep {spec.name!r}", list(builder.faults.values()))
    return Plan(spec, cells, builder.stages, tuple(searches))


@dataclass(frozen=True, slots=True)
class _StageTemplate:
    """What all stages of one kind, methods and params share; `key` is the digest of that."""

    key: str
    kind: str
    variant: str
    method: str | None
    params: Mapping[str, Any]
    on_model: bool
    """Whether the stage has a model in memory."""
    row_wise: bool = False
    """Whether it crafts rows that any number of workers may share."""


@dataclass(frozen=True, slots=True)
class _CellStart:
    """The stages of one model on one task before any method acts."""

    model: ModelSpec
    task: str
    reference: str
    unaligned: str | None
    where: Mapping[str, Any]
    parameters: int
    resource: Resource
    """Of the stages that have the model in memory."""
    is_large: bool
    """Whether the user's rows may be so many that workers of their own craft them."""
    stages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _MethodStep:
    """The methods of one stage: their head, and the roles that they need there, each with who needs
    it.
    """

    name: str
    head: _StageTemplate
    needs: tuple[tuple[str, Method], ...]
    trains: tuple[Method, ...] | None
    """The methods that shape what trains; None for a stage that does not train."""


@dataclass(frozen=True, slots=True)
class _MethodSteps:
    """What an attack and a stack of defenses do to any model: worked out once, used for all models,
    tasks and seeds.
    """

    key: str
    prepare: tuple[_MethodStep, ...]
    craft: tuple[_MethodStep, ...]
    tune: _MethodStep
    inspect: tuple[_MethodStep, ...]
    revise: tuple[_MethodStep, ...]
    evaluate: _MethodStep


class _PlanBuilder:
    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.stages: dict[str, Stage] = {}
        self.faults: dict[tuple[str, ...], tuple[str, SpecError]] = {}
        self._known: dict[tuple[object, ...], str] = {}
        self._acts: dict[tuple[object, ...], _MethodStep] = {}
        self._recipes: dict[tuple[int, ...], _MethodSteps] = {}
        self._banks: dict[int, _StageTemplate] = {}
        self._digests: dict[int, str] = {}
        self._plain: dict[int, dict[str, Any]] = {}
        self._sizing = Sizing(spec)
        self._worker_groups: dict[tuple[object, ...], tuple[Resource, dict[str, Any]]] = {}
        self._training = self._tuning = json.loads(canonical(spec.training))
        self._tuners: dict[TrainingConfig, _PlanBuilder] = {spec.training: self}
        self._evaluation = json.loads(canonical(spec.evaluation))

    # Methods: their digest and JSON are worked out once per object, since a grid repeats them a
    # thousandfold.

    def method_digest(self, method: Method) -> str:
        """Identity of a method with all the code that it calls."""
        found = self._digests.get(id(method))
        if found is None:
            found = self._digests[id(method)] = digests.of_method(
                identity_of(method), imports_fingerprint(type(method).__module__)
            )
        return found

    def plain(self, method: Method) -> dict[str, Any]:
        """A method as `decode.methods_of` reads it."""
        found = self._plain.get(id(method))
        if found is None:
            found = {
                "kind": method.KIND,
                "name": name_of(method),
                "params": json.loads(canonical(method)),
            }
            self._plain[id(method)] = found
        return found

    def head(
        self,
        kind: str,
        params: Mapping[str, Any],
        *,
        methods: Sequence[Method] = (),
        variant: str = "",
        owner: str | None = None,
        on_model: bool = True,
    ) -> _StageTemplate:
        """What stages of a kind share; `variant` names the code where it differs within a kind."""
        given = {**params, **digests.numerics_params(kind, self.spec.numerics, on_model=on_model)}
        if methods:
            given["methods"] = [self.plain(m) for m in methods]
        row_wise = kind == "craft" and all(isinstance(method, RowWise) for method in methods)
        key = digests.of_head(
            kind, kind_fingerprint(variant or kind), [self.method_digest(m) for m in methods], given
        )
        return _StageTemplate(key, kind, variant or kind, owner, given, on_model, row_wise)

    def act(
        self, methods: Sequence[Method], kind: str, roles: Sequence[str] = ROLES
    ) -> _MethodStep:
        """What a stage of a kind does in which these methods act, made on first sight."""
        memo = (kind, *(id(method) for method in methods))
        found = self._acts.get(memo)
        if found is None:
            params = {"evaluation": self._evaluation} if kind == "evaluate" else {}
            if methods or kind == "tune":
                params["training"] = (
                    self._training if kind in ("craft", "prepare") else self._tuning
                )
            on_model = kind != "craft" or any(method.NEEDS & set(ROLES) for method in methods)
            name = "+".join(name_of(method) for method in methods)
            head = self.head(kind, params, methods=methods, owner=name or None, on_model=on_model)
            needs = {role: method for method in methods for role in roles if role in method.NEEDS}
            hook = {"prepare": "prepare_model", "revise": "revise_model"}.get(kind, "")
            trains = (
                tuple(methods)
                if kind == "tune" or any(hook in method.TRAINS for method in methods)
                else None
            )
            found = self._acts[memo] = _MethodStep(name, head, tuple(needs.items()), trains)
        return found

    def recipe(self, attack: Method, stack: tuple[Method, ...]) -> _MethodSteps:
        """Which method acts in which stage, made on first sight."""
        memo = (id(attack), *(id(method) for method in stack))
        found = self._recipes.get(memo)
        if found is None:
            both = (attack, *stack)
            before = ("reference", "unaligned")
            acting = tuple(m for m in both if _has(m, "wrap_generation") or _has(m, "probes"))
            found = self._recipes[memo] = _MethodSteps(
                key=digests.of_recipe([self.method_digest(method) for method in both]),
                prepare=tuple(
                    self.act((m,), "prepare", before) for m in both if _has(m, "prepare_model")
                ),
                craft=tuple(self.act((m,), "craft", before) for m in both if _has(m, "craft_data")),
                tune=self.act(tuple(m for m in both if _has(m, "shape_training")), "tune"),
                inspect=tuple(self.act((m,), "inspect") for m in stack if _has(m, "inspect")),
                revise=tuple(self.act((m,), "revise") for m in both if _has(m, "revise_model")),
                evaluate=self.act(acting, "evaluate"),
            )
        return found

    def add(
        self,
        head: _StageTemplate,
        inputs: Inputs,
        seed: int | None,
        base: _CellStart | None,
        *,
        where: Mapping[str, Any] | None = None,
        resource: Resource = "cpu",
        trains: Sequence[Method] | None = None,
        trains_all: bool = False,
    ) -> str:
        """Digest of the stage with these inputs, made on first sight; `trains` are the methods that
        shape what it trains.
        """
        memo = (head.key, inputs, seed)
        found = self._known.get(memo)
        if found is None:
            found = self._known[memo] = digests.of_stage(head.key, inputs, seed)
            place = where if where is not None else base.where if base else {}
            parameters = base.parameters if base else int(place.get("parameters", 0))
            takes = "cpu" if not head.on_model else base.resource if base else resource
            if head.row_wise and base and base.is_large:
                takes = data_resource(self.spec.data.workers, takes)
            if (
                base is not None
                and trains is not None
                and self._sizing.is_split(base.model, trains_all=trains_all)
            ):
                takes, worker_group = self.worker_group(
                    base.model, tuple(trains), trains_all=trains_all
                )
                place = {**place, "worker_group": worker_group}
            self.stages[found] = Stage(
                found,
                head.kind,
                head.method,
                seed,
                inputs,
                head.params,
                place,
                takes,
                prior_s(head.variant, parameters, takes),
            )
        return found

    # What a cell starts from.

    def task_stage(self, task: TaskSpec) -> str:
        """Digest of the stage that reads a task."""
        origin = self._origin(task.name, ("task", task.name), lambda: task_origin(task))
        head = self.head("task", origin.params, variant=origin.variant, on_model=False)
        return self.add(head, (), None, None, where={**origin.where, "sweep": self.spec.name})

    def source_stage(
        self, model: ModelSpec, source: str, *, aligned: bool
    ) -> tuple[str, Mapping[str, Any]]:
        """Digest and `where` of the stage that loads or pre-trains a model."""
        origin = self._origin(
            model.name, ("model", model.name, source), lambda: model_origin(model, source)
        )
        where = {
            "model": model.name,
            "family": model.family,
            "aligned": aligned,
            "parameters": parameters_of(model),
            "sweep": self.spec.name,
            **origin.where,
        }
        head = self.head("source", origin.params, variant=origin.variant, on_model=origin.trains)
        takes = self.resource(model, trains_all=True) if origin.trains else "cpu"
        return self.add(head, (), None, None, where=where, resource=takes), where

    def resource(self, model: ModelSpec, *, trains_all: bool = False) -> Resource:
        """Class of the stages of a model; a fault is noted when they fit on no GPU."""
        try:
            return self._sizing.resource(model, trains_all=trains_all)
        except SpecError as fault:
            self.faults["model", model.name, "memory", str(trains_all)] = (model.name, fault)
            return "gpu"

    def worker_group(
        self, model: ModelSpec, methods: tuple[Method, ...], *, trains_all: bool
    ) -> tuple[Resource, dict[str, Any]]:
        """Class and settings of the worker group that trains a model; a fault is noted when there
        is none.
        """
        memo = (model.name, trains_all, *(id(method) for method in methods))
        found = self._worker_groups.get(memo)
        if found is None:
            try:
                worker_group = self._sizing.worker_group(model, methods, trains_all=trains_all)
                found = (
                    group_name(worker_group.workers, on_gpu=self.spec.resources.wants_gpus),
                    asdict(worker_group),
                )
            except SpecError as fault:
                self.faults["worker_group", model.name, fault.what] = (model.name, fault)
                found = "gpu", {}
            self._worker_groups[memo] = found
        return found

    def _origin(self, place: str, key: tuple[str, ...], find: Callable[[], Origin]) -> Origin:
        try:
            return find()
        except SpecError as fault:
            self.faults[key] = (place, fault)
            return Origin({"missing": list(key)}, {}, "source" if key[0] == "model" else "task")

    def base(self, model: ModelSpec, task_spec: TaskSpec) -> _CellStart:
        """The reference model and its unaligned twin."""
        task = self.task_stage(task_spec)
        is_ladder_aligned = model.source.startswith("ladder:") and not model.source.endswith(
            "-base"
        )
        raw, where = self.source_stage(
            model,
            model.source,
            aligned=model.aligned and not is_ladder_aligned and model.align is None,
        )
        where = {**where, "aligned": True}
        parameters = parameters_of(model)
        is_single = is_ladder_aligned or (
            model.align is not None and not self._sizing.is_split(model, trains_all=True)
        )
        aligns = self.resource(model, trains_all=True) if is_single else "cpu"
        shell = _CellStart(
            model, task, raw, None, where, parameters, aligns, is_large=False, stages=()
        )
        chain = [task, raw]
        reference, unaligned = raw, None
        if is_ladder_aligned:
            head = self.head("align", {"source": model.source}, variant="align:ladder")
            reference, unaligned = self.add(head, (("model", raw),), None, shell), raw
            chain.append(reference)
        if model.align is not None:
            head = self.head("align", {"align": json.loads(canonical(model.align))})
            unaligned = reference
            reference = self.add(
                head,
                (("model", reference), ("task", task)),
                None,
                shell,
                trains=(),
                trains_all=True,
            )
            chain.append(reference)
        elif unaligned is None and model.unaligned is not None:
            unaligned, _ = self.source_stage(model, model.unaligned, aligned=False)
        here = {
            "model": model.name,
            "family": model.family,
            "aligned": model.aligned or model.align is not None,
            "parameters": parameters,
            "sweep": self.spec.name,
        }
        large = is_large(task_spec, self.spec.data.ray_above)
        return _CellStart(
            model,
            task,
            reference,
            unaligned,
            here,
            parameters,
            self.resource(model),
            large,
            tuple(chain),
        )

    # The grid.

    def cells(self, look: OutcomeLookup) -> tuple[list[Cell], list[PlannedSearch]]:
        """All cells that no rule leaves out, each once, and after them those of the searches."""
        cells: dict[str, Cell] = {}
        searches: list[PlannedSearch] = []
        spec = self.spec
        for model, task in itertools.product(spec.models, spec.tasks):
            base = self.base(model, task)
            for attack, stack, seed in itertools.product(spec.attacks, spec.defenses, spec.seeds):
                if not _is_excluded(spec, model, task, attack, stack, seed):
                    cell = self.cell(base, task, attack, stack, seed)
                    cells.setdefault(cell.digest, cell)
            for entry, stack in itertools.product(spec.searches, spec.defenses):
                seeds = [
                    seed
                    for seed in spec.seeds
                    if not _is_excluded(spec, model, task, entry.attack, stack, seed)
                ]
                if seeds:
                    searches.append(self.search(base, task, entry, stack, seeds, look))
        for search in searches:
            for cell in search.cells:
                cells.setdefault(cell.digest, cell)
        return list(cells.values()), searches

    def search(
        self,
        base: _CellStart,
        task: TaskSpec,
        entry: AttackSearch,
        stack: tuple[Method, ...],
        seeds: Sequence[int],
        look: OutcomeLookup,
    ) -> PlannedSearch:
        """One search in one place of the grid."""
        none = (
            next((one for one in self.spec.attacks if name_of(one) == NONE), None)
            or ATTACKS.get(NONE)()
        )
        references, fixed = (
            tuple(self.cell(base, task, attack, stack, seed) for seed in seeds)
            for attack in (none, entry.attack)
        )
        key = search_key(entry, fixed[0])

        def setting(values: Mapping[str, Any], trial: int | None) -> tuple[Cell, ...]:
            """See `plan.search.Setting`."""
            attack, training = entry.configured(values, self.spec.training)
            if attack.check():
                return ()
            return tuple(
                self.searched_cell(
                    base, task, attack, stack, seed, Searched(key, entry, training, trial)
                )
                for seed in (seeds if trial is None else seeds[:1])
            )

        return walk(entry, key, references, fixed, setting, look)

    def searched_cell(
        self,
        base: _CellStart,
        task: TaskSpec,
        attack: Method,
        stack: tuple[Method, ...],
        seed: int,
        searched: Searched,
    ) -> Cell:
        """A cell whose tune may be another than the sweep's: what comes before the tune, and banks
        of clean adapters, keep the sweep's.

        SpecError, with nothing added to the plan, where that tune fits on no machine.
        """
        builder = self._tuners.get(searched.training)
        if builder is None:
            builder = self._tuners[searched.training] = copy.copy(self)
            builder._tuning = json.loads(canonical(searched.training))
            builder._acts, builder._recipes, builder._worker_groups = {}, {}, {}
            builder._sizing = Sizing(replace(self.spec, training=searched.training))
        takes = builder._sizing.resource(base.model)
        if builder._sizing.is_split(base.model):
            builder._sizing.worker_group(base.model, (attack, *stack), trains_all=False)
        return builder.cell(replace(base, resource=takes), task, attack, stack, seed, searched)

    def cell(
        self,
        base: _CellStart,
        task: TaskSpec,
        attack: Method,
        stack: tuple[Method, ...],
        seed: int,
        searched: Searched | None = None,
    ) -> Cell:
        """One cell, with its stages added where they are new."""
        recipe = self.recipe(attack, stack)
        roles = {"reference": base.reference, "unaligned": base.unaligned}
        chain = list(base.stages)

        def step(act: _MethodStep, *given: tuple[str, str]) -> str:
            needs = tuple(
                (role, self._role(role, roles, method, base, seed)) for role, method in act.needs
            )
            chain.extend(one for _, one in needs)
            chain.append(
                self.add(
                    act.head, (*given, ("task", base.task), *needs), seed, base, trains=act.trains
                )
            )
            return chain[-1]

        start = base.reference
        for act in recipe.prepare:
            start = step(act, ("model", start))
        rows, crafts = base.task, []
        for act in recipe.craft:
            rows = step(act, ("rows", rows))
            crafts.append((act.name, rows))
        roles["start"] = start
        model = step(recipe.tune, ("model", start), ("rows", rows))
        # Detectors look at the model as tuning left it, so that one of them costs nothing to any
        # other defense.
        inspects = tuple((act.name, step(act, ("model", model))) for act in recipe.inspect)
        for act in recipe.revise:
            model = step(act, ("model", model))
        evaluate = step(recipe.evaluate, ("model", model))
        key = digests.of_cell(
            recipe.key,
            model=base.model.name,
            task=task.name,
            seed=seed,
            evaluate=evaluate,
            search=searched.key if searched else None,
            trial=searched.trial if searched else None,
        )
        return Cell(
            key,
            base.model,
            task,
            attack,
            stack,
            seed,
            evaluate,
            inspects,
            tuple(crafts),
            tuple(dict.fromkeys(chain)),
            searched,
        )

    def _role(
        self,
        role: str,
        roles: Mapping[str, str | None],
        method: Method,
        base: _CellStart,
        seed: int,
    ) -> str:
        """Digest of the model that a method needs in a role; a fault is noted when there is
        none.
        """
        if role == "clean_bank":
            size = int(getattr(method, "bank", _DEFAULT_BANK))
            if size not in self._banks:
                self._banks[size] = self.head("bank", {"training": self._training, "size": size})
            return self.add(
                self._banks[size],
                (("model", base.reference), ("task", base.task)),
                seed,
                base,
                trains=(),
            )
        found = roles.get(role)
        if found is not None:
            return found
        name, model = name_of(method), base.model
        self.faults[method.KIND, name, model.name, role] = (
            f"{method.KIND} {name}",
            SpecError(
                f"{method.KIND} {name!r} needs the twin of model {model.name!r} before alignment,"
                " and the sweep names none",
                model.source,
                "`align:` (the loaded model is then the twin) or `unaligned: SOURCE` on the model",
                f"add one of them to {model.name!r}, or exclude {{model: {model.name},"
                f" {method.KIND}: {name}}}",
            ),
        )
        return base.reference


def _has(method: Method, hook: str) -> bool:
    return hook in _hooks(type(method))  # type: ignore[arg-type]  # mypy takes no class for hashable


@cache
def _hooks(cls: type[Method]) -> frozenset[str]:
    return frozenset(hooks_of(cls))


def _is_excluded(
    spec: SweepSpec,
    model: ModelSpec,
    task: TaskSpec,
    attack: Method,
    stack: tuple[Method, ...],
    seed: int,
) -> bool:
    if not spec.exclude:
        return False
    names = [name_of(method) for method in stack]
    return any(
        rule.matches(
            model=model.name, task=task.name, attack=name_of(attack), defenses=names, seed=seed
        )
        for rule in spec.exclude
    )
