"""Typed objects from a stage's JSON: what a worker needs to run the stage."""

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
    """A typed object, with the same checks as for a sweep file."""
    faults = Faults(f"{what} of a stage")
    value = build(cls, plain, what, faults)
    if value is None:
        wrong = "; ".join(f"{place}: {fault.what}" for place, fault in faults.found)
        raise StageError(
            f"the stage has no valid {cls.__name__} for this version of ftsec_ray: {wrong}",
            plain,
            "; ".join(fault.want for _, fault in faults.found if fault.want),
            "plan the sweep again with the version that runs it",
        )
    return value


def _param(stage: Stage, name: str) -> Any:
    if name not in stage.params:
        raise StageError(
            f"the stage of kind {stage.kind!r} lacks the parameter {name!r}",
            sorted(stage.params),
            name,
            "plan the sweep again with the version that runs it",
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
    """The training settings of a stage."""
    return _typed(TrainingConfig, _param(stage, "training"), "training")


def generation_of(stage: Stage) -> EvaluationConfig:
    """The generation settings of a stage; settings of judges are at their defaults."""
    return _typed(EvaluationConfig, _param(stage, "generation"), "generation")


def scoring_of(stage: Stage) -> EvaluationConfig:
    """The scoring settings of a stage; settings of generation are at their defaults."""
    plain = _param(stage, "scoring")
    config = _typed(EvaluationConfig, {**plain, "judge": None}, "scoring")
    named = plain.get("judge")
    return config if named is None else replace(config, judge=judge_of(stage, named))


def judge_of(stage: Stage, plain: Any) -> str | JudgeConfig:
    """A judge as the sweep file gives it, from its identity in the stage's parameters."""
    named = stage.where.get("judges", {}).get(canonical(plain), plain)
    return named if isinstance(named, str) else _typed(JudgeConfig, named, "judge")


def align_of(stage: Stage) -> AlignSpec | None:
    """The alignment settings of a stage; None for a ladder model, which has fixed settings."""
    return _typed(AlignSpec, stage.params["align"], "align") if "align" in stage.params else None


def task_of(stage: Stage) -> TaskSpec:
    """The task of a `task` stage, with the paths of its files restored from `where`."""
    task = _typed(TaskSpec, _param(stage, "task"), "task")
    paths = stage.where.get("paths", {})
    splits = tuple((split, replace(source, path=paths.get(split))) for split, source in task.splits)
    return replace(task, splits=splits)
