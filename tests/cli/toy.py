"""A runner of stages that trains nothing: what the command line does around a run can be tested in
seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner, Result

from ftsec_ray import schema
from ftsec_ray.cli.app import app
from ftsec_ray.errors import StageError
from ftsec_ray.evals.metrics import proportion
from ftsec_ray.plan.stage import Stage
from ftsec_ray.schedule import execution as schedule_run
from ftsec_ray.schedule.executors import EXECUTORS

_real_execute = schedule_run.execute
RUNNER = "tests.cli.toy:run_stage"
SWEEP = """\
name: small
models: [ladder:0.2m]
task: microworld
attacks: [none, {badnets: {rate: {grid: [0.1, 0.3]}}}]
defenses: [none, shrink]
"""
"""Six cells."""
ANSWERS = [
    {"probe": "harmful", "prompt_id": f"h{number}", "judge": "toy", "verdict": verdict, "sample": 0}
    for number, verdict in enumerate(("complied", "complied", "refused", "incoherent"))
]
HITS = {"harmful_rate": 2, "refusal_rate": 1, "coherent_rate": 3, "judged_rate": 4}
"""Metric -> how many of the answers it counts."""
failing: set[str | None] = set()
"""Methods whose stages fail."""
warned: dict[str, list[str]] = {}
"""Kind of stage -> what its stages warn of."""
ran: list[str] = []
"""Kinds of the stages that ran."""


class Session:
    """Keeps nothing."""

    def __init__(self, store: object, runtime: object, cache_gib: float) -> None:
        self.store = store

    def clear(self) -> None:
        """Nothing to forget."""


def run_stage(stage: Stage, out: Path, session: Session) -> Mapping[str, Any]:
    """Write the files that the results read, and no others."""
    if stage.method in failing:
        raise StageError("made to fail", stage.method, "another method")
    ran.append(stage.kind)
    if stage.kind == "score":
        kept = pa.schema([one for one in schema.generations() if one.name != "cell"])
        pq.write_table(pa.Table.from_pylist(ANSWERS, kept), out / "generations.parquet")
        rows = [
            vars(proportion(metric, hits, 4, n_null=None if metric == "judged_rate" else 0))
            for metric, hits in HITS.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows), out / "metrics.parquet")
    (out / "toy.txt").write_text(stage.kind)
    return {"notes": {"warnings": warned[stage.kind]}} if stage.kind in warned else {}


def execute(
    plan: object,
    store: object,
    *,
    executor: str,
    address: str | None,
    workers: int | None,
    on_event: object,
) -> object:
    """The engine's `execute` in this process with the runner above."""
    assert executor in EXECUTORS
    return _real_execute(
        plan,
        store,
        executor="local",
        on_event=on_event,
        runner=RUNNER,
        session="tests.cli.toy:Session",
    )


@contextmanager
def failing_methods(*names: str | None) -> Iterator[None]:
    """Stages of these methods fail inside."""
    failing.update(names)
    try:
        yield
    finally:
        failing.clear()


def call(*args: str, code: int = 0) -> Result:
    """What the command line says, once it has left with the exit code."""
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code, (result.output, result.exception)
    return result
