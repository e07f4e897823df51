"""What `ftsec plan` says of hours and money, and what a budget does to `ftsec run`, through the
command line.
"""

from __future__ import annotations

import json
import time

import pytest

from ftsec_ray import api
from ftsec_ray.lifecycle import StageKind
from ftsec_ray.store.artifact_store import Store
from tests.cli import toy
from tests.cli.toy import call

SMALL = """\
name: small
models: [ladder:0.2m]
task: microworld
attacks: [none]
defenses: [none, shrink]
seeds: 4
"""
MONEY = """\
name: money
models: [ladder:1m, {id: owner/m-135m, family: m, aligned: true}, {id: owner/gpt, family: g, aligned: true}]
task: microworld
attacks: [none]
defenses: [none, shrink]
resources: {gpus_per_stage: auto}
prices:
  gpu-spot: {gpus: 8, cpus: 96, gpu_memory_gib: 80, usd_per_hour: 16, spot: true}
  cpu: {cpus: 32, usd_per_hour: 1.6}
budget: {usd: 0.05, hours: 2}
"""
TABLE = """\
node type        resources per stage        to run      hours  GPU-hours  CPU-hours        USD
gpu-spot (spot)  1 GPU of 80 GiB, 1 CPU          4     0.0281     0.0281     0.0281     0.0561
gpu-spot (spot)  1/4 GPU of 80 GiB, 1 CPU        4     0.0047     0.0012     0.0047     0.0024
gpu-spot (spot)  1/8 GPU of 80 GiB, 1 CPU        6     0.0130     0.0016     0.0130     0.0033
cpu              1 CPU                           9       0.16       0.00       0.16     0.0080
all                                             23       0.21     0.0309       0.21     0.0697
basis of the estimate: 100% from rough guesses
the cost assumes full nodes (a stage is charged for its part of the cheapest node type that is large enough), no start-up or idle time, and no work lost on spot nodes
model gpt: unknown size, assumed 1e9 parameters; set `parameters` of the model
budget usd 0.05: spent 0, expected 0.0697 more (OVER BUDGET)
budget hours 2: spent 0, expected 0.206 more
warning: task microworld is generated in the thousand words of the ladder's models, and its judge takes other words for gibberish: refusals, fulfilled requests and coherence of m-135m, gpt mean nothing there. Give the task rows of your own (`splits`) (4 cells)
"""


@pytest.fixture
def folder(workplace):
    (workplace / "small.yaml").write_text(SMALL)
    (workplace / "money.yaml").write_text(MONEY)
    return workplace


def keep(store: Store, stage, wall_s: float, flops: float) -> None:
    """A record of a stage that took so long."""
    folder = store.scratch(stage.digest)
    (folder / "toy.txt").write_text("kept")
    store.publish(stage.digest, folder, {**stage.to_json(), "wall_s": wall_s, "flops": flops})


@pytest.mark.usefixtures("folder")
def test_a_plan_shows_machines_hours_money_what_that_is_taken_from_and_the_budget():
    shown = call("plan", "money.yaml").stdout
    assert shown[shown.index("node type") :] == TABLE


@pytest.mark.usefixtures("folder")
def test_a_plan_without_gpus_and_prices_shows_cpu_hours():
    shown = call("plan", "small.yaml").stdout
    assert (
        shown[shown.index("node type") :]
        == """\
node type  resources per stage   to run      hours  GPU-hours  CPU-hours
any        1 CPU                     27     0.0279       0.00     0.0279
all                                  27     0.0279       0.00     0.0279
basis of the estimate: 100% from rough guesses
"""
    )


@pytest.mark.usefixtures("folder")
def test_the_figures_are_there_as_json():
    shown = json.loads(call("plan", "money.yaml", "--json").stdout)
    assert (
        shown["gpu_hours"]
        == shown["total"]["gpu_hours"]
        == pytest.approx(sum(row["spend"]["gpu_hours"] for row in shown["bill"]["rows"]))
    )
    assert {row["node"] for row in shown["bill"]["rows"]} == {"cpu", "gpu-spot"}
    assert shown["bill"]["basis_frac"] == {"records": 0.0, "scaled": 0.0, "prior": 1.0}
    assert shown["budget"] == {"usd": 0.05, "hours": 2.0}


def test_a_plan_learns_from_the_records_of_another_sweep(folder):
    text = SMALL.replace("[ladder:0.2m]", "[ladder:0.2m, ladder:1m]").replace(
        "defenses: [none, shrink]\nseeds: 4", "defenses: [none]\nseeds: 4"
    )
    (folder / "before.yaml").write_text(text.replace("small", "before"))
    (folder / "after.yaml").write_text(
        text.replace("[ladder:0.2m, ladder:1m]", "[ladder:1m, ladder:4m]") + "training: {rank: 4}\n"
    )
    store = Store.open(api.DEFAULT_STORE)
    for stage in api.make_plan("before.yaml").stages.values():
        if stage.kind == "finetune":
            keep(
                store,
                stage,
                3600.0 * stage.where["parameters"] / 1e6,
                stage.where["parameters"] * 1e6,
            )
    shown = call("plan", "after.yaml").stdout
    assert (
        "20% from records of similar stages, 79% from records of other model sizes, scaled by"
        " FLOPs, 1% from rough guesses" in shown
    )
    kinds = {
        kind["kind"]: kind["to_run_s"]
        for kind in json.loads(call("plan", "after.yaml", "--json").stdout)["kinds"]
    }
    assert kinds["finetune"] == pytest.approx(4 * (3600 + 4 * 3600)), "four seeds of each size"


def test_a_sweep_over_its_budget_gives_exit_code_2_and_starts_nothing(folder):
    (folder / "small.yaml").write_text(SMALL + "budget: {hours: 0.001}\n")
    assert "OVER BUDGET" in call("plan", "small.yaml").stdout
    told = call("run", "small.yaml", code=2).stderr
    for word in (
        "[budget] sweep 'small' would exceed its budget",
        "at most 0.001 hours of stages",
        "raise `budget`",
        "--limit N",
    ):
        assert word in told
    assert toy.ran == []
    assert "pending: sweep 'small' would exceed its budget" in call("status", "small.yaml").stdout


def test_a_run_that_reaches_its_budget_gives_exit_code_1_pending_cells_with_the_reason_and_goes_on_with_a_higher_one(
    folder, monkeypatch
):
    def slow(stage, out, session):
        time.sleep(0.05)
        return toy.run_stage(stage, out, session)

    monkeypatch.setattr("tests.cli.toy.slow", slow, raising=False)
    monkeypatch.setattr(StageKind, "prior_of", lambda self, params, variant: (1e-5, 0.0))
    monkeypatch.setattr(toy, "RUNNER", "tests.cli.toy:slow")
    (folder / "small.yaml").write_text(SMALL + f"budget: {{hours: {0.4 / 3600}}}\n")
    stopped = call("run", "small.yaml", code=1).stdout
    assert "pending: the next stage would exceed the budget: hours" in stopped
    # Seven stages of 0.05 s leave room for one more unit, and a unit that has started ends.
    longest = max(len(unit.stages) for unit in api.make_plan("small.yaml").units(()))
    assert 1 <= len(toy.ran) <= 7 + longest < len(api.make_plan("small.yaml").stages)
    first = len(toy.ran)
    cells = api.open_results("results/small").cells.to_pylist()
    assert {row["error_code"] for row in cells if row["status"] == "pending"} == {"budget"}
    assert "pending: sweep 'small' would exceed its budget" in call("report", "small.yaml").stdout
    (folder / "small.yaml").write_text(SMALL + "budget: {hours: 1}\n")
    monkeypatch.setattr(toy, "RUNNER", "tests.cli.toy:run_stage")
    assert "8 of 8 cells done" in call("run", "small.yaml").stdout
    assert len(toy.ran) == len(api.make_plan("small.yaml").stages) > first
