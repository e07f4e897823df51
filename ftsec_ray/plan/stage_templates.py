"""What stages share before their inputs are known: a kind, the methods that act there, and its
settings.

A grid repeats the same methods a thousandfold, so that templates are made once per combination and
a cell only fills in its inputs and its seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from ftsec_ray import lifecycle
from ftsec_ray.config.sweep import (
    EvaluationConfig,
    ModelSpec,
    SweepSpec,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.data.tasks import TASKS
from ftsec_ray.evals.judging import SCORED_BY_PROBE
from ftsec_ray.identity import canonical, digests
from ftsec_ray.lifecycle import StageKind, hooks_of
from ftsec_ray.method import Method, RowWise
from ftsec_ray.plan.benchmark_origin import benchmark_origin
from ftsec_ray.plan.judge_origin import JudgeOrigin, judge_origin
from ftsec_ray.registry import name_of, outside_hash


@dataclass(frozen=True, slots=True)
class StageTemplate:
    """What all stages of one kind, methods and params share."""

    key: str
    """Digest of it."""
    kind: StageKind
    method: str | None
    """Names of the methods whose hooks act; None for none."""
    params: Mapping[str, Any]
    needs: tuple[tuple[str, Method], ...] = ()
    """Roles of other models that the methods ask for, each with who needs it."""
    trains: tuple[Method, ...] | None = None
    """The methods that shape what it trains; None for a stage that does not train."""
    on_model: bool = True
    """Whether the stage has a model in memory."""
    row_wise: bool = False
    """Whether it crafts rows that any number of workers may share."""
    answers: bool = False
    """Whether the results read the artifacts of its stages."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """What its stages have in `where` besides what their cell says."""
    keeps_rows: bool = True
    """Whether its methods leave as many rows as they get."""
    judge: JudgeOrigin | None = None
    """The judge that is asked about answers, where the sweep names it."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """What an attack and a stack of defenses do to any model: the same for all models, tasks and
    seeds.
    """

    key: str
    """Digest of the methods."""
    templates: tuple[StageTemplate, ...]
    """Of every stage from the reference model to its scores, in the order of the lifecycle."""


class _Way(NamedTuple):
    """One way in which a kind of stage is done in a cell."""

    params: Mapping[str, Any]
    """Identity."""
    judge: JudgeOrigin | None = None
    """Who reads answers in it."""
    where: Mapping[str, Any] = MappingProxyType({})
    """Not identity."""


_ADDED = ("backend", "temperature", "samples")
"""Settings of generation that earlier plans did not have."""


class Templates:
    """The templates of one sweep, each made on first sight."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        self._training = spec.training.identity()
        self._tuning = self._training
        evaluation = json.loads(canonical(spec.evaluation))
        named = spec.evaluation.judge
        self._judge = None if named is None else judge_origin(named)
        self._judges = [judge_origin(judge) for judge in spec.evaluation.judges]
        pairs = spec.evaluation.win_rate
        self._pairs = None if pairs is None else judge_origin(pairs)
        usual = json.loads(canonical(EvaluationConfig()))
        self._generation = {
            name: evaluation[name]
            for name in spec.evaluation.GENERATION
            # what came later and is as before is left out: its digests are as before
            if name not in _ADDED or evaluation[name] != usual[name]
        } | {"max_new_tokens": spec.evaluation.new_tokens}
        if spec.answer_lengths:  # else digests are those of sweeps before there were any
            self._generation["answer_lengths"] = list(spec.answer_lengths)
        self._scoring = {name: evaluation[name] for name in spec.evaluation.SCORING}
        if self._judge is not None:
            self._scoring["judge"] = self._judge.plain
        self._benchmarks = [benchmark_origin(name) for name in spec.evaluation.benchmarks]
        self._forget()

    def tuned_otherwise(self, tuning: TrainingConfig) -> Templates:
        """Those of the same sweep for cells that are fine-tuned otherwise: its judges and
        benchmarks are not looked at again.
        """
        other = copy(self)
        other._tuning = tuning.identity()
        other._forget()
        return other

    def _forget(self) -> None:
        self._steps: dict[tuple[object, ...], tuple[StageTemplate, ...]] = {}
        self._lifecycles: dict[tuple[int, ...], Lifecycle] = {}
        self._providers: dict[tuple[object, ...], StageTemplate] = {}
        self._asking: dict[tuple[str, int, str | None], StageTemplate] = {}
        self._judged: dict[tuple[str, str], StageTemplate] = {}
        self._methods: dict[str, tuple[Method, ...]] = {}
        self._digests: dict[int, str] = {}
        self._plain: dict[int, dict[str, Any]] = {}

    def method_digest(self, method: Method) -> str:
        """Identity of a method: its name, its VERSION and its parameters."""
        if id(method) not in self._digests:
            self._digests[id(method)] = digests.of_method(
                method.KIND,
                name_of(method),
                method,
                version=method.VERSION,
                file=outside_hash(type(method).__module__),
            )
        return self._digests[id(method)]

    def plain(self, method: Method) -> dict[str, Any]:
        """A method as `decode.methods_of` reads it."""
        if id(method) not in self._plain:
            params = json.loads(canonical(method))
            self._plain[id(method)] = {
                "kind": method.KIND,
                "name": name_of(method),
                "params": params,
            }
        return self._plain[id(method)]

    def template(
        self,
        kind: StageKind,
        params: Mapping[str, Any],
        methods: Sequence[Method] = (),
        *,
        trains: bool = False,
        judge: JudgeOrigin | None = None,
    ) -> StageTemplate:
        """What the stages of a kind share in which these methods act; `trains` where one of a kind
        that only reads else trains a model, `judge` where it asks one.
        """
        by_model = judge is not None and judge.model is not None
        given: dict[str, Any] = dict(params)
        if methods:
            given["methods"] = [self.plain(method) for method in methods]
        if kind.computes or trains or by_model:
            given["numerics"] = self._spec.numerics
        outside = outside_hash(lifecycle.module_of(kind.name))
        if outside is not None:
            given["kind_code"] = outside
        key = digests.of_head(
            kind.name, kind.version, [self.method_digest(m) for m in methods], given
        )
        roles = [
            (role, method) for method in methods for role in kind.roles if role in method.NEEDS
        ]
        asks = any(method.NEEDS & set(lifecycle.roles()) for method in methods)
        declared = any(method.TRAINS & set(kind.hooks) for method in methods)
        does_train = kind.trains == "always" or (kind.trains == "declared" and declared)
        self._methods[key] = tuple(methods)
        return StageTemplate(
            key,
            kind,
            "+".join(name_of(method) for method in methods) or None,
            given,
            needs=tuple(dict(roles).items()),
            trains=tuple(methods) if does_train else None,
            on_model=kind.needs_model or asks or by_model,
            row_wise="craft_data" in kind.hooks and all(isinstance(m, RowWise) for m in methods),
            answers=kind.answers == "all"
            or (kind.answers == "defenses" and all(m.KIND == "defense" for m in methods)),
            keeps_rows=all(method.keeps_rows() for method in methods),
            judge=judge,
        )

    def lifecycle(self, attack: Method, stack: tuple[Method, ...]) -> Lifecycle:
        """Which method acts in which stage."""
        memo = (id(attack), *(id(method) for method in stack))
        if memo not in self._lifecycles:
            templates: list[StageTemplate] = []
            for kind in lifecycle.kinds().values():
                if kind.acts != "engine":
                    templates += self._of_kind(kind, attack, stack)
            self._lifecycles[memo] = Lifecycle(
                digests.of_recipe([self.method_digest(method) for method in (attack, *stack)]),
                tuple(templates),
            )
        return self._lifecycles[memo]

    def _of_kind(
        self, kind: StageKind, attack: Method, stack: tuple[Method, ...]
    ) -> tuple[StageTemplate, ...]:
        """The templates of one kind in a cell, in the order in which its stages follow."""
        acting = [
            method
            for method in (stack if kind.by == "defenses" else (attack, *stack))
            if any(hook in (*kind.hooks, *kind.shares_hooks) for hook in hooks_of(type(method)))
        ]
        groups = [acting] if kind.acts == "all" else [[method] for method in acting]
        return tuple(template for group in groups for template in self._of_group(kind, group))

    def _of_group(self, kind: StageKind, methods: list[Method]) -> tuple[StageTemplate, ...]:
        memo = (kind.name, *(id(method) for method in methods))
        if memo not in self._steps:
            templates = [
                replace(self.template(kind, way.params, methods, judge=way.judge), where=way.where)
                for way in self._ways(kind, methods)
            ]
            self._steps[memo] = tuple(templates)
        return self._steps[memo]

    def _ways(self, kind: StageKind, methods: Sequence[Method]) -> list[_Way]:
        """In how many ways a kind is done in a cell: once, but where it reads or asks by each of
        several.
        """
        params = self._params(kind, methods)
        if "benchmarks" in kind.settings:
            limit = self._spec.evaluation.benchmark_limit
            return [
                _Way({**params, **origin.params, "limit": limit}, where=origin.where)
                for origin in self._benchmarks
            ]
        if "pairs" in kind.settings:
            return [_read_by(params, self._pairs)] if self._pairs else []
        if "scoring" in kind.settings:
            own = {**params, "judge": SCORED_BY_PROBE, "scoring": self._scoring}
            others = [_read_by(params, judge) for judge in self._judges]
            return [_Way(own, self._judge), *others]
        return [_Way(params)]

    def _params(self, kind: StageKind, methods: Sequence[Method]) -> dict[str, Any]:
        """What of the sweep decides the result of a kind, however often it is done."""
        params: dict[str, Any] = {}
        if methods or kind.trains == "always":
            if "sweep_training" in kind.settings:
                params["training"] = self._training
            if "training" in kind.settings:
                params["training"] = self._tuning
        if "generation" in kind.settings:
            params["generation"] = self._generation
        return params

    def asking(self, template: StageTemplate, model: ModelSpec) -> StageTemplate:
        """The template of a stage that asks this model: with its limit of new tokens where answers
        are generated, and under another chat template than its own where the sweep gives one.
        """
        tokens = self._spec.evaluation.new_tokens_of(model.source)
        memo = (template.key, tokens, model.serve_template)
        if memo not in self._asking:
            params: dict[str, Any] = {}
            generation = template.params.get("generation")
            if generation is not None and generation["max_new_tokens"] != tokens:
                params["generation"] = {**generation, "max_new_tokens": tokens}
            if model.serve_template is not None:
                params["serve_template"] = model.serve_template
            self._asking[memo] = self._with(template, params)
        return self._asking[memo]

    def judged(self, template: StageTemplate, task: TaskSpec) -> StageTemplate:
        """The template of a stage that scores answers to a task, by the judge of its requests.

        VERSION 1 of a judge of this package adds nothing, so that what was scored before judges
        counted keeps its digest.
        """
        memo = (template.key, task.kind)
        if memo not in self._judged:
            judge = self._judge or judge_origin(TASKS[task.kind].judge)
            params: dict[str, Any] = {}
            if template.params["judge"] == SCORED_BY_PROBE and judge.version != "1":
                name = judge.plain if isinstance(judge.plain, str) else canonical(judge.plain)
                params["judge_version"] = f"{name} {judge.version}"
            self._judged[memo] = self._with(template, params)
        return self._judged[memo]

    def _with(self, template: StageTemplate, params: Mapping[str, Any]) -> StageTemplate:
        """The template with further params, which its identity holds."""
        if not params:
            return template
        more = {**template.params, **params}
        changed = self.template(
            template.kind, more, self._methods[template.key], judge=template.judge
        )
        return replace(changed, where=template.where)

    def provider(self, role: str, method: Method, stack: Sequence[Method]) -> StageTemplate:
        """The template of the stage that makes a role for a method of a stack."""
        memo = (role, id(method), *(id(defense) for defense in stack))
        if memo not in self._providers:
            kind = next(kind for kind in lifecycle.kinds().values() if kind.provides == role)
            params = {**self._params(kind, ()), **kind.settings_of(method)}
            hooks = lifecycle.kind_of(kind.shaped_as).hooks if kind.shaped_as else {}
            shaping = [m for m in stack if any(hook in hooks for hook in hooks_of(type(m)))]
            self._providers[memo] = self.template(kind, params, shaping)
        return self._providers[memo]


def _read_by(params: Mapping[str, Any], judge: JudgeOrigin) -> _Way:
    return _Way({**params, "judge": judge.plain, "judge_version": judge.version}, judge)
