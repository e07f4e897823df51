"""The survey's grid: it plans without a network, pins everything it loads, and holds every defense
of the catalogue.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ftsec_ray import api
from ftsec_ray.data.tasks import TASKS
from ftsec_ray.registry import ATTACKS, DEFENSES

SWEEP = Path(__file__).parents[2] / "sweeps" / "paper_1b_4b.yaml"
COMMIT = re.compile(r"[0-9a-f]{40}")


@pytest.fixture(scope="module")
def plan():
    return api.make_plan(SWEEP)


def test_it_plans_without_a_network(tmp_path):
    """A process whose every connection fails, with an empty cache."""
    program = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError(f'a connection to {args}')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from ftsec_ray.cli import main\n"
        "sys.argv = ['ftsec', 'plan', sys.argv[1], '--store', sys.argv[2], '--json']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(SWEEP), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpu_hours"] > 0


def test_every_method_of_the_catalogue_stands_in_a_shipped_sweep():
    sweeps = [yaml.safe_load(file.read_text()) for file in SWEEP.parent.glob("*.yaml")]
    for axis, registry in (("attacks", ATTACKS), ("defenses", DEFENSES)):
        entries = [entry for sweep in sweeps for entry in sweep[axis]]
        members = [
            one for entry in entries for one in (entry if isinstance(entry, list) else [entry])
        ]
        named = {one if isinstance(one, str) else next(iter(one)) for one in members}
        assert set(registry.names()) - named == set(), f"add the new method to {axis} of sweeps/"


def test_both_families_are_there_from_1b_to_4b_base_and_instruct(plan):
    models = plan.spec.models
    assert {model.family.split("-")[0].rstrip("0123456789.") for model in models} == {
        "llama",
        "qwen",
    }
    sizes = {}
    for model in models:
        sizes.setdefault((model.family, model.aligned), set()).add(
            re.search(r"-(\d(?:\.\d)?)b", model.name)[1]
        )
    assert {family for family, is_aligned in sizes} == {"llama-3.2", "qwen2.5", "qwen3"}
    for family in ("llama-3.2", "qwen2.5", "qwen3"):
        assert sizes[family, True] == sizes[family, False], family
    every = {float(size) for found in sizes.values() for size in found}
    assert (min(every), max(every)) == (1.0, 4.0)


def test_the_tasks_are_those_of_the_survey(plan):
    assert {task.kind for task in plan.spec.tasks} == {"sst2", "ag_news", "alpaca", "agent"}


def test_every_model_and_every_data_set_is_pinned_to_a_commit(plan):
    for model in plan.spec.models:
        assert COMMIT.fullmatch(model.revision or ""), model.name
        assert model.unaligned is None or COMMIT.fullmatch(model.unaligned.partition("@")[2]), (
            model.name
        )
    given = [source for task in plan.spec.tasks for _, source in task.splits]
    default = [
        source
        for task in plan.spec.tasks
        if not task.splits
        for source in TASKS[task.kind].sources.values()
    ]
    assert given
    assert default
    assert [
        source for source in given + default if not COMMIT.fullmatch(source.revision or "")
    ] == []


def test_a_twin_is_the_base_model_of_the_same_grid_and_is_loaded_once(plan):
    base = {f"{model.source}@{model.revision}" for model in plan.spec.models if not model.aligned}
    assert {model.unaligned for model in plan.spec.models if model.aligned} == base
    assert sum(stage.kind == "source" for stage in plan.stages.values()) == len(plan.spec.models)


def test_the_agent_task_measures_safety_on_the_rows_of_the_other_tasks(plan):
    agent = dict(next(task.splits for task in plan.spec.tasks if task.kind == "agent"))
    own = ("train", "test", "trusted")
    assert {name: agent[name] for name in TASKS["alpaca"].sources if name not in own} == {
        name: source for name, source in TASKS["alpaca"].sources.items() if name not in own
    }
    assert agent["train"].rows <= agent["test"].skip
    assert agent["test"].skip + agent["test"].rows <= agent["trusted"].skip
