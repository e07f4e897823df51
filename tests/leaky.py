"""Runners that mention the secrets of their environment wherever a stage can say something."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftsec_ray.errors import DataError
from ftsec_ray.plan.stage import Stage
from tests.cli import toy

NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASSWORD")


def said() -> str:
    """A text as a failing download writes it."""
    tokens = [os.environ[name] for name in NAMES]
    return (
        f"403 Client Error for url: https://me:{tokens[0]}@host.example/m?token={tokens[1]}"
        f" (Authorization: Bearer {tokens[2]}) {tokens[3]}"
    )


def run_stage(stage: Stage, out: Path, session: Any) -> Mapping[str, Any]:
    """Fail in two ways with the secrets in the message, else put them into the notes of the
    record.
    """
    if stage.method == "badnets":
        raise OSError(said())
    if stage.method == "shrink":
        raise DataError(f"cannot download: {said()}", said(), said(), said())
    return {**toy.run_stage(stage, out, session), "notes": {"from": said(), "list": [said()]}}


def main() -> None:
    """The command line with these runners: `python -m tests.leaky run SWEEP ...`."""
    from ftsec_ray.cli import main as command_line
    from ftsec_ray.schedule import execution

    real = execution.execute
    execution.execute = lambda plan, store, **rest: real(
        plan,
        store,
        **{**rest, "runner": "tests.leaky:run_stage", "session": "tests.cli.toy:Session"},
    )
    command_line()


if __name__ == "__main__":
    main()
