"""A process that runs units for the one that started it: orders come by stdin, verdicts go by
stdout, one JSON line each.

For runs without Ray whose stages may have to be killed, or that need other numerics than the
process that starts them. It lives on from unit to unit with the
models of its session in memory. What a stage prints goes to stderr.
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
    """The process ended within a unit."""


class Worker:
    """A process that is started when a unit comes, and again after it was lost."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._process: subprocess.Popen[str] | None = None

    def run(self, stages: Sequence[Stage], attempt: int) -> list[StageResult]:
        """The verdicts of a unit; WorkerLost when the process ended without any."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ftsec_ray.execute.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**child_environment(), **self._spec.environment},
            )
            self._ask(self._spec.to_json())
        told = self._ask({"stages": [stage.to_json() for stage in stages], "attempt": attempt})
        return [StageResult(**one) for one in told]

    def _ask(self, what: dict[str, Any]) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            told = process.stdout.readline()
        except BrokenPipeError:
            told = ""
        if not told:
            code = process.wait()
            self.close()
            raise WorkerLost(
                f"it was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"it left with exit code {code}"
            )
        found = json.loads(told)
        if isinstance(found, dict) and "broken" in found:
            raise EnvironmentFault(
                f"a worker cannot open: {found['broken']}",
                self._spec.runner,
                "see the text above",
            )
        return found

    def close(self) -> None:
        """End the process, whatever it is at."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError), process:  # which closes its pipes and waits for it
                process.kill()


def main() -> None:
    """Serve until stdin is closed."""
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
        stages = [Stage.from_json(one) for one in order["stages"]]
        answer(
            [
                asdict(one)
                for one in run_unit(stages, store, session, runner, attempt=order["attempt"])
            ]
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # it goes to the parent as well, which tells the user
        sys.exit(128 + signal.SIGINT)
