"""The command line: what it prints, and the exit code that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftsec_ray import api
from ftsec_ray.cli.app import app
from ftsec_ray.errors import StoreError
from ftsec_ray.registry import ATTACKS, DEFENSES
from ftsec_ray.results.write import TABLES, table_schema
from ftsec_ray.schema import METRICS, SCHEMA_VERSION
from ftsec_ray.store.artifact_store import Store
from tests.cli import toy
from tests.cli.toy import call
from tests.results.toy import made_older

SWEEP = """\
name: small
models: [ladder:0.2m, ladder:1m]
task: microworld
attacks: [none, {badnets: {rate: {grid: [0.1, 0.3]}}}]
defenses: [none, shrink]
seeds: 2
"""
CELLS = 2 * 3 * 2 * 2


@pytest.fixture
def folder(workplace):
    (workplace / "small.yaml").write_text(SWEEP)
    return workplace


def python(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=cwd or root,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_a_run_leaves_tables_and_report_and_a_second_run_does_nothing(folder):
    first = call("run", "small.yaml", "--executor", "local")
    assert f"{CELLS} of {CELLS} cells done" in first.stdout
    assert (folder / "results/small/report.html").is_file()
    assert toy.ran.count("score") == CELLS
    stamp = (folder / "results/small/run.json").stat().st_mtime_ns
    toy.ran.clear()
    second = call("run", "small.yaml")
    assert "nothing to run" in second.stderr
    assert toy.ran == []
    assert (folder / "results/small/run.json").stat().st_mtime_ns == stamp


def test_the_tables_are_made_again_when_the_sweep_grew_or_the_page_is_gone(folder):
    call("run", "small.yaml")
    (folder / "small.yaml").write_text(SWEEP.replace("seeds: 2", "seeds: 3"))
    assert "36 of 36 cells done" in call("run", "small.yaml").stdout
    (folder / "small.yaml").write_text(SWEEP)
    toy.ran.clear()
    assert "24 of 24 cells done" in call("run", "small.yaml").stdout
    assert toy.ran == []
    (folder / "results/small/report.html").unlink()
    call("run", "small.yaml")
    assert (folder / "results/small/report.html").is_file()


def test_failed_cells_give_exit_code_1_and_the_next_run_tries_them_again(folder):
    with toy.failing_methods("shrink"):
        result = call("run", "small.yaml", code=1)
    assert "12 of 24 cells done, 12 failed" in result.stdout
    assert "failed: revise shrink" in result.stderr
    assert "made to fail" in result.stdout
    told = json.loads(call("status", "small.yaml", "--json").stdout)
    assert told["counts"] == {"done": 12, "failed": 12}
    assert "made to fail" in next(
        cell["error"] for cell in told["cells"] if cell["status"] == "failed"
    )
    assert "12 of 24 cells done, 12 failed" in call("status", "small.yaml").stdout
    assert "24 of 24 cells done" in call("run", "small.yaml").stdout


def test_a_limit_runs_the_first_cells_and_the_others_stay_pending(folder):
    result = call("run", "small.yaml", "--limit", "3")
    assert "3 of 24 cells done, 21 pending" in result.stdout
    assert toy.ran.count("score") == 3
    assert "3 of 24 cells done, 0 failed, 21 pending" in call("status", "small.yaml").stdout
    call("run", "small.yaml", "--limit", "0", code=2)


def test_a_report_is_written_from_what_there_is(folder):
    assert "0 of 24 cells done, 24 pending" in call("report", "small.yaml").stdout
    assert (folder / "results/small/report.html").is_file()


def test_a_report_names_its_correction_and_takes_no_other(folder):
    call("run", "small.yaml")
    assert api.open_results("results/small").meta["correction"] == "bh"
    call("report", "small.yaml", "--correction", "holm")
    assert api.open_results("results/small").meta["correction"] == "holm"
    assert "Holm" in (folder / "results/small/report.html").read_text(encoding="utf-8")
    assert "bonferroni" in call("report", "small.yaml", "--correction", "bonferroni", code=2).stderr


def test_tables_of_an_earlier_schema_are_collected_again(folder):
    call("run", "small.yaml")
    path = folder / "results/small/run.json"
    made_older(path.parent, "1")
    assert api.open_results("results/small").comparisons.num_rows
    toy.ran.clear()
    call("run", "small.yaml")
    assert toy.ran == []
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == SCHEMA_VERSION


def test_store_and_results_go_where_the_options_say(folder):
    call("run", "small.yaml", "--store", "a/b", "--results", "c")
    assert len(Store.open("a/b").done()) > CELLS
    assert (folder / "c/small/run.json").is_file()
    assert not (folder / ".ftsec").exists()
    assert not (folder / "results").exists()


def test_a_wrong_sweep_file_gives_every_fault_and_exit_code_2(folder):
    (folder / "bad.yaml").write_text(
        SWEEP.replace("badnets", "badnet") + "seed: 3\ntraining: {rank: 0}\n"
    )
    for verb in ("run", "plan", "status", "report"):
        result = call(verb, "bad.yaml", code=2)
        assert "3 error(s)" in result.stderr
        assert "did you mean 'badnets'?" in result.stderr
        assert "training.rank" in result.stderr
        assert "Traceback" not in result.output
    assert not (folder / "results").exists()


def test_a_missing_sweep_file_gives_exit_code_2(folder):
    assert "did you mean 'small.yaml'?" in call("run", "smal.yaml", code=2).stderr


def test_a_machine_without_the_gpu_that_a_sweep_asks_for_gives_exit_code_3(folder):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (folder / "small.yaml").write_text(SWEEP + "resources: {gpus_per_stage: 1}\n")
    assert "gpus_per_stage" in call("run", "small.yaml", code=3).stderr


@pytest.mark.timeout(60)
def test_a_cluster_that_does_not_answer_gives_exit_code_3_within_seconds(folder):
    assert (
        "no Ray cluster answers"
        in call("run", "small.yaml", "--address", "127.0.0.1:1", code=3).stderr
    )


@pytest.mark.timeout(60)
def test_a_dead_cluster_in_the_environment_is_named_as_such_and_does_not_stop_the_local_executor(
    folder, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "RAY_ADDRESS: no Ray cluster answers" in call("run", "small.yaml", code=3).stderr
    assert toy.ran == []
    call("run", "small.yaml", "--executor", "local")
    assert toy.ran


@pytest.mark.parametrize("option", ["--store", "--results"])
def test_a_folder_that_cannot_be_written_gives_exit_code_3_before_anything_runs(folder, option):
    (folder / "file").write_text("no folder")
    told = call("run", "small.yaml", option, "file/x", code=3).stderr
    assert f"another one with {option}" in told
    assert "file/x" in told
    assert toy.ran == []
    if option == "--results":
        assert "file/x" in call("report", "small.yaml", option, "file/x", code=3).stderr


def test_another_sweep_of_the_same_name_is_told_before_its_results_are_replaced(folder):
    assert "another plan" not in call("run", "small.yaml").stderr
    for verb in ("run", "plan"):
        assert "another plan" not in call(verb, "small.yaml").stderr
    before = api.make_plan("small.yaml").digest[:8]
    (folder / "other.yaml").write_text(SWEEP.replace("seeds: 2", "seeds: 1"))
    after = api.make_plan("other.yaml").digest[:8]
    for verb in ("plan", "run"):
        (line,) = [
            line for line in call(verb, "other.yaml").stderr.splitlines() if "another plan" in line
        ]
        assert line.startswith("warning: results/small holds")
        assert f"({before}, 24 cells)" in line
        assert f"({after}, 12 cells)" in line
    assert "tables: results/small\n" in call("run", "other.yaml").stdout
    assert (
        "tables: results/small (replaced those of another plan)" in call("run", "small.yaml").stdout
    )
    assert "another plan" not in call("run", "other.yaml", "--results", "elsewhere").stderr
    assert "another plan" in call("plan", "small.yaml", "--results", "elsewhere").stderr
    json.loads(call("plan", "small.yaml", "--json").stdout)


@pytest.mark.parametrize("rubbish", ["", "[]", '{"plan": 3, "counts": 4}'])
def test_rubbish_in_place_of_results_stops_neither_plan_nor_run(folder, rubbish):
    (folder / "results/small").mkdir(parents=True)
    (folder / "results/small/run.json").write_text(rubbish)
    assert f"{CELLS} cells" in call("plan", "small.yaml").stdout
    assert f"{CELLS} of {CELLS} cells done" in call("run", "small.yaml").stdout


def test_another_error_of_ours_gives_exit_code_1_without_a_traceback(folder, monkeypatch):
    def broken(*args: object, **options: object) -> None:
        raise StoreError("no room", "small", "more")

    monkeypatch.setattr("ftsec_ray.schedule.execution.execute", broken)
    result = call("run", "small.yaml", code=1)
    assert "[store] no room" in result.stderr
    assert "Traceback" not in result.output


def test_a_bug_is_not_hidden(folder, monkeypatch):
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ftsec_ray.schedule.execution.execute", broken)
    assert isinstance(CliRunner().invoke(app, ["run", "small.yaml"]).exception, ZeroDivisionError)


def test_an_interrupted_run_says_how_to_continue_and_keeps_what_is_done(folder, monkeypatch):
    def interrupted(plan: object, store: object, **options: object) -> None:
        count = 0

        def stop(event: object) -> None:
            nonlocal count
            count += 1
            if count == 6:
                raise KeyboardInterrupt

        toy.execute(plan, store, **{**options, "on_event": stop})

    monkeypatch.setattr("ftsec_ray.schedule.execution.execute", interrupted)
    assert "Continue with" in call("run", "small.yaml", code=130).stderr
    held = Store.open(".ftsec/store").done()
    assert held
    monkeypatch.setattr("ftsec_ray.schedule.execution.execute", toy.execute)
    toy.ran.clear()
    call("run", "small.yaml")
    assert len(toy.ran) == len(Store.open(".ftsec/store").done()) - len(held)


def test_a_plan_makes_no_folder_and_gives_its_figures_as_json(folder):
    shown = json.loads(call("plan", "small.yaml", "--json", "--gpu-price", "2").stdout)
    assert shown["cells"] == CELLS
    assert shown["to_run"] == shown["stages"] < shown["naive_runs"]
    assert (shown["gpu_hours"], shown["cost"]) == (0.0, 0.0)
    assert "24 cells" in call("plan", "small.yaml").stdout
    assert sorted(p.name for p in folder.iterdir()) == ["small.yaml"]


def test_every_method_is_listed_and_has_a_page():
    for registry, kind in ((ATTACKS, "attacks"), (DEFENSES, "defenses")):
        rows = json.loads(call("list", kind, "--json").stdout)
        assert [row["name"] for row in rows] == registry.names()
        assert all(row["summary"] and row["phase"] in ("pre", "during", "post") for row in rows)
        shown = call("list", kind).stdout
        for name in registry.names():
            assert name in shown
            pages = [
                page
                for page in json.loads(call("show", name, "--json").stdout)
                if page["kind"] == registry.kind
            ]
            assert set(pages[0]["sections"]) >= {"Paper", "Differs", "Cost"}
            assert all(parameter["doc"] for parameter in pages[0]["parameters"]), name


def test_a_page_tells_the_zero_stages_of_a_method_that_is_particular():
    assert "DeepSpeed: ZeRO stages 0, 1, 2 only" in call("show", "lisa").stdout
    assert "DeepSpeed" not in call("show", "badnets").stdout
    assert json.loads(call("show", "badnets", "--json").stdout)[0]["zero_stages"] == [0, 1, 2, 3]


def test_a_page_shows_paper_hooks_and_parameters_with_defaults():
    shown = call("show", "badnets").stdout
    for word in (
        "Paper:",
        "Differs:",
        "Cost:",
        "craft_data",
        "rate",
        "number",
        "0.1",
        "phase: pre",
    ):
        assert word in shown


def test_a_name_of_an_attack_and_a_defense_shows_both_pages():
    shown = call("show", "none").stdout
    assert "(attack" in shown
    assert "(defense" in shown


def test_every_column_of_the_results_is_listed_with_type_unit_and_direction():
    rows = json.loads(call("list", "columns", "--json").stdout)
    assert [(row["table"], row["column"], row["type"]) for row in rows] == [
        (name, field.name, str(field.type)) for name in TABLES for field in table_schema(name)
    ]
    assert all(row["unit"] for row in rows)
    assert {row["better"] for row in rows} == {"none", "lower"}
    assert {int(row["since"]) for row in rows} <= set(range(1, int(SCHEMA_VERSION) + 1))
    assert f"schema version {SCHEMA_VERSION}" in call("list", "columns").stdout


def test_all_metrics_models_and_tasks_are_listed():
    shown = call("list", "metrics").stdout
    assert all(name in shown for name in METRICS)
    models = json.loads(call("list", "models", "--json").stdout)
    assert {row["source"] for row in models} >= {"ladder:0.2m", "ladder:12m-base"}
    assert all(row["parameters"] > 100_000 for row in models)
    assert "microworld" in call("list", "tasks").stdout


def test_a_misspelt_name_gets_a_did_you_mean_and_exit_code_2():
    assert "did you mean 'badnets'?" in call("show", "badnet", code=2).stderr
    assert "did you mean 'attacks'?" in call("list", "attack", code=2).stderr


def test_the_schema_verb_prints_json():
    assert json.loads(call("schema").stdout)["title"] == "ftsec_ray sweep"


def test_the_version_is_printed():
    from ftsec_ray import __version__

    assert __version__ in call("--version").stdout


def test_the_installed_command_is_this_one():
    ours = [point for point in entry_points(group="console_scripts") if point.name == "ftsec"]
    if not ours:
        pytest.skip("the package is not installed here")
    assert ours[0].value == "ftsec_ray.cli:main"


@pytest.mark.parametrize(
    "args",
    [
        ("list", "attacks"),
        ("list", "defenses"),
        ("list", "models"),
        ("show", "badnets"),
        ("plan", "small.yaml"),
    ],
)
def test_list_show_and_plan_answer_without_torch_ray_or_arrow(tmp_path, args):
    (tmp_path / "small.yaml").write_text(SWEEP)
    code = (
        "import atexit, sys\natexit.register(lambda: print(sorted({'torch', 'ray', 'transformers',"
        " 'pyarrow.lib'} & set(sys.modules)), file=sys.stderr))\nfrom ftsec_ray.cli import"
        " main\nmain()"
    )
    result = python("-c", code, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "[]"


def test_output_into_a_file_is_plain_text_without_trailing_blanks():
    result = python("-m", "ftsec_ray", "list", "attacks")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_a_reader_that_has_enough_is_no_error():
    root = Path(__file__).parents[2]
    shell = f"'{sys.executable}' -m ftsec_ray schema | head -1"
    result = subprocess.run(
        ["/bin/sh", "-c", shell], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert result.stdout == "{\n"
    assert "Traceback" not in result.stderr


def test_api_and_command_line_leave_the_same_results(folder):
    call("run", "small.yaml", "--results", "one")
    results = api.run("small.yaml", results="two")
    assert results.cells.equals(api.open_results("one/small").cells)
    assert set(results.metrics.column("cell").to_pylist()) == set(
        results.cells.column("cell").to_pylist()
    )
    assert results.to_pandas("cells").shape[0] == CELLS
    assert results.to_polars("metrics").height == results.metrics.num_rows
    assert results.meta["sweep_text"] == SWEEP


@pytest.mark.parametrize("args", [(), ("--limit", "3"), ("--results", "elsewhere")])
def test_a_dry_run_prints_the_plan_and_starts_nothing(folder, args):
    planned = call("plan", "small.yaml", *args)
    dry = call("run", "small.yaml", "--dry-run", *args)
    assert (dry.stdout, dry.stderr) == (planned.stdout, planned.stderr)
    assert ("3 cells" if "--limit" in args else f"{CELLS} cells") in dry.stdout
    assert toy.ran == []
    assert sorted(p.name for p in folder.iterdir()) == ["small.yaml"]


def test_a_dry_run_has_the_exit_codes_of_a_plan(folder):
    (folder / "bad.yaml").write_text(SWEEP.replace("badnets", "badnet"))
    dry, planned = (
        call("run", "bad.yaml", "--dry-run", code=2),
        call("plan", "bad.yaml", code=2),
    )
    assert dry.stderr == planned.stderr
    assert "did you mean 'badnets'?" in dry.stderr


def test_a_limited_plan_counts_the_cells_that_a_limited_run_takes(folder):
    assert json.loads(call("plan", "small.yaml", "--limit", "3", "--json").stdout)["cells"] == 3
    call("plan", "small.yaml", "--limit", "0", code=2)


def test_types_of_parameters_are_words():
    pages = [
        page
        for registry in (ATTACKS, DEFENSES)
        for name in registry.names()
        for page in json.loads(call("show", name, "--json").stdout)
    ]
    types = {parameter["type"] for page in pages for parameter in page["parameters"]}
    assert {"integer", "number", "text", "true or false"} <= types
    assert "one of dirty | mix | clean" in types
    named = {one for one in types if not one.startswith("one of")}  # choices are the method's words
    words = {word for one in named for word in one.replace(",", " ").split()}
    assert not words & {"int", "ints", "str", "bool", "float", "tuple", "None"}


@pytest.mark.parametrize(
    "verb",
    ["", *(command.name for command in app.registered_commands)],
)
def test_help_fits_80_columns_and_its_list_cuts_no_sentence(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(*filter(None, (verb, "--help"))).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    listed = shown.partition("Commands:")[2].splitlines()
    cut = [line for line in listed if line.endswith("...") and not line.endswith(", ...")]
    assert cut == []
