"""The stage context that attack tests hand to hooks."""

from __future__ import annotations

from pathlib import Path

from ftsec_ray.context import LoadedModel, Runtime, StageContext, TaskData
from tests.fixtures_models import tiny_task


def no_model(role: str) -> LoadedModel:
    """Fails: the attacks under test declare no role."""
    raise AssertionError(role)


def context(*, seed: int = 0, task: TaskData | None = None) -> StageContext:
    """A context over the tiny task."""
    return StageContext(
        seed=seed,
        task=task or tiny_task(),
        runtime=Runtime(),
        workdir=Path("unused"),
        load=no_model,
    )
