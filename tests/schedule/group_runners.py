"""What the processes of a worker group run in tests of the engine: a sum over all of them, failures
and deaths on demand.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftsec_ray.errors import StageError
from ftsec_ray.plan.stage import Stage
from tests.schedule.engine_runners import Bench, log, stage_of


def group_stage(
    name: str, *needs: Stage, workers: int = 2, micro_batch: int = 4, **params: Any
) -> Stage:
    stage = stage_of(name, *needs, **params)
    return replace(
        stage,
        resource=f"group:{workers}cpu",
        where={"worker_group": {"workers": workers, "zero_stage": 0, "micro_batch": micro_batch}},
    )


def meet(stage: Stage, out: Path, session: Bench) -> dict[str, Any]:
    """All processes add up their ranks; the file says what they came to."""
    params = stage.params
    if session.runtime.worker_group is None:
        log(stage, "alone")
        time.sleep(params.get("sleep", 0.0))
        (out / "out.json").write_text(json.dumps({"name": params["name"]}))
        return {}
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    log(stage, f"began-{rank}")
    at = params.get("at", 0)
    if params.get("die_once") and rank == at and not Path(params["die_once"]).exists():
        Path(params["die_once"]).write_text("died")
        os.kill(os.getpid(), signal.SIGKILL)
    if params.get("fail") and rank == at:
        raise StageError("told to fail", params["name"])
    if params.get("crash") and rank == at:
        raise ValueError(params["name"])
    if params.get("most_rows", 99) < session.runtime.micro_batch and rank == at:
        raise RuntimeError("CUDA out of memory: told to")
    time.sleep(params.get("sleep", 0.0))
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    given = [(session.store.fetch(one) / "out.json").read_text() for _, one in stage.inputs]
    (out / "out.json").write_text(
        json.dumps({"name": params["name"], "sum": float(total), "given": len(given)})
    )
    (session.store.workdir(stage.digest)).mkdir(exist_ok=True)
    log(stage, f"ran-{rank}")
    return {"notes": {"total": float(total)}}
