"""Sweeps with a search, from the file to the tables: rounds, resumption after a kill, both
executors, the archive.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ftsec_ray
from ftsec_ray import api
from ftsec_ray.cli.run_sweep import exit_code
from ftsec_ray.identity import unit_interval
from ftsec_ray.plan.cost_estimate import BudgetError
from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.report.page import render
from ftsec_ray.report.search_section import searches_markdown
from ftsec_ray.results.read import Results
from ftsec_ray.schedule import execution as schedule_run
from ftsec_ray.store import Store
from tests.cli.toy import call
from tests.results.toy import made_older
from tests.search_toy import PROMPTS, chances, run, sweep, toy_stages


def tables(folder: Path) -> dict[str, str]:
    """Checksums of the tables that do not hold times."""
    return {
        name: (
            hashlib.sha256((folder / "results" / name / "part-0.parquet").read_bytes()).hexdigest()
        )
        for name in ("cells", "metrics", "generations", "comparisons", "searches")
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return folder, run(sweep(), folder)


def expected(shots: int, rate: float, seed: int, half: str) -> tuple[float, float]:
    """Success and loss of clean accuracy on one half, from the rule of the toy world alone."""

    def share(probe: str, chance: float) -> float:
        ids = [
            n
            for n in range(PROMPTS)
            if (unit_interval("search", f"{probe}-{n}") < 0.5) == (half == "choose")
        ]
        return sum(unit_interval("toy", probe, n, seed) < chance for n in ids) / len(ids)

    harm, right = chances(shots, rate)
    return share("harmful", harm), share("clean", chances(0, 1e-4)[1]) - share("clean", right)


def test_the_row_of_a_search_holds_the_strongest_trial_within_the_bound_and_both_halves_of_both_attackers(
    done,
):
    _, outcome = done
    results = outcome.results
    assert outcome.report.is_complete
    rows = results.searches.to_pylist()
    assert sorted(row["defenses"] for row in rows) == [[], ["shrink"]]
    trials = [
        row
        for row in results.table("cells", trials=True).to_pylist()
        if row["search_trial"] is not None
    ]
    for row in rows:
        mine = sorted(
            (one for one in trials if one["search"] == row["search"]),
            key=lambda one: one["search_trial"],
        )
        assert [one["search_trial"] for one in mine] == list(range(10))
        told = [json.loads(one["attack_params"]) for one in mine]
        found = [
            expected(one["shots"], one["training"]["learning_rate"], 0, "choose") for one in told
        ]
        within = [
            (value, -loss, -place)
            for place, (value, loss) in enumerate(found)
            if loss <= 0.2 + 1e-9
        ]
        assert len(within) < 10, "a bound that bites, or nothing is tested here"
        assert (row["status"], row["trial"], row["n_within"], row["n_done"]) == (
            "chosen",
            -max(within)[2],
            len(within),
            10,
        )
        best = told[row["trial"]]
        assert json.loads(row["training"]) == best["training"]
        assert json.loads(row["params"]) == {"shots": best["shots"], "poison_rate": None}
        for prefix, shots, rate in (
            ("", best["shots"], best["training"]["learning_rate"]),
            ("fixed_", 3, 1e-4),
        ):
            value, loss = expected(shots, rate, 0, "choose")
            both = [expected(shots, rate, seed, "report") for seed in (0, 1)]
            assert row[f"{prefix}choose_value"] == pytest.approx(value)
            assert row[f"{prefix}choose_utility_loss"] == pytest.approx(loss)
            assert row[f"{prefix}report_value"] == pytest.approx(sum(one for one, _ in both) / 2)
            assert row[f"{prefix}report_utility_loss"] == pytest.approx(
                sum(one for _, one in both) / 2
            )
            assert row[f"{prefix}n_seeds"] == 2
            assert (
                row[f"{prefix}report_low"]
                <= row[f"{prefix}report_value"]
                <= row[f"{prefix}report_high"]
            )


def test_trials_are_rows_of_the_tables_and_of_nothing_that_is_shown(done):
    folder, outcome = done
    results = outcome.results
    whole = results.table("cells", trials=True)
    assert whole.num_rows == len(outcome.plan.cells) == 2 * (2 + 2 + 10 + 2)
    assert results.cells.num_rows == 12
    for name in ("metrics", "generations"):
        assert set(results.table(name)["cell"].to_pylist()) == set(
            results.cells["cell"].to_pylist()
        )
        assert set(results.table(name, trials=True)["cell"].to_pylist()) == set(
            whole["cell"].to_pylist()
        )
    assert results.wide().num_rows == 12
    assert set(results.comparisons["attack"].to_pylist()) == {
        "none",
        "harmful_tuning",
        "searched harmful_tuning",
    }
    grid = build_grid(results)
    assert sorted(attack.label for attack in grid.attacks) == [
        "harmful_tuning",
        "none",
        "searched harmful_tuning",
    ]
    assert {attack.success for attack in grid.real_attacks} == {"harmful_rate"}
    assert all(len(point.seeds) == 2 for point in grid.points.values())
    assert results.aggregated.num_rows == 2 * 5 + 4 * 6
    chosen = {row["cell"]: row for row in results.cells.to_pylist() if row["search"] is not None}
    assert len(chosen) == 4
    prompts = {row["prompt_id"] for row in results.generations.to_pylist() if row["cell"] in chosen}
    assert prompts
    assert all(unit_interval("search", one) >= 0.5 for one in prompts), (
        "of a chosen setting nothing is told on the prompts that chose it"
    )
    by_search = {row["search"]: row for row in results.searches.to_pylist()}
    for search, row in by_search.items():
        mine = {cell for cell, one in chosen.items() if one["search"] == search}
        rates = [
            one
            for one in results.metrics.to_pylist()
            if one["metric"] == "harmful_rate" and one["cell"] in mine
        ]
        assert sum(one["value"] for one in rates) / 2 == pytest.approx(row["report_value"])
        assert {one["n"] for one in rates} == {row["report_n"]}
    tested = [
        row
        for row in results.comparisons.to_pylist()
        if row["attack"].startswith("searched") and row["metric"] == "harmful_rate"
    ]
    assert tested
    assert all(row["q"] is not None for row in tested), "paired on the prompts that both have"
    assert grid_markdown(results).count("searched harmful_tuning") == 1
    assert json.loads((folder / "results" / "run.json").read_text())["rows"]["searches"] == 2


def test_the_report_shows_fixed_and_searched_side_by_side(done):
    _, outcome = done
    page, text = render(outcome.results), searches_markdown(outcome.results)
    assert 'id="searched"' in page
    assert "<code>searches</code>" in page  # among the tables that the folder holds
    for row in outcome.results.searches.to_pylist():
        assert (
            f"{row['report_value']:.2f} ({row['report_low']:.2f}–{row['report_high']:.2f})" in page
        )
        assert f"{row['fixed_report_value']:.2f} (" in text
        assert f"(trial {row['trial']})" in text
    plain = run(sweep(attacks=["none"]), outcome.results.folder / "plain").results
    assert searches_markdown(plain) == ""
    assert 'id="searched"' not in render(plain)


def test_planning_again_over_a_full_store_walks_the_same_rounds_and_runs_nothing(done):
    folder, outcome = done
    again = api.make_plan(sweep(), folder / "store")
    assert again.digest == outcome.plan.digest
    assert again.needed(Store.open(folder / "store").done()) == []
    assert all(not one.is_open and one.left == 0 for one in again.searches)
    assert exit_code(outcome.results, again) == 0
    assert run(sweep(), folder).report is None


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_killed_between_rounds_goes_on_with_the_same_trials(done, tmp_path, rounds):
    folder, outcome = done
    killed = subprocess.run(
        [sys.executable, "-m", "tests.search_toy", str(tmp_path), str(rounds)],
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    held = Store.open(tmp_path / "store").done()
    half = api.make_plan(sweep(), tmp_path / "store")
    assert all(
        one.is_open and len(one.trials) == min(10, 3 * (rounds + 1)) for one in half.searches
    )
    rest = run(sweep(), tmp_path)
    assert rest.plan.digest == outcome.plan.digest
    assert not held & set(rest.report.done), "what was measured is not measured again"
    assert held < Store.open(tmp_path / "store").done()
    assert tables(tmp_path) == tables(folder)


@pytest.mark.ray
def test_both_executors_propose_the_same_trials_and_leave_equal_tables(done, tmp_path):
    from tests.schedule.engine_runners import local_ray

    folder, _ = done
    with local_ray(num_cpus=2):
        assert run(sweep(), tmp_path, executor="tune", workers=2).report.is_complete
    assert tables(tmp_path) == tables(folder)


def test_a_trial_that_fails_is_told_as_failed_and_stops_neither_the_search_nor_the_grid(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TOY_FAILS", "16")
    outcome = run(sweep(), tmp_path)
    failed = [
        trial for one in outcome.plan.searches for trial in one.trials if trial.status == "failed"
    ]
    assert failed
    assert {trial.values["shots"] for trial in failed} == {16}
    rows = outcome.results.searches.to_pylist()
    assert [row["status"] for row in rows] == ["chosen"] * 2
    assert sum(row["n_failed"] for row in rows) == len(failed)
    assert all(row["n_done"] + row["n_failed"] == 10 for row in rows)
    assert exit_code(outcome.results, outcome.plan) == 0
    tunes = [
        digest for digest in outcome.report.failed if outcome.plan.stages[digest].kind == "finetune"
    ]
    assert all(outcome.report.attempts.get(digest, 1) == 1 for digest in tunes), (
        "once in a run, not once in every round"
    )
    assert f", {rows[0]['n_failed']} failed |" in searches_markdown(outcome.results)


def test_of_each_attacker_the_seeds_that_were_measured_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FAILS", "16")
    monkeypatch.setenv(
        "TOY_FAILS_SEED", "1"
    )  # trials run in seed 0, so that the last cell alone of a chosen setting fails
    results = run(sweep({"trials": 4, "ranges": {"shots": [8, 16]}}), tmp_path / "two").results
    rows = results.searches.to_pylist()
    assert [(row["n_planned"], row["fixed_n_seeds"], row["n_seeds"]) for row in rows] == [
        (2, 2, 1)
    ] * 2
    assert (
        searches_markdown(results).count("| 2 seeds; 1 seed |")
        == render(results).count("<td>2 seeds; 1 seed</td>")
        == 2
    )
    monkeypatch.delenv("TOY_FAILS")
    results = run(sweep({"trials": 2}, seeds=1), tmp_path / "one").results
    assert (
        searches_markdown(results).count("| 1 seed; 1 seed |")
        == render(results).count("<td>1 seed; 1 seed</td>")
        == 2
    )


def test_a_bound_that_no_trial_meets_is_a_result(tmp_path):
    ranges = {"training.learning_rate": {"low": 3.0e-3, "high": 5.0e-3}}
    outcome = run(sweep({"trials": 3, "max_utility_loss": 0.0, "ranges": ranges}), tmp_path)
    rows = outcome.results.searches.to_pylist()
    assert [
        (row["status"], row["trial"], row["report_value"], row["n_within"]) for row in rows
    ] == [("no trial within the bound", None, None, 0)] * 2
    assert all("the smallest loss of a trial is 0." in row["note"] for row in rows)
    assert all(row["fixed_report_value"] is not None for row in rows)
    assert "no trial within the bound" in render(outcome.results)
    assert searches_markdown(outcome.results).count("| 2 seeds; – |") == 2
    assert "searched harmful_tuning" not in outcome.results.cells["attack"].to_pylist()
    assert exit_code(outcome.results, outcome.plan) == 0


def test_results_collected_before_a_search_had_ended_are_collected_again(tmp_path):
    given = sweep(
        {
            "trials": 3,
            "max_utility_loss": 0.0,
            "ranges": {"training.learning_rate": {"low": 3.0e-3, "high": 5.0e-3}},
        }
    )
    plan = api.make_plan(given)
    api.collect_plan(plan, Store.open(tmp_path / "store"), None, tmp_path / "results")
    with toy_stages():
        schedule_run.execute(plan, Store.open(tmp_path / "store"), executor="local")
    api.collect_plan(
        plan, Store.open(tmp_path / "store"), None, tmp_path / "results"
    )  # of the plan as it was before the run
    assert [
        row["status"] for row in api.open_results(tmp_path / "results").searches.to_pylist()
    ] == ["open"] * 2
    outcome = run(given, tmp_path)
    assert outcome.report is None
    assert [row["status"] for row in outcome.results.searches.to_pylist()] == [
        "no trial within the bound"
    ] * 2


def test_a_metric_that_is_never_judged_is_a_result_too(tmp_path):
    rows = run(
        sweep({"trials": 2, "metric": "asr_transfer"}), tmp_path
    ).results.searches.to_pylist()
    assert [(row["status"], row["fixed_report_value"]) for row in rows] == [
        ("nothing measured", None)
    ] * 2


def test_a_limit_leaves_the_search_open_and_says_so(tmp_path):
    outcome = run(sweep(), tmp_path, limit=8)
    assert [row["status"] for row in outcome.results.searches.to_pylist()] == ["open"] * 2
    assert exit_code(outcome.results, outcome.plan) == 1
    assert exit_code(outcome.results, api.limited(outcome.plan, 8)) == 0


def test_a_budget_that_ends_a_run_between_rounds_leaves_the_search_open_with_the_reason(
    tmp_path, monkeypatch
):
    store = Store.open(tmp_path / "store")
    calls = []
    with toy_stages():
        real = schedule_run.execute

        def execute(*args, **rest):
            calls.append(args)
            if len(calls) == 2:
                raise BudgetError("1 hour is left and 2 are needed", 2, "1")
            return real(*args, **rest)

        monkeypatch.setattr(schedule_run, "execute", execute)
        outcome = api.run_plan(
            api.make_plan(sweep(), store), store, tmp_path / "results", executor="local"
        )
        monkeypatch.undo()
    assert len(calls) == 2
    trials = [
        row
        for row in outcome.results.table("cells", trials=True).to_pylist()
        if row["search_trial"] is not None
    ]
    assert {(row["search_trial"] // 3, row["status"], row["error_code"]) for row in trials} == {
        (0, "done", None),
        (1, "pending", "budget"),
    }
    assert [row["status"] for row in outcome.results.searches.to_pylist()] == ["open"] * 2
    assert exit_code(outcome.results, outcome.plan) == 1


def test_results_of_the_schema_before_searches_open_without_any(tmp_path):
    new = run(sweep(attacks=["none", "harmful_tuning"]), tmp_path).results
    # what schema 3 brought: how many answers could not be judged
    rates = [{**row, "n_null": None} for row in new.aggregated.to_pylist()]
    opened = Results.open(made_older(new.folder, "2"))
    assert (opened.cells.num_rows, opened.searches.num_rows) == (8, 0)
    assert opened.cells["search_trial"].null_count == 8
    assert opened.aggregated.to_pylist() == rates
    assert searches_markdown(opened) == ""
    page = render(opened)
    assert "</html>" in page
    assert "<code>searches</code>" not in page  # among the tables that the folder holds


def test_from_the_command_line_a_searched_sweep_is_planned_run_packed_and_verified(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("hunt.yaml").write_text(json.dumps(sweep({"trials": 5})))
    assert (
        "searches: 2, 6 trials planned; up to 4 more will be proposed"
        in call("plan", "hunt.yaml").stdout
    )
    assert not Path(".ftsec").exists()
    assert "maximises harmful_rate" in call("show", "harmful_tuning").stdout
    assert "Search:" not in call("show", "onion").stdout + call("show", "none").stdout
    with toy_stages():
        said = call("run", "hunt.yaml", "--executor", "local")
        assert "searches: 2 chosen" in said.stdout
        assert "nothing to run" in call("run", "hunt.yaml", "--executor", "local").stderr
    assert "searches: 2, 10 trials planned\n" in call("plan", "hunt.yaml").stdout
    assert "chosen setting" in call("report", "hunt.yaml", "--markdown").stdout
    call("export", "hunt.yaml", "--out", "hunt.zip")
    monkeypatch.chdir(Path("/"))
    assert (
        "no differences in what was checked" in call("verify", str(tmp_path / "hunt.zip")).stdout
    ), "without the store"
    assert ftsec_ray.verify(tmp_path / "hunt.zip").is_equal


def test_a_sweep_without_a_search_never_loads_optuna():
    code = (
        "import sys, ftsec_ray, ftsec_ray.cli.run_sweep, ftsec_ray.results.collect\n"
        f"ftsec_ray.make_plan({sweep(attacks=['none', 'badnets'])!r}); ftsec_ray.sweep_schema()\n"
        "print('optuna' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=environment,
        ).stdout
        == "False\n"
    )
