"""A runner whose process dies once within each stage that a marker names."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ftsec_ray.execute.session import Session
from ftsec_ray.execute.stage_job import run_stage
from ftsec_ray.plan.stage import Stage
from ftsec_ray.training import loop

RUNNER = "tests.execute.killing:run"
STEPS = 2
"""Optimizer steps after which a stage that trains dies; another one dies when it has written its
files and the store does not have them yet.
"""


def markers(store: Path) -> Path:
    """The folder beside a store in which an empty file with the digest of a stage orders a kill."""
    return store.parent / "kills"


def run(stage: Stage, out: Path, session: Session) -> Mapping[str, Any] | None:
    """Run a stage, or die in it.

    A kill within training leaves the index of the step that it prevented in a marker `.training`,
    and the retry the indices of its steps in `.resumed`.
    """
    marker = markers(Path(session.store.uri)) / stage.digest
    killed, resumed = marker.with_suffix(".training"), marker.with_suffix(".resumed")
    dies = marker.exists()
    marker.unlink(missing_ok=True)
    indices: list[int] = []
    one_step = loop._one_step

    def step(process: Any, training: Any, at: Any, *args: Any, **kwargs: Any) -> None:
        if dies and len(indices) == STEPS:
            killed.write_text(str(at.index))
            _die()
        indices.append(at.index)
        if killed.exists():
            resumed.write_text(" ".join(map(str, indices)))
        one_step(process, training, at, *args, **kwargs)

    with patch.object(loop, "_one_step", step):
        extra = run_stage(stage, out, session)
    if dies:
        _die()
    return extra


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
