"""Runs the stages of one unit, publishes their artifacts, and returns their results.

An error of a stage does not crash the worker: it is recorded in the store and returned. So the
scheduler can distinguish a failed stage from a worker that died.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ftsec_ray import numerics
from ftsec_ray.code_versions import stage_code
from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault, FtsecError, StoreError, is_out_of_memory
from ftsec_ray.execute.watchdog import watched
from ftsec_ray.plan.stage import Stage, workers_of
from ftsec_ray.redact import redacted, without_secrets
from ftsec_ray.store import DamagedArtifact, Store
from ftsec_ray.version import version_of

Status = Literal["done", "cached", "failed", "upstream_failed", "retry"]
Runner = Callable[[Stage, Path, Any], "Mapping[str, Any] | None"]
"""(stage, empty output folder, session) -> measurements for the record: tokens, flops, notes."""
DEFAULT_RUNNER = "ftsec_ray.execute.stage_job:run_stage"
DEFAULT_SESSION = "ftsec_ray.execute.session:Session"
_PACKAGES = ("ftsec_ray", "torch", "transformers", "peft", "ray", "deepspeed")
_TRACEBACK_LINES = 6
_USUAL_BATCH = 8
"""Micro-batch that is halved after an out-of-memory error if the runtime does not set one."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of one stage."""

    digest: str
    status: Status
    """`cached`: it was already done; `retry`: a damaged input must be made again first."""
    error_code: str | None = None
    error: str | None = None
    damaged: str | None = None
    """Digest of the damaged input."""
    wall_s: float = 0.0
    attempt: int = 1
    host: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the store has the artifact."""
        return self.status in ("done", "cached")


def imported(path: str) -> Any:
    """The object at an import path `module:name`; EnvironmentFault if it does not exist."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EnvironmentFault(
            f"cannot import {path}: {error}",
            path,
            "module:name",
            "check the import path, and install the package on all nodes",
        ) from error


def run_unit(
    stages: Sequence[Stage],
    store: Store,
    session: Any,
    runner: Runner | str = DEFAULT_RUNNER,
    *,
    attempt: int = 1,
) -> list[StageResult]:
    """Run the stages of a unit, in order.

    Args:
        stages: The stages.
        store: The store of artifacts.
        session: The worker's session.
        runner: The function that runs one stage, or its import path.
        attempt: Number of the attempt, from 1.

    Returns:
        One result per stage. After a failed stage, the others are `upstream_failed`; after
        `retry`, they are left out, since the unit runs again.
    """
    run = imported(runner) if isinstance(runner, str) else runner
    verdicts: list[StageResult] = []
    for stage in stages:
        bad = next((v for v in verdicts if not v.is_good), None)
        if bad is None:
            with watched(
                store,
                stage.digest,
                attempt,
                getattr(getattr(session, "runtime", None), "timeout_s", None),
            ):
                verdicts.append(_run_stage(stage, store, session, run, attempt))
        elif bad.status == "failed":
            verdicts.append(
                StageResult(
                    digest=stage.digest,
                    status="upstream_failed",
                    error_code=bad.error_code,
                    error=f"not run: stage {bad.digest}, which it needs, failed",
                    host=bad.host,
                    attempt=attempt,
                )
            )
    return verdicts


def _run_stage(stage: Stage, store: Store, session: Any, run: Runner, attempt: int) -> StageResult:
    host = socket.gethostname()
    if store.has(stage.digest):
        with suppress(StoreError, OSError):  # a leftover must not fail the stage
            store.drop_verdict(stage.digest)
        return StageResult(digest=stage.digest, status="cached", attempt=attempt, host=host)
    meter = _Meter()
    folder: Path | None = None
    mode = stage.params.get("numerics")
    try:
        folder = store.scratch(stage.digest)
        if mode is not None:
            numerics.check(mode)
        extra = _run_fitting(run, stage, folder, session)
        if mode is not None:
            numerics.check(mode)  # again: the stage may have loaded more libraries
            extra["numerics"] = numerics.record_of(mode)
        measured = meter.read(gpus=workers_of(stage.resource))
        record = {
            **_identity(stage),
            **measured,
            **extra,
            "attempt": attempt,
            "host": host,
            "versions": dict(_versions()),
        }
        store.publish(stage.digest, folder, without_secrets(record))
    except BaseException as error:
        if not isinstance(error, Exception):
            raise
        return _bad(stage, store, error, meter, attempt, host)
    finally:
        store.leave_work(stage.digest)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(StoreError, OSError):
        store.drop_verdict(stage.digest)
        store.drop_work(stage.digest)
    return StageResult(
        digest=stage.digest, status="done", wall_s=measured["wall_s"], attempt=attempt, host=host
    )


def _run_fitting(run: Runner, stage: Stage, folder: Path, session: Any) -> dict[str, Any]:
    """Run a stage; after an out-of-memory error, once more with half the batch sizes."""
    full = getattr(session, "runtime", None)
    try:
        return dict(run(stage, folder, session) or {})
    except (MemoryError, RuntimeError) as error:
        if code_of(error) != "oom" or not isinstance(full, Runtime):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
    half = replace(
        full,
        micro_batch=max(1, (full.micro_batch or _USUAL_BATCH) // 2),
        eval_batch=max(1, full.eval_batch // 2),
    )
    _release(session)
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    session.runtime = half
    try:
        return {
            **(run(stage, folder, session) or {}),
            "micro_batch": half.micro_batch,
            "eval_batch": half.eval_batch,
        }
    finally:
        session.runtime = full


def _release(session: Any) -> None:
    """Free the memory of a session."""
    clear = getattr(session, "clear", None)
    if callable(clear):
        clear()
    gc.collect()
    cuda = _torch_cuda()
    if cuda is not None:
        cuda.empty_cache()


def _identity(stage: Stage) -> dict[str, Any]:
    plain = stage.to_json()
    kept = ("kind", "method", "seed", "params", "inputs", "where", "resource", "cost_s")
    return {
        **{key: plain[key] for key in kept},
        "code": stage_code(stage.kind, stage.params.get("methods", ())),
    }


def _bad(
    stage: Stage, store: Store, error: Exception, meter: _Meter, attempt: int, host: str
) -> StageResult:
    common: dict[str, Any] = {
        "digest": stage.digest,
        "attempt": attempt,
        "host": host,
        "wall_s": meter.wall_s,
        "error_code": code_of(error),
        "error": short_text(error),
    }
    if isinstance(error, DamagedArtifact) and error.got != stage.digest:
        return StageResult(status="retry", damaged=str(error.got), **common)
    verdict = StageResult(status="failed", **common)
    if common["error_code"] != "disk_full":  # else there is no space to write the result
        # If the store accepts no writes, the returned error says so.
        with suppress(StoreError, OSError):
            store.write_verdict(stage.digest, asdict(verdict))
    return verdict


def code_of(error: Exception) -> str:
    """The code of an error: `oom`, `disk_full`, the code of an FtsecError, or the class name."""
    text = str(error).lower()
    if is_out_of_memory(error):
        return "oom"
    if "no space left" in text or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ):
        return "disk_full"
    return error.code if isinstance(error, FtsecError) else type(error).__name__


def short_text(error: Exception) -> str:
    """The message of an FtsecError, or the last lines of the traceback of another error; secrets
    are redacted.
    """
    if isinstance(error, FtsecError):
        return redacted(str(error))
    lines = redacted("".join(traceback.format_exception(error))).rstrip().splitlines()
    return "\n".join(lines[-_TRACEBACK_LINES:])


@cache
def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in ("python", *_PACKAGES)}


class _Meter:
    """Measures time and memory from its creation on."""

    def __init__(self) -> None:
        self._started = time.time()
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        _reset_peak()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall

    def read(self, *, gpus: int = 1) -> dict[str, Any]:
        gpu_peak = _gpu_peak()
        return {
            "started": self._started,
            "wall_s": self.wall_s,
            "cpu_s": time.process_time() - self._cpu,
            "gpu_s": self.wall_s * gpus if gpu_peak else 0.0,
            "peak_bytes": _peak_bytes(),
            "gpu_peak_bytes": gpu_peak,
        }


def _torch_cuda() -> Any:
    torch = sys.modules.get("torch")  # without torch, a stage cannot use a GPU
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _gpu_peak() -> int:
    cuda = _torch_cuda()
    return int(cuda.max_memory_allocated()) if cuda is not None else 0


def _reset_peak() -> None:
    """Reset the peak of resident memory (Linux only), because a worker runs many stages."""
    cuda = _torch_cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    if Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not allowed in some containers; the peak is then that of the process
            return


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(
            (text for text in status.read_text().splitlines() if text.startswith("VmHWM:")), None
        )
        if line is not None:
            return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def set_up_numerics(mode: numerics.NumericsMode, threads: int) -> None:
    """Set the numerics of this process; EnvironmentFault if that is not possible.

    Args:
        mode: The numerics of the sweep.
        threads: CPU threads; `portable` always uses one.
    """
    numerics.put_in_force(mode)
    cpu_threads(1 if mode == "portable" else threads)


def cpu_threads(count: int) -> None:
    """Set the number of threads of numeric libraries, since several workers share one machine."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def gpu_share(share: float) -> None:
    """Limit torch to a fraction of the GPU's memory, 0..1, so that a stage that needs more fails
    without affecting other stages on the same GPU.
    """
    cuda = _torch_cuda()
    if cuda is not None and 0 < share < 1:
        cuda.set_per_process_memory_fraction(share)
