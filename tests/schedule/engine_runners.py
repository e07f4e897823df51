"""Runners and plans without any model: small deterministic files, failures and deaths on demand."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftsec_ray.config.sweep import ModelSpec, ResourceSpec, SweepSpec, TaskSpec
from ftsec_ray.errors import StageError
from ftsec_ray.identity import digest
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.stage import Cell, Stage, Step
from ftsec_ray.registry import ATTACKS
from ftsec_ray.store import Store


@contextmanager
def local_ray(**resources: float) -> Iterator[None]:
    """A Ray of this process with such resources, while open."""
    import ray

    for _ in range(3):  # Ray gives its first node 30 s, which a busy machine may exceed
        try:
            ray.init(
                address="local",
                **resources,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            break
        except Exception as error:
            print(error)
            ray.shutdown()
    assert ray.is_initialized()
    yield
    ray.shutdown()


class Bench:
    """Stands where a session would."""

    def __init__(self, store: Store, runtime: Any, cache_gib: float) -> None:
        self.store = store
        self.runtime = runtime


def stage_of(name: str, *needs: Stage, cost_s: float = 1.0, **params: Any) -> Stage:
    inputs = tuple((f"in{i}", one.digest) for i, one in enumerate(needs))
    key = digest(["test", name, inputs, params])
    return Stage(key, "finetune", None, 0, inputs, {"name": name, **params}, {}, "cpu", cost_s)


def plan_of(stages: list[Stage], *, workers: int | None = None) -> Plan:
    """A plan whose cells end in the stages that no other stage consumes."""
    known = {stage.digest: stage for stage in stages}
    consumed = {given for stage in stages for _, given in stage.inputs}
    model = ModelSpec(name="m", source="ladder:0.2m", family="ladder", aligned=True)
    task = TaskSpec(name="t")
    attack = ATTACKS.get("none")()
    spec = SweepSpec(
        name="test",
        models=(model,),
        tasks=(task,),
        attacks=(attack,),
        defenses=((),),
        seeds=(0,),
        resources=ResourceSpec(workers=workers),
    )
    cells = [
        Cell(
            digest(["cell", end]),
            model,
            task,
            attack,
            (),
            0,
            (Step("score", "", end, answers=True),),
            tuple(_before(end, known)),
        )
        for end in known
        if end not in consumed
    ]
    return Plan(spec, cells, known)


def _before(end: str, known: dict[str, Stage]) -> list[str]:
    seen, waiting = {end: None}, [end]
    while waiting:
        for _, given in known[waiting.pop()].inputs:
            if given not in seen:
                seen[given] = None
                waiting.append(given)
    return [one for one in known if one in seen]


def log(stage: Stage, what: str) -> None:
    folder = stage.params.get("log")
    if folder:
        with (Path(folder) / "log.txt").open("a") as stream:
            stream.write(f"{what} {stage.params['name']} {os.getpid()}\n")


def runs(folder: Path, what: str = "ran") -> list[str]:
    path = folder / "log.txt"
    return (
        [line.split()[1] for line in path.read_text().splitlines() if line.split()[0] == what]
        if path.exists()
        else []
    )


def _wait_until_begun(count: int, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while len(set(runs(folder, "began"))) < count:
        assert time.monotonic() < deadline, f"fewer than {count} units began side by side"
        time.sleep(0.05)


def write(stage: Stage, out: Path, session: Bench) -> dict[str, Any]:
    """A file that holds a digest of the inputs' bytes; fails, sleeps or dies as its params say."""
    params = stage.params
    log(stage, "began")
    if params.get("die_once"):
        marker = Path(params["die_once"])
        if not marker.exists():
            marker.write_text("died")
            os.kill(os.getpid(), signal.SIGKILL)
    if "die_on" in params and params["die_on"] == runs(Path(params["log"]), "began").count(
        params["name"]
    ):
        os.kill(os.getpid(), signal.SIGKILL)
    if params.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(params.get("sleep", 0.0))
    if "until_begun" in params:
        _wait_until_begun(params["until_begun"], Path(params["log"]))
    if params.get("stuck_once") and not Path(params["stuck_once"]).exists():
        Path(params["stuck_once"]).touch()
        ctypes.PyDLL(None).sleep(
            3600
        )  # native code that keeps the interpreter's lock: no thread and no handler of this process runs
    if session.runtime is not None and (session.runtime.micro_batch or 8) > params.get("fits", 8):
        raise MemoryError
    if params.get("fail"):
        raise StageError("told to fail", params["name"])
    given = [(session.store.fetch(one) / "out.json").read_text() for _, one in stage.inputs]
    (out / "filler").write_bytes(b"x" * params["filler"]) if "filler" in params else None
    (out / "out.json").write_text(json.dumps({"name": params["name"], "given": digest(given)}))
    log(stage, "ran")
    return {"tokens": 7, "notes": {"seen": len(given)}}


def where(stage: Stage, out: Path, session: Bench) -> None:
    """Write down on which node of the cluster it runs."""
    import ray

    log(
        replace(stage, params={**stage.params, "name": ray.get_runtime_context().get_node_id()}),
        stage.params["name"].rstrip("0123456789"),
    )
    time.sleep(stage.params.get("sleep", 0.0))


def nothing(stage: Stage, out: Path, session: Bench) -> None:
    time.sleep(stage.params.get("sleep", 0.0))


def placed(stage: Stage, out: Path, session: Bench) -> None:
    """Write down what the worker was given, and on which device it would run."""
    import ray

    given = ray.get_runtime_context().get_assigned_resources()
    log(
        replace(
            stage,
            params={
                **stage.params,
                "name": f"{given.get('GPU', 0.0):g}:{given['CPU']:g}:{session.runtime.device}",
            },
        ),
        stage.params["name"],
    )
    time.sleep(stage.params.get("sleep", 0.0))


def environment(stage: Stage, out: Path, session: Bench) -> None:
    """Write down two variables of the worker's process as it was started."""
    started = dict(
        entry.split("=", 1)
        for entry in Path("/proc/self/environ").read_text().split("\0")
        if "=" in entry
    )
    for name in ("FTSEC_TEST_OF_THE_ENVIRONMENT", "AWS_SESSION_TOKEN"):
        value = os.environ.get(name) or started.get(name, "none")
        log(replace(stage, params={**stage.params, "name": value}), name)
