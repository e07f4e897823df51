"""Runners that write down with which numerics a stage runs, and a program that runs them under an
executor: `python -m tests.schedule.numerics_runners CASE FOLDER`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftsec_ray import numerics
from ftsec_ray.execute import blocks
from ftsec_ray.execute.stage_job import run_stage
from ftsec_ray.plan.stage import Stage

HERE = "tests.schedule.numerics_runners"


def tell(folder: str, who: str) -> None:
    """Leave what is in force in this process, with torch and numpy loaded, in a file of its own."""
    import numpy  # noqa: F401, ICN001
    import torch

    torch.ones(64, 64) @ torch.ones(64, 64)
    told = {"who": who, "pid": os.getpid(), **numerics.in_force().to_json()}
    (Path(folder) / f"{who}-{os.getpid()}.json").write_text(json.dumps(told))


def write(stage: Stage, out: Path, session: Any) -> None:
    """One process alone, or each of a worker group."""
    who = "alone"
    if session.runtime.worker_group is not None:
        import torch.distributed as dist

        who = f"rank{dist.get_rank()}"
    tell(stage.params["log"], who)
    (out / "out.json").write_text(who)


class TellingWorker(blocks._Worker):
    """A worker of a pipeline that says with what it computes once it has worked."""

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[Any]:
        yield from super().__call__(rows)
        tell(self._spec.stage.params["log"], "block")


def telling_survey(spec: blocks.CrafterSpec) -> blocks.Survey:
    """The survey, which says with what it computed."""
    found = blocks._opened(spec).survey()
    tell(spec.stage.params["log"], "survey")
    return found


def craft(stage: Stage, out: Path, session: Any) -> Any:
    """A stage whose blocks Ray Data crafts."""
    blocks._Worker, blocks._survey_task = TellingWorker, telling_survey
    return run_stage(stage, out, session)


def main(case: str, folder: str) -> None:
    """Run the stage of a case."""
    from ftsec_ray.config.sweep import DataSpec
    from ftsec_ray.schedule.execution import execute
    from tests.schedule.engine_runners import local_ray, plan_of, stage_of
    from tests.schedule.group_runners import group_stage

    session = "tests.schedule.engine_runners:Bench"
    runner = f"{HERE}:write"
    given = {"log": folder, "numerics": "portable"}
    if case.endswith("-late"):
        import torch

        torch.ones(64, 64) @ torch.ones(64, 64)
    if case == "tune-data":
        from ftsec_ray.attacks.badnets import BadNets
        from tests.execute.crafting import GIVEN, craft_stage, filled, many_rows

        store = filled(Path(folder) / "store", many_rows(600))
        stage = craft_stage(BadNets(rate=0.9, repeat=20), resource="data:2")
        stages = [*GIVEN, replace(stage, params={**stage.params, **given})]
        runner, session = f"{HERE}:craft", "ftsec_ray.execute.session:Session"
    else:
        from ftsec_ray.store import Store

        store = Store.open(Path(folder) / "store")
        stages = [(group_stage if "group" in case else stage_of)("stage", **given)]
    plan = plan_of(stages)
    plan = replace(plan, spec=replace(plan.spec, data=DataSpec(ray_above=0, workers=2)))
    executor = "tune" if case.startswith("tune") else "local"
    with local_ray(num_cpus=2) if executor == "tune" and case != "tune" else nullcontext():
        report = execute(plan, store, executor=executor, runner=runner, session=session, workers=2)
    failed = {digest: verdict.error for digest, verdict in report.failed.items()}
    record = store.record(stages[-1].digest) if report.is_complete else {}
    told = {"pid": os.getpid(), "failed": failed, "record": record.get("numerics")}
    (Path(folder) / "driver.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
