"""Every attack and every defense of the catalogue through the engine: in this process, and in a
worker process that is killed within a stage of the method; both leave the same bytes.
"""

from __future__ import annotations

import shutil

import pytest

from ftsec_ray import api
from ftsec_ray.lifecycle import hooks_of, kinds
from ftsec_ray.registry import ATTACKS
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.execute.killing import RUNNER, STEPS, markers
from tests.test_end_to_end import filled, sweep
from tests.test_methods import IDS, METHODS, quick

ORDER = ("finetune", "prepare", "revise", "craft", "inspect", "generate")
"""Where a method that acts in several stages is killed: in one that trains, if there is one."""
RESOURCES = {"timeout_s": 600.0, "checkpoint_every_s": 1e-6}
"""Stages run in a worker process, and a fine-tune leaves a checkpoint after every step."""


def sweep_of(world, registry, name):
    """One cell with a method, on a task of a kind that the method works with."""
    method = "none" if name == "none" else {name: dict(quick(registry, name))}
    given = sweep(
        world,
        attacks=[method if registry is ATTACKS else "none"],
        defenses=["none" if registry is ATTACKS else method],
        training={"epochs": 1, "batch_size": 8, "rank": 2},
        evaluation={"prompts": 4, "max_new_tokens": 4},
    )
    given["task"]["splits"]["train"]["language"] = "language"
    given["task"]["splits"]["test"]["language"] = "language"
    given["task"]["splits"]["trusted"] = {
        **given["task"]["splits"]["train"], "path": str(world / "trusted.jsonl"),
    }  # fmt: skip
    kinds_of_task = registry.get(name).TASKS
    return {**given, "task": {"kind": min(kinds_of_task)}} if kinds_of_task else given


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model and rows, and a store with all stages of the cell without methods."""
    world = filled(tmp_path_factory.mktemp("world"), more=("trusted",))
    assert run(sweep_of(world, ATTACKS, "none"), world / "store")
    return world


def run(given, store, **how):
    report = execute(api.make_plan(given), Store.open(store), executor="local", **how)
    assert report.is_complete, [verdict.error for verdict in report.failed.values()]
    return report


def artifact(store, stage):
    """Bytes of the files of an artifact but its record, by name."""
    folder = Store.open(store).fetch(stage.digest)
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "record.json"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("registry", "name"),
    [one for one in METHODS if one[1] != "none"],
    ids=[one for one in IDS if not one.endswith(":none")],
)
def test_a_method_killed_in_a_worker_process_leaves_the_bytes_of_this_process(
    registry, name, base, tmp_path
):
    given = sweep_of(base, registry, name)
    plan = api.make_plan(given)
    own = [stage for stage in plan.stages.values() if stage.method == name]
    own.sort(key=lambda stage: ORDER.index(stage.kind))
    hooks = set(hooks_of(registry.get(name)))
    assert (
        {kind for kind, one in kinds().items() if hooks & set(one.hooks)}
        >= {stage.kind for stage in own}
        > set()
    )
    here, there = tmp_path / "here/store", tmp_path / "there/store"
    for store in (here, there):
        shutil.copytree(base / "store", store)
    run(given, here)
    order = markers(there) / own[0].digest
    order.parent.mkdir()
    order.touch()
    run({**given, "resources": RESOURCES}, there, runner=RUNNER)
    assert not order.exists(), "it was killed"
    record = Store.open(there).record(own[0].digest)
    assert record["attempt"] == 2
    is_long = own[0].kind == "finetune" and len(record["notes"]["losses"]) > STEPS
    if is_long or order.with_suffix(".training").exists():
        killed = int(order.with_suffix(".training").read_text())
        resumed = [int(one) for one in order.with_suffix(".resumed").read_text().split()]
        assert killed in resumed
        if own[0].kind == "finetune":
            assert resumed[0] == killed == STEPS, "it goes on from the checkpoint"
        else:
            # a phase of training that had ended is made again: its last step leaves no checkpoint
            assert resumed.count(0) <= 1, "the phase that was killed goes on from its checkpoint"
    for stage in own:
        assert artifact(here, stage) == artifact(there, stage)
