"""A child process that runs units: it reads orders from stdin and writes results to stdout, one
JSON line each.

It is used without Ray if stages have a time limit, or if they need other numerics than the parent
process. It runs many units and keeps the models of its session in memory. Output of stages goes to
stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ftsec_ray.errors import EnvironmentFault, FtsecError
from ftsec_ray.execute.unit import StageResult, imported, run_unit, short_text
from ftsec_ray.execute.watchdog import child_environment
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.numerics import put_in_force
from ftsec_ray.plan.stage import Stage
from ftsec_ray.redact import clean_logs
from ftsec_ray.store import Store


class WorkerLost(Exception):
    """The child process died during a unit."""


class Worker:
    """A child process that is started for the first unit, and again after it died."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._process: subprocess.Popen[str] | None = None

    def run(self, stages: Sequence[Stage], attempt: int) -> list[StageResult]:
        """Run a unit and return the results of its stages; WorkerLost if the process died."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ftsec_ray.execute.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**child_environment(), **self._spec.environment},
            )
            self._ask(self._spec.to_json())
        results = self._ask({"stages": [stage.to_json() for stage in stages], "attempt": attempt})
        return [StageResult(**plain) for plain in results]

    def _ask(self, what: dict[str, Any]) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            self.close()
            raise WorkerLost(
                f"it was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"it ended with exit code {code}"
            )
        answer = json.loads(line)
        if isinstance(answer, dict) and "broken" in answer:
            raise EnvironmentFault(
                f"the worker process fails to start: {answer['broken']}",
                self._spec.runner,
                "a worker process that starts and can open the store",
                "fix the error above",
            )
        return answer

    def close(self) -> None:
        """Kill the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError), process:  # closes its pipes and waits for its end
                process.kill()


def main() -> None:
    """Run units until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)  # noqa: T201 - the pipe to the parent

    clean_logs()
    spec = WorkerSpec.from_json(json.loads(sys.stdin.readline()))
    try:
        put_in_force(spec.runtime.numerics)
        store = Store.open(spec.store)
        runner = imported(spec.runner)
        session = imported(spec.session)(store, spec.runtime, spec.cache_gib)
    except (FtsecError, OSError) as error:
        answer({"broken": short_text(error)})
        return
    answer({})
    for line in sys.stdin:
        order = json.loads(line)
        stages = [Stage.from_json(stage) for stage in order["stages"]]
        results = run_unit(stages, store, session, runner, attempt=order["attempt"])
        answer([asdict(result) for result in results])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the parent gets it too, and informs the user
        sys.exit(128 + signal.SIGINT)
