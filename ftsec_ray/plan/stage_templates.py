"""Templates of stages: a kind, its methods and its settings, without inputs and seed.

A grid repeats the same methods thousands of times. So each template is made once per combination,
and a cell adds only its inputs and its seed.
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
    """The common part of all stages with the same kind, methods and params."""

    key: str
    """Digest of the template."""
    kind: StageKind
    method: str | None
    """Names of the methods whose hooks act, joined by +; None if there are none."""
    params: Mapping[str, Any]
    needs: tuple[tuple[str, Method], ...] = ()
    """(role of another model, method that needs it)."""
    trains: tuple[Method, ...] | None = None
    """The methods that act in the training; None for a stage that does not train."""
    on_model: bool = True
    """Whether the stage loads a model."""
    row_wise: bool = False
    """Whether it changes rows independently, so that several workers can share them."""
    answers: bool = False
    """Whether the results read the artifacts of its stages."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Values that its stages add to the `where` of their cell."""
    keeps_rows: bool = True
    """Whether its methods keep the number of rows."""
    judge: JudgeOrigin | None = None
    """The judge of the stage, if the sweep names it."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """The templates of an attack and a defense stack, the same for all models, tasks and seeds."""

    key: str
    """Digest of the methods."""
    templates: tuple[StageTemplate, ...]
    """One per stage from the reference model to the scores, in the order of the lifecycle."""


class _Way(NamedTuple):
    """One variant of a stage kind in a cell, for example one per judge or benchmark."""

    params: Mapping[str, Any]
    """Values that are part of the identity."""
    judge: JudgeOrigin | None = None
    """The judge that reads answers in it."""
    where: Mapping[str, Any] = MappingProxyType({})
    """Values that are not part of the identity."""


_ADDED = ("backend", "temperature", "samples")
"""Settings of generation that earlier versions did not have."""


class Templates:
    """The templates of one sweep, each made on first use."""

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
            # A later setting at its default is left out, so that digests stay the same.
            if name not in _ADDED or evaluation[name] != usual[name]
        } | {"max_new_tokens": spec.evaluation.new_tokens}
        if spec.answer_lengths:  # left out if empty, so that earlier digests stay the same
            self._generation["answer_lengths"] = list(spec.answer_lengths)
        self._scoring = {name: evaluation[name] for name in spec.evaluation.SCORING}
        if self._judge is not None:
            self._scoring["judge"] = self._judge.plain
        self._benchmarks = [benchmark_origin(name) for name in spec.evaluation.benchmarks]
        self._forget()

    def tuned_otherwise(self, tuning: TrainingConfig) -> Templates:
        """The templates of the same sweep with other training settings; judges and benchmarks are
        not read again.
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
        """Digest of a method: its name, its VERSION and its parameters."""
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
        """A method as JSON values, which `decode.methods_of` reads back."""
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
        """The template of a stage.

        Args:
            kind: Kind of the stage.
            params: Values that decide its result, without its methods.
            methods: Methods that act in it, the attack first.
            trains: Whether the stage trains, though stages of its kind usually only read a model.
            judge: The judge that it uses.
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
            (role, method) for method in methods for role in kind.roles if role in method.needs()
        ]
        asks = any(method.needs() & set(lifecycle.roles()) for method in methods)
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
        """The templates of an attack and a defense stack."""
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
        """The templates of one kind in a cell, in the order of its stages."""
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
        """The variants of a kind in a cell: one, or one per benchmark or judge."""
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
        """The settings of the sweep that decide the result of a kind, for all its variants."""
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
        """The template of a stage that runs this model: with the model's limit of new tokens if it
        generates answers, and with its serve template if the sweep gives one.
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
        """The template of a stage that scores answers, with the version of the task's judge.

        Version 1 of a judge of this package adds nothing: this keeps the digests from before judges
        had versions.
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
        """The template with more params, which become part of its identity."""
        if not params:
            return template
        more = {**template.params, **params}
        changed = self.template(
            template.kind, more, self._methods[template.key], judge=template.judge
        )
        return replace(changed, where=template.where)

    def provider(self, role: str, method: Method, stack: Sequence[Method]) -> StageTemplate:
        """The template of the stage that makes the model of a role for a method of a stack."""
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
