"""Tunes for a worker group of processes without any engine: `python -m tests.training.group_tunes
FOLDER RANK WORKERS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime, StageContext, WorkerGroup
from ftsec_ray.models.load import save_model
from ftsec_ray.training.loop import TuneReport, sft
from ftsec_ray.training.setup import Training
from tests.fixtures_models import sentiment_rows, table, tiny_model, tiny_task
from tests.numeric import float64

WORKERS = 2
ROWS = 50
"""Six batches of 8 and one of 2, in which the micro-batches do not come out even."""
CONFIG = TrainingConfig(epochs=20 / 7, batch_size=8, learning_rate=5e-3, rank=4, weight_decay=0.01)
CONFIGS = {
    "lora": CONFIG,
    "full": replace(CONFIG, adapter="full"),
    "packed": replace(CONFIG, batching="packed"),
    "frozen": replace(CONFIG, adapter="full"),
}
CUT_AT = 7
"""Steps that are done when a tune is cut off."""


class Cut(RuntimeError):
    """Stands for the end of a process."""


def shape_of(name: str, runtime: Runtime, folder: Path) -> Callable[[Training], Training] | None:
    """What methods do to a tune, by name."""
    import torch

    from ftsec_ray.defenses.lisa import Lisa

    def decay(model: Any, step: Any) -> None:
        with torch.no_grad():
            for weight in step.trainable.values():
                weight.mul_(0.99)

    def cut(model: Any, step: Any) -> None:
        if step.index == CUT_AT:
            raise Cut(str(step.index))

    def lisa(training: Training) -> Training:
        context = StageContext(seed=0, task=tiny_task(), runtime=runtime, workdir=folder, load=None)
        return Lisa(align_steps=1, user_steps=3, rho=0.1).shape_training(training, context)

    from ftsec_ray.defenses.vaccine import vaccinated

    def vaccine(training: Training) -> Training:
        return replace(training, backward=vaccinated(training.backward, rho=0.5))

    known = {
        "decay": lambda training: replace(training, after_step=(decay,)),
        "cut": lambda training: replace(training, after_step=(cut,)),
        "vaccine": vaccine,
        "lisa": lisa,
        "frozen": lambda training: replace(training, is_trainable=lambda name: "layers.0" in name),
    }
    return known.get(name)


def tune(
    folder: Path,
    name: str,
    config: str,
    *,
    shape: str = "",
    worker_group: WorkerGroup | None = None,
) -> TuneReport:
    """One tune; leaves losses and model in `folder/name`.

    In float64, DeepSpeed's copies included, but for the shape `bf16`: AdamW's first step is the sign
    of the gradient, so that in float32 the order of a sum can decide where a weight goes.
    """
    runtime = Runtime(
        worker_group=worker_group,
        micro_batch=worker_group.micro_batch if worker_group else None,
        checkpoint_every_s=0.0 if shape == "cut" else 60.0,
    )
    precision = nullcontext() if shape == "bf16" else float64()
    bf16 = (
        patch("ftsec_ray.training.loop._has_bf16", lambda device: True)
        if shape == "bf16"
        else nullcontext()
    )
    with precision, bf16:  # a CPU can compute in bf16 as well, which is only never worth it
        report = sft(
            tiny_model(),
            table(sentiment_rows(ROWS)),
            CONFIGS[config],
            seed=0,
            runtime=runtime,
            workdir=folder / "work" / name,
            shape=shape_of(shape, runtime, folder),
            base_digest="b" * 32,
        )
        (folder / name).mkdir()
        save_model(report.loaded, folder / name)
    (folder / name / "report.json").write_text(
        json.dumps({"losses": report.losses, "tokens": report.tokens, "flops": report.flops})
    )
    return report


def in_worker_group(folder: Path, jobs: list[dict[str, Any]], *, workers: int = WORKERS) -> None:
    """Run tunes one after the other in one worker group of processes; the first process leaves what
    `tune` leaves.
    """
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with (folder / "log.txt").open("wb") as log:
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.training.group_tunes",
                    str(folder),
                    str(rank),
                    str(workers),
                ],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                stdout=log,
                stderr=log,
            )
            for rank in range(workers)
        ]
        try:
            codes = [process.wait(timeout=600) for process in running]
        finally:
            for process in running:
                process.kill()
    assert codes == [0] * workers, (folder / "log.txt").read_text()[-3000:]


def allow_float64() -> None:
    """Have DeepSpeed also sum gradients in float64, which its CPU backend can and does not list."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    from deepspeed.accelerator import get_accelerator

    known = get_accelerator().supported_dtypes()
    get_accelerator().supported_dtypes = lambda: [*known, torch.float64]


def main(folder: Path, rank: int, workers: int) -> None:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=workers,
        timeout=timedelta(seconds=240),
    )
    allow_float64()
    own = folder if rank == 0 else folder / f"process-{rank}"
    for job in json.loads((folder / "jobs.json").read_text()):
        worker_group = WorkerGroup(
            **{"workers": workers, "micro_batch": 2, **job.pop("worker_group")}
        )
        try:
            own.mkdir(exist_ok=True)
            tune(own, worker_group=worker_group, **job)
        except Cut:
            assert job["shape"] == "cut"
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
