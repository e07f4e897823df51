"""The worker process on Ray: runs units, for both executors that use Ray."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ftsec_ray.errors import FtsecError
from ftsec_ray.execute.dist_worker import GroupOrder
from ftsec_ray.execute.unit import (
    StageResult,
    gpu_share,
    imported,
    run_unit,
    set_up_numerics,
    short_text,
)
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.plan.stage import Stage, is_group
from ftsec_ray.redact import clean_logs
from ftsec_ray.schedule.capacity import Bundles, share_of
from ftsec_ray.schedule.dist_launch import GroupEnded, launch_on_ray, run_worker_group
from ftsec_ray.store import Store

Answer = Mapping[str, str]
"""`verdicts`: results of a unit's stages, as JSON; or `lost`: why there are none; or `broken`: why
this process cannot run any unit.
"""


class RayWorker:
    """Runs units one after the other, and keeps the models of its session in memory."""

    def __init__(self, spec: WorkerSpec, bundles: Bundles) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        clean_logs()
        self._spec = spec
        self._bundles = bundles
        self._session: Any = None

    def run(self, stages: Sequence[Stage], resource: str, attempt: int) -> Answer:
        """Run a unit. Errors at the start of the worker are returned from here, since the executor
        would not see them otherwise.

        Args:
            stages: Stages of the unit.
            resource: Resource class of the unit.
            attempt: Number of the attempt, from 1.
        """
        try:
            if is_group(resource):
                return _answer(self._worker_group(stages, resource, attempt))
            self._open()
        except GroupEnded as ended:
            return {"lost": short_text(ended)}
        except (ImportError, FtsecError, OSError) as error:
            return {"broken": short_text(error)}
        return _answer(run_unit(stages, self._store, self._session, self._runner, attempt=attempt))

    def _worker_group(
        self, stages: Sequence[Stage], resource: str, attempt: int
    ) -> list[StageResult]:
        """Run the unit in a worker group; this process only waits for it."""
        spec, share = self._spec, share_of(resource, self._bundles[resource])
        order = GroupOrder(
            stages=tuple(stages),
            worker=spec,
            attempt=attempt,
            threads=max(1, int(share.get("CPU", 1))),
        )
        return run_worker_group(
            order, lambda order: launch_on_ray(order, share), Store.open(spec.store)
        )

    def _open(self) -> None:
        """Open the store and the session on first use; they are kept for later units."""
        import ray

        if self._session is not None:
            return
        assigned = ray.get_runtime_context().get_assigned_resources()
        threads, gpus = max(1, int(assigned.get("CPU", 1))), float(assigned.get("GPU", 0.0))
        # Without an assigned GPU, this worker must run on the CPU even if the sweep uses GPUs.
        runtime = (
            self._spec.runtime
            if gpus or not self._spec.runtime.device.startswith("cuda")
            else replace(self._spec.runtime, device="cpu")
        )
        set_up_numerics(runtime.numerics, threads)
        self._store = Store.open(self._spec.store)
        self._runner = imported(self._spec.runner)
        session = imported(self._spec.session)(self._store, runtime, self._spec.cache_gib)
        set_up_numerics(runtime.numerics, threads)  # again, for libraries imported just now
        gpu_share(gpus)
        self._session = session


def _answer(verdicts: Sequence[StageResult]) -> Answer:
    return {"verdicts": json.dumps([asdict(verdict) for verdict in verdicts])}
