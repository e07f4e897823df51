"""Typed objects out of a stage's JSON: what a worker needs to run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.sweep import (
    AlignSpec,
    EvaluationConfig,
    JudgeConfig,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.config.typed import build
from ftsec_ray.errors import StageError
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method
from ftsec_ray.plan.stage import Stage

T = TypeVar("T")


def _typed(cls: type[T], plain: object, what: str) -> T:
    """A typed object, by the function and the checks that read it in a sweep file."""
    faults = Faults(f"{what} of a stage")
    value = build(cls, plain, what, faults)
    if value is None:
        wrong = "; ".join(f"{place}: {fault.what}" for place, fault in faults.found)
        raise StageError(
            f"a stage carries no {cls.__name__} of this version: {wrong}",
            plain,
            "; ".join(fault.want for _, fault in faults.found if fault.want),
            "plan the sweep again with the version that runs it",
        )
    return value


def _param(stage: Stage, name: str) -> Any:
    if name not in stage.params:
        raise StageError(
            f"a stage of kind {stage.kind!r} carries no {name!r}", sorted(stage.params), name
        )
    return stage.params[name]


def methods_of(stage: Stage) -> list[Method]:
    """The methods that act in a stage, the attack first."""
    from ftsec_ray.registry import ATTACKS, DEFENSES

    registries = {"attack": ATTACKS, "defense": DEFENSES}
    return [
        _typed(registries[m["kind"]].get(m["name"]), m["params"], m["name"])
        for m in stage.params.get("methods", ())
    ]


def training_of(stage: Stage) -> TrainingConfig:
    """How a stage tunes."""
    return _typed(TrainingConfig, _param(stage, "training"), "training")


def generation_of(stage: Stage) -> EvaluationConfig:
    """What is asked of a model; what concerns judges is at its default."""
    return _typed(EvaluationConfig, _param(stage, "generation"), "generation")


def scoring_of(stage: Stage) -> EvaluationConfig:
    """How answers are judged; what concerns asking is at its default."""
    plain = _param(stage, "scoring")
    config = _typed(EvaluationConfig, {**plain, "judge": None}, "scoring")
    named = plain.get("judge")
    return config if named is None else replace(config, judge=judge_of(stage, named))


def judge_of(stage: Stage, plain: Any) -> str | JudgeConfig:
    """A judge as the sweep names it, from its identity in a stage's parameters."""
    named = stage.where.get("judges", {}).get(canonical(plain), plain)
    return named if isinstance(named, str) else _typed(JudgeConfig, named, "judge")


def align_of(stage: Stage) -> AlignSpec | None:
    """How a model is aligned; None for a rung of the ladder, which has its own way."""
    return _typed(AlignSpec, stage.params["align"], "align") if "align" in stage.params else None


def task_of(stage: Stage) -> TaskSpec:
    """The task of a `task` stage, with the paths of its files put back."""
    task = _typed(TaskSpec, _param(stage, "task"), "task")
    paths = stage.where.get("paths", {})
    splits = tuple((split, replace(source, path=paths.get(split))) for split, source in task.splits)
    return replace(task, splits=splits)
