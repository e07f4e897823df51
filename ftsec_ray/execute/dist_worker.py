"""The processes of a worker group: all run the same stages, and process 0 publishes the artifacts.

Process 0 runs the unit like any other worker, and broadcasts the next stage to the others; they
synchronize inside the training loop. A process that fails raises a GroupFault, which ends the whole
group, because the others would wait for it forever. `python -m ftsec_ray.execute.dist_worker FOLDER
RANK` runs one process of a worker group without Ray.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftsec_ray.context import Runtime, WorkerGroup
from ftsec_ray.execute.unit import (
    Runner,
    StageResult,
    code_of,
    imported,
    run_unit,
    set_up_numerics,
    short_text,
)
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.plan.stage import Stage
from ftsec_ray.redact import clean_logs
from ftsec_ray.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

FaultKind = Literal["verdict", "error", "consequence"]
JOIN_TIMEOUT_S = 1800.0
"""Timeout of a process of a worker group that waits for the others, in seconds."""


@dataclass(frozen=True, kw_only=True)
class GroupOrder:
    """A unit for a worker group, and the settings of its processes."""

    stages: tuple[Stage, ...]
    worker: WorkerSpec
    attempt: int
    threads: int
    """CPU threads of one process."""
    halvings: int = 0
    """How often the micro-batch was halved after an out-of-memory error."""

    @property
    def workers(self) -> int:
        """Number of processes of the worker group."""
        return worker_group_of(self.stages[0]).workers

    @property
    def is_on_cuda(self) -> bool:
        """Whether each process has a GPU."""
        return self.worker.runtime.device.startswith("cuda")

    def runtime_of(self, stage: Stage) -> Runtime:
        """The runtime settings of a stage in this process."""
        worker_group = worker_group_of(stage)
        worker_group = replace(
            worker_group, micro_batch=max(1, worker_group.micro_batch >> self.halvings)
        )
        device = (
            f"cuda:{os.environ['LOCAL_RANK']}" if self.is_on_cuda else self.worker.runtime.device
        )
        return replace(
            self.worker.runtime,
            device=device,
            micro_batch=worker_group.micro_batch,
            worker_group=worker_group,
        )

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        plain = asdict(self)  # a Stage's own mappings included
        return json.dumps({**plain, "stages": [stage.to_json() for stage in self.stages]})

    @classmethod
    def from_json(cls, text: str) -> GroupOrder:
        """The order from the text of `to_json`."""
        plain = json.loads(text)
        return cls(
            **{
                **plain,
                "stages": tuple(Stage.from_json(stage) for stage in plain["stages"]),
                "worker": WorkerSpec.from_json(plain["worker"]),
            }
        )


def worker_group_of(stage: Stage) -> WorkerGroup:
    """The worker group of a stage, as planned."""
    return WorkerGroup(**stage.where["worker_group"])


class GroupFault(Exception):
    """The error of one process of a worker group; its arguments are positional, so that it can be
    pickled.
    """

    def __init__(self, sort: FaultKind, code: str, text: str, digest: str) -> None:
        super().__init__(sort, code, text, digest)
        self.sort = sort
        """`verdict`: `text` is JSON of the unit's stage results; `error`: this process failed;
        `consequence`: another process failed first.
        """
        self.code = code
        self.text = text
        self.digest = digest
        """Digest of the stage in which it happened."""


class _GroupEnds(BaseException):
    """Leaves `run_unit` without recording a result; the driver decides on it, since it gets the
    errors of all processes.
    """

    def __init__(self, fault: GroupFault) -> None:
        super().__init__(fault)
        self.fault = fault


def fault_of(error: Exception, stage: Stage) -> GroupFault:
    """The GroupFault for an error in one process."""
    from torch.distributed import DistError

    code, text = code_of(error), str(error).lower()
    lost = isinstance(error, DistError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("gloo", "nccl", "connection closed"))
    )
    return GroupFault(
        "consequence" if lost and code != "oom" else "error", code, short_text(error), stage.digest
    )


def work(order: GroupOrder) -> list[StageResult]:
    """Run one process of a worker group, after torch.distributed is initialized.

    Returns:
        The results of the stages in process 0; an empty list in the others.
    """
    import torch
    import torch.distributed as dist

    clean_logs()
    if order.is_on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    set_up_numerics(order.worker.runtime.numerics, order.threads)
    store, run = Store.open(order.worker.store), imported(order.worker.runner)
    open_session, runtime = imported(order.worker.session), order.runtime_of(order.stages[0])
    if dist.get_rank() == 0:
        return _lead(order, store, open_session(store, runtime, order.worker.cache_gib), run)
    with tempfile.TemporaryDirectory(prefix="ftsec-worker group-") as scratch:
        read_only: Any = _ReadOnlyStore(store, Path(scratch))
        session = open_session(read_only, runtime, order.worker.cache_gib)
        _follow(order, session, run, Path(scratch))
    return []


class _ReadOnlyStore:
    """The store of a process that publishes nothing and writes no checkpoints; process 0 does."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch

    def workdir(self, digest: str) -> Path:
        """A temporary folder of this process."""
        return self._scratch / f"work-{digest}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _lead(order: GroupOrder, store: Store, session: Any, run: Runner) -> list[StageResult]:
    def with_followers(stage: Stage, out: Path, session: Any) -> Mapping[str, Any] | None:
        _next_stage(stage.digest)
        session.runtime = order.runtime_of(stage)
        try:
            measured = run(stage, out, session)
        except Exception as error:
            fault = fault_of(error, stage)
            if fault.sort == "consequence" or fault.code == "oom":
                raise _GroupEnds(fault) from error
            raise
        return {**(measured or {}), "micro_batch": session.runtime.micro_batch}

    try:
        verdicts = run_unit(order.stages, store, session, with_followers, attempt=order.attempt)
    except _GroupEnds as ended:
        raise ended.fault from ended
    bad = next((verdict for verdict in verdicts if not verdict.is_good), None)
    if bad is not None:
        raise GroupFault(
            "verdict",
            str(bad.error_code),
            json.dumps([asdict(verdict) for verdict in verdicts]),
            bad.digest,
        )
    _next_stage(None)
    return verdicts


def _follow(order: GroupOrder, session: Any, run: Runner, scratch: Path) -> None:
    stages = {stage.digest: stage for stage in order.stages}
    while (digest := _next_stage(None)) is not None:
        stage, out = stages[digest], scratch / f"out-{digest}"
        session.runtime = order.runtime_of(stage)
        out.mkdir()
        try:
            run(stage, out, session)
        except Exception as error:
            raise fault_of(error, stage) from error


def _next_stage(digest: str | None) -> str | None:
    """Broadcast the digest of the next stage from process 0 to all; None means the end."""
    import torch.distributed as dist

    stages: list[Any] = [digest]
    dist.broadcast_object_list(stages, src=0)
    next_digest: str | None = stages[0]
    return next_digest


# Without Ray.


def write_order(order: GroupOrder, folder: Path) -> None:
    """Write an order into the folder from which the processes of a worker group read it."""
    (folder / "order.json").write_text(order.to_json(), encoding="utf-8")


def read_answers(folder: Path, workers: int) -> tuple[list[StageResult] | None, list[GroupFault]]:
    """The answers of the processes of a worker group: the stage results of process 0 (None if it
    did not finish), and all faults.
    """
    answers = [
        json.loads(path.read_text(encoding="utf-8"))
        for rank in range(workers)
        if (path := folder / f"{rank}.json").exists()
    ]
    faults = [GroupFault(*answer["fault"]) for answer in answers if "fault" in answer]
    results = next((answer["verdicts"] for answer in answers if answer.get("verdicts")), None)
    return [StageResult(**plain) for plain in results] if results else None, faults


@contextmanager
def _process_group(folder: Path, order: GroupOrder, rank: int) -> Iterator[None]:
    """Initialize torch.distributed among processes of one machine, with a shared file."""
    from datetime import timedelta

    import torch.distributed as dist

    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": order.workers,
        "LOCAL_WORLD_SIZE": order.workers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    backend = "nccl" if order.is_on_cuda else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=order.workers,
        timeout=timedelta(seconds=JOIN_TIMEOUT_S),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """Exit when the parent process ends: its end of this process's stdin is then closed."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Run one process of a worker group on this machine; `arguments` are FOLDER and RANK."""
    folder, rank = Path(arguments[0]), int(arguments[1])
    _end_with_parent()
    order = GroupOrder.from_json((folder / "order.json").read_text(encoding="utf-8"))
    answer: dict[str, Any]
    try:
        with _process_group(folder, order, rank):
            answer = {"verdicts": [asdict(verdict) for verdict in work(order)]}
    except GroupFault as fault:
        answer = {"fault": fault.args}
    except Exception as error:  # noqa: BLE001 - reported to the parent
        answer = {"fault": fault_of(error, order.stages[0]).args}
    part = folder / f".{rank}.json.part"
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.rename(folder / f"{rank}.json")
    return 1 if "fault" in answer else 0


if __name__ == "__main__":
    # A normal exit would wait for threads of a broken process group; the answer is written already.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
