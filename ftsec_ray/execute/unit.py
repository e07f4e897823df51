"""Run the stages of one unit, publish what each leaves, and say what became of it.

An error of a stage is a verdict and not a crash: it is written to the store and returned, so that a
scheduler can tell a stage that fails for a reason of its own from a worker that died.
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
"""(stage, empty folder to fill, session) -> measurements for the record: tokens, flops, notes."""
DEFAULT_RUNNER = "ftsec_ray.execute.stage_job:run_stage"
DEFAULT_SESSION = "ftsec_ray.execute.session:Session"
_PACKAGES = ("ftsec_ray", "torch", "transformers", "peft", "ray", "deepspeed")
_TRACEBACK_LINES = 6
_USUAL_BATCH = 8
"""Rows at a time when the runtime leaves the choice to the training loop, for halving after an
out-of-memory.
"""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What became of one stage."""

    digest: str
    status: Status
    """`cached`: it was done already; `retry`: an input is damaged and must be made again first."""
    error_code: str | None = None
    error: str | None = None
    damaged: str | None = None
    """Digest of the input to make again."""
    wall_s: float = 0.0
    attempt: int = 1
    host: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the artifact is there."""
        return self.status in ("done", "cached")


def imported(path: str) -> Any:
    """The object at an import path `module:name`; EnvironmentFault when there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EnvironmentFault(f"cannot import {path}: {error}", path, "module:name") from error


def run_unit(
    stages: Sequence[Stage],
    store: Store,
    session: Any,
    runner: Runner | str = DEFAULT_RUNNER,
    *,
    attempt: int = 1,
) -> list[StageResult]:
    """One verdict per stage, in order; after the first that is not good, the others wait for
    another attempt or fail too.
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
                    error=f"stage {bad.digest} failed before it",
                    host=bad.host,
                    attempt=attempt,
                )
            )
    return verdicts


def _run_stage(stage: Stage, store: Store, session: Any, run: Runner, attempt: int) -> StageResult:
    host = socket.gethostname()
    if store.has(stage.digest):
        with suppress(StoreError, OSError):  # a leftover is no fault of the stage
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
            numerics.check(mode)  # again: only now have the libraries that it needs been loaded
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
    """Run a stage, and once more with half the rows at a time when memory does not suffice."""
    whole = getattr(session, "runtime", None)
    try:
        return dict(run(stage, folder, session) or {})
    except (MemoryError, RuntimeError) as error:
        if code_of(error) != "oom" or not isinstance(whole, Runtime):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
    half = replace(
        whole,
        micro_batch=max(1, (whole.micro_batch or _USUAL_BATCH) // 2),
        eval_batch=max(1, whole.eval_batch // 2),
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
        session.runtime = whole


def _release(session: Any) -> None:
    """Give back what a session holds in memory."""
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
    if common["error_code"] != "disk_full":  # there is no room for it
        # A store that takes no writes any more is told by the error itself.
        with suppress(StoreError, OSError):
            store.write_verdict(stage.digest, asdict(verdict))
    return verdict


def code_of(error: Exception) -> str:
    """A short name for the sort of an error: that of FtsecError, `oom`, `disk_full`, or the name of
    its class.
    """
    text = str(error).lower()
    if is_out_of_memory(error):
        return "oom"
    if "no space left" in text or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ):
        return "disk_full"
    return error.code if isinstance(error, FtsecError) else type(error).__name__


def short_text(error: Exception) -> str:
    """The message of an error, and for one that nobody raised on purpose the last lines of its
    traceback; without secrets.
    """
    if isinstance(error, FtsecError):
        return redacted(str(error))
    lines = redacted("".join(traceback.format_exception(error))).rstrip().splitlines()
    return "\n".join(lines[-_TRACEBACK_LINES:])


@cache
def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in ("python", *_PACKAGES)}


class _Meter:
    """Time and memory since it was made."""

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
    torch = sys.modules.get("torch")  # a stage that did not import it used no GPU
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _gpu_peak() -> int:
    cuda = _torch_cuda()
    return int(cuda.max_memory_allocated()) if cuda is not None else 0


def _reset_peak() -> None:
    """Start the peak of resident memory anew, where the kernel can (Linux): a worker outlives many
    stages.
    """
    cuda = _torch_cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    if Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # forbidden in some containers: the peak is then that of the process
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
    """Make this process compute as a sweep wants, with so many threads where it is free in that;
    EnvironmentFault when it cannot.
    """
    numerics.put_in_force(mode)
    cpu_threads(1 if mode == "portable" else threads)


def cpu_threads(count: int) -> None:
    """Let numeric libraries use so many threads: several workers share one machine."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def gpu_share(share: float) -> None:
    """Let torch allocate so much of the GPU's memory, 0..1: a stage that outgrows its share fails
    alone, and spares its neighbours.
    """
    cuda = _torch_cuda()
    if cuda is not None and 0 < share < 1:
        cuda.set_per_process_memory_fraction(share)
