"""Starts the worker group of a unit, on Ray or on this machine, and handles its errors.

A worker group ends when one of its processes fails. The driver collects the errors of all
processes. After an out-of-memory it runs the group once more with half the micro-batch. If process
0 recorded results, these count; else an error in any process fails the stage. If there are no
errors, or only consequences of a lost connection, a worker died, and the scheduler retries the
unit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ftsec_ray.errors import FtsecError
from ftsec_ray.execute.dist_worker import GroupFault, GroupOrder, read_answers, work, write_order
from ftsec_ray.execute.unit import StageResult
from ftsec_ray.plan.stage import Stage
from ftsec_ray.redact import redacted
from ftsec_ray.store import Store

Launch = Callable[[GroupOrder], list[StageResult]]
"""Runs a worker group and returns the results of its stages; raises GroupEnded."""
_GRACE_S = 5.0
"""Seconds that the other processes of a worker group have to report errors after one has failed."""


class GroupEnded(FtsecError):
    """A worker group failed."""

    code = "worker_lost"

    def __init__(self, what: str, faults: Sequence[GroupFault] = ()) -> None:
        Exception.__init__(self, what, tuple(faults))
        self.what = what
        self.got, self.want, self.fix = None, "", ""
        self.faults = tuple(faults)


def run_worker_group(order: GroupOrder, launch: Launch, store: Store) -> list[StageResult]:
    """The results of a unit's stages in a worker group; GroupEnded if a worker died and the unit
    should be retried.
    """
    try:
        return launch(order)
    except GroupEnded as ended:
        if not any(fault.code == "oom" for fault in ended.faults):
            return _verdicts(order, ended, store)
    try:
        return launch(replace(order, halvings=1))
    except GroupEnded as ended:
        return _verdicts(order, ended, store)


def _verdicts(order: GroupOrder, ended: GroupEnded, store: Store) -> list[StageResult]:
    recorded = next((fault for fault in ended.faults if fault.sort == "verdict"), None)
    if recorded is not None:
        return [StageResult(**result) for result in json.loads(recorded.text)]
    fault = next((fault for fault in ended.faults if fault.sort == "error"), None)
    if fault is None:
        raise ended
    return list(_failed(order.stages, fault, order.attempt, store))


def _failed(
    stages: Sequence[Stage], fault: GroupFault, attempt: int, store: Store
) -> list[StageResult]:
    """Results of a unit in which one stage failed: those before it are done, those after it are
    upstream_failed.
    """
    at = [stage.digest for stage in stages].index(fault.digest)
    before = [
        StageResult(digest=stage.digest, status="done", attempt=attempt) for stage in stages[:at]
    ]
    verdict = StageResult(
        digest=fault.digest,
        status="failed",
        error_code=fault.code,
        error=fault.text,
        attempt=attempt,
    )
    store.write_verdict(fault.digest, asdict(verdict))
    after = [
        StageResult(
            digest=stage.digest,
            status="upstream_failed",
            error_code=fault.code,
            attempt=attempt,
            error=f"not run: stage {fault.digest}, which it needs, failed",
        )
        for stage in stages[at + 1 :]
    ]
    return [*before, verdict, *after]


def launch_here(order: GroupOrder) -> list[StageResult]:
    """Run a worker group as processes of this machine, without Ray."""
    with tempfile.TemporaryDirectory(prefix="ftsec-worker group-") as scratch:
        folder = Path(scratch)
        write_order(order, folder)
        environment = {
            **os.environ,
            **order.worker.environment,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", "ftsec_ray.execute.dist_worker", scratch]
        with (folder / "log.txt").open("wb") as log:
            processes = [
                subprocess.Popen(
                    [*command, str(rank)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                )
                for rank in range(order.workers)
            ]
            try:
                codes = _wait(processes)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        verdicts, faults = read_answers(folder, order.workers)
        if verdicts is None or any(codes):
            last = (
                redacted((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
                .strip()
                .splitlines()[-3:]
            )
            raise GroupEnded(
                f"a process of a worker group of {order.workers} died (exit codes {codes}):"
                f" {' / '.join(last)}",
                faults,
            )
        return verdicts


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes once all processes have ended, or _GRACE_S after the first failure."""
    failed_at: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return codes
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
            return codes
        time.sleep(0.05)


def launch_on_ray(order: GroupOrder, asks: Mapping[str, float]) -> list[StageResult]:
    """Run a worker group with Ray Train; `asks` are the resources of each worker."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    is_cuda = order.is_on_cuda
    with tempfile.TemporaryDirectory(prefix="ftsec-train-") as scratch:
        trainer = TorchTrainer(
            _on_ray,
            train_loop_config={"order": order.to_json()},
            torch_config=TorchConfig(backend="nccl" if is_cuda else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=order.workers, use_gpu=is_cuda, resources_per_worker=dict(asks)
            ),
            run_config=RunConfig(
                name="worker_group",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0),
                # Ray Train imports torch in its workers before this package's code runs there.
                worker_runtime_env={"env_vars": dict(order.worker.environment)},
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            faults = [fault for fault in failures.values() if isinstance(fault, GroupFault)]
            raise GroupEnded(
                f"a worker of a worker group of {order.workers} died:"
                f" {redacted(str(error))[-500:]}",
                faults,
            ) from error
    return [StageResult(**plain) for plain in result.return_value]


def _on_ray(config: Mapping[str, str]) -> list[dict[str, object]]:
    return [asdict(verdict) for verdict in work(GroupOrder.from_json(config["order"]))]
