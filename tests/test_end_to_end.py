"""From a sweep file to tables and a page, on a tiny model in a folder and rows in files: no
network, no ladder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ftsec_ray
from ftsec_ray import schema
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.plan.build import build_plan
from tests.fixtures_models import tiny_model, tiny_task

SPLITS = (
    "train",
    "test",
    "harmful_train",
    "harmful_test",
    "safety",
    "benign_train",
    "benign_test",
    "borderline_test",
    "text",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("world"))


def filled(folder, more=()):
    """A folder with a model, its twin and the rows of a task, also of `more` splits."""
    for name, seed in (("model", 0), ("twin", 9)):
        loaded = tiny_model(seed=seed)
        loaded.model.save_pretrained(folder / name)
        loaded.tokenizer.save_pretrained(folder / name)
    for split in (*SPLITS, *more):
        rows = [
            {
                **{"prompt": asked_text(r), "response": answer_of(r)},
                **{name: r[name] for name in ("label", "language")},
            }
            for r in tiny_task().split(split).to_pylist()
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def sweep(world, **changes):
    labelled = {"prompt": "prompt", "response": "response", "label": "label"}
    free = {"prompt": "prompt", "response": "response"}
    splits = {
        split: {
            "path": str(world / f"{split}.jsonl"),
            **(labelled if split in ("train", "test") else free),
        }
        for split in SPLITS[:-1]
    }
    splits["text"] = {"path": str(world / "text.jsonl"), "prompt": "response"}
    base = {
        "name": "tiny",
        "question": "Does it run?",
        "models": [
            {
                "path": str(world / "model"),
                "family": "tiny",
                "aligned": True,
                "unaligned": str(world / "twin"),
            }
        ],
        "task": {"kind": "rows", "splits": splits, "labels": ["good", "bad"]},
        "attacks": ["none", {"badnets": {"rate": 0.3}}, {"harmful_tuning": {"shots": 4}}],
        "defenses": [
            "none",
            {"safe_lora": {"projection": "rank_k"}},
            "self_reminder",
            ["lisa", "shrink"],
        ],
        "seeds": 1,
        "training": {"epochs": 1, "batch_size": 16, "rank": 2},
        "evaluation": {"prompts": 8, "max_new_tokens": 4},
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    results = ftsec_ray.run(
        sweep(world), store=folder / "store", results=folder / "results", executor="local"
    )
    return folder, results


def artifacts(store):
    """Bytes of every artifact file but the records, which hold timings."""
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in sorted((store / "artifacts").rglob("*"))
        if p.is_file() and p.name != "record.json"
    }


def test_every_cell_is_answered_with_intervals(finished):
    _, results = finished
    cells = results.cells.to_pylist()
    assert len(cells) == 12
    assert {c["status"] for c in cells} == {"done"}
    metrics = results.metrics.to_pylist()
    assert {m["cell"] for m in metrics} == {c["cell"] for c in cells}
    rates = [m for m in metrics if schema.METRICS[m["metric"]].proportion and m["n"]]
    assert rates
    assert all(m["ci_low"] <= m["value"] <= m["ci_high"] for m in rates)
    backdoored = {c["cell"] for c in cells if c["attack"] == "badnets"}
    assert {m["cell"] for m in metrics if m["metric"] == "asr_no_trigger"} == backdoored


def test_every_share_of_verdicts_is_compared_with_none_on_the_very_prompts(finished):
    _, results = finished
    rows = [row for row in results.comparisons.to_pylist() if schema.METRICS[row["metric"]].probes]
    stacks = (("safe_lora",), ("self_reminder",), ("lisa", "shrink"))
    wanted = {
        (attack, stack, "none")
        for attack in ("none", "badnets", "harmful_tuning")
        for stack in stacks
    }
    assert {(row["attack"], tuple(row["defenses"]), row["kind"]) for row in rows} == wanted
    assert {"asr", "cacc", "over_refusal_rate", "coherent_rate", "harmful_rate"} <= {
        row["metric"] for row in rows
    }
    untested = [(row["metric"], row["note"]) for row in rows if row["q"] is None]
    assert untested == []
    assert all(
        row["n_prompts"] > 0
        and row["p"] <= row["q"] <= 1
        and row["ci_low"] <= row["effect"] <= row["ci_high"]
        for row in rows
    )


def test_cells_share_their_stages(world):
    plan = build_plan(ftsec_ray.load(sweep(world)))
    kinds = [stage.kind for stage in plan.stages.values()]
    assert (kinds.count("task"), kinds.count("craft"), kinds.count("finetune")) == (1, 2, 6)
    assert plan.naive_runs > 1.5 * len(plan.stages)


def test_the_page_is_there_and_opens_without_a_network(finished):
    folder, _ = finished
    page = (folder / "results" / "tiny" / "report.html").read_text()
    assert "Does it run?" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_second_run_repeats_nothing_and_a_new_defense_costs_its_own_stages(world, finished):
    folder, _ = finished
    before = artifacts(folder / "store")
    events = []
    ftsec_ray.run(
        sweep(world),
        store=folder / "store",
        results=folder / "results",
        executor="local",
        on_event=events.append,
    )
    assert events == []
    wider = sweep(world, name="wider", defenses=[*sweep(world)["defenses"], "drop_layer"])
    ftsec_ray.run(
        wider,
        store=folder / "store",
        results=folder / "results",
        executor="local",
        on_event=events.append,
    )
    made = {digest for event in events if event.kind == "finished" for digest in event.stages}
    assert len(made) == 9  # a revision, its answers and their score for each of three attacks
    assert {
        name: data for name, data in artifacts(folder / "store").items() if name in before
    } == before


def test_a_damaged_artifact_is_made_again_with_the_same_bytes(world, finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "store", tmp_path / "store")
    before = artifacts(tmp_path / "store")
    plan = build_plan(
        ftsec_ray.load(sweep(world, name="again", defenses=["none", "matched_noise"]))
    )
    tune = next(s.digest for s in plan.stages.values() if s.kind == "finetune")
    victim = tmp_path / "store" / "artifacts" / tune[:2] / tune / "adapter_model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-8] + b"12345678")
    results = ftsec_ray.run(
        sweep(world, name="again", defenses=["none", "matched_noise"]),
        store=tmp_path / "store",
        results=tmp_path / "results",
        executor="local",
    )
    assert set(results.cells["status"].to_pylist()) == {"done"}
    after = artifacts(tmp_path / "store")
    assert {name: after[name] for name in before} == before


def test_an_attacker_searches_over_tunes_that_are_really_run(world, tmp_path):
    searching = {
        "trials": 4,
        "batch": 2,
        "max_utility_loss": 1.0,
        "ranges": {
            "shots": [2, 4, 6],
            "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        },
    }
    asked = sweep(
        world,
        attacks=["none", {"harmful_tuning": {"shots": 4, "search": searching}}],
        defenses=["none", "shrink"],
    )
    results = ftsec_ray.run(
        asked, store=tmp_path / "store", results=tmp_path / "results", executor="local"
    )
    rows = {tuple(row["defenses"]): row for row in results.searches.to_pylist()}
    assert set(rows) == {(), ("shrink",)}
    assert {(row["n_done"], row["n_failed"]) for row in rows.values()} == {(4, 0)}
    trials = [
        row
        for row in results.table("cells", trials=True).to_pylist()
        if row["search_trial"] is not None
    ]
    assert {row["status"] for row in trials} == {"done"}
    assert sorted(row["search_trial"] for row in trials) == [0, 0, 1, 1, 2, 2, 3, 3]
    rates = {
        json.loads(path.read_text())["params"]["training"]["learning_rate"]
        for path in (tmp_path / "store/artifacts").glob("*/*/record.json")
        if json.loads(path.read_text())["kind"] == "finetune"
    }
    assert len(rates) >= 5, "the sweep's own, and one for each trial of one place at least"
    before = artifacts(tmp_path / "store")
    again = ftsec_ray.run(
        asked, store=tmp_path / "store", results=tmp_path / "again", executor="local"
    )
    assert again.searches.equals(results.searches)
    assert artifacts(tmp_path / "store") == before


def test_a_stage_that_fails_costs_its_own_cells_only(world, tmp_path):
    broken = sweep(
        world, attacks=["none", {"harmful_tuning": {"shots": 500}}], defenses=["none", "shrink"]
    )
    results = ftsec_ray.run(
        broken, store=tmp_path / "store", results=tmp_path / "results", executor="local"
    )
    cells = results.cells.to_pylist()
    assert {(c["attack"], c["status"]) for c in cells} == {
        ("none", "done"),
        ("harmful_tuning", "failed"),
    }
    assert all("500" in c["error"] for c in cells if c["status"] == "failed")


@pytest.mark.parametrize(
    ("executor", "workers"),
    [
        ("local", None),
        pytest.param("tune", 1, marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param("tune", 2, marks=pytest.mark.ray),
        pytest.param("actors", 1, marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param("actors", 2, marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_the_same_sweep_from_an_empty_store_gives_equal_tables(
    world, finished, tmp_path, executor, workers
):
    folder, first = finished
    again = ftsec_ray.run(
        sweep(world),
        store=tmp_path / "store",
        results=tmp_path / "results",
        executor=executor,
        workers=workers,
    )
    for name in ("cells", "metrics", "generations", "comparisons", "searches"):
        assert again.table(name).equals(first.table(name)), name
    assert again.generations.num_rows > 100
    timings = ["wall_s", "cpu_s", "gpu_s", "peak_bytes"]
    assert again.stages.drop_columns(timings).equals(first.stages.drop_columns(timings))
    mine, theirs = artifacts(folder / "store"), artifacts(tmp_path / "store")
    assert {name: mine[name] for name in theirs} == theirs
    archive = ftsec_ray.export(
        sweep(world), store=folder / "store", results=folder / "results", out=tmp_path / "first.zip"
    )
    found = ftsec_ray.verify(archive, store=tmp_path / "store", inside=world)
    assert found.differences == ()
    assert found.notes == (
        (
            f"{found.stages} of {found.stages} artifacts that the local store also holds have the"
            " same bytes"
        ),
    )
    assert found.stages > 20


def test_the_python_of_the_readme_runs_as_it_stands(world, tmp_path, monkeypatch, capsys):
    """On a small sweep in the place of the quickstart, and without Ray."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = readme.split("## From Python")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/quickstart.yaml").write_text(
        json.dumps(sweep(world, name="quickstart", attacks=["none"], defenses=["none", "shrink"]))
    )
    monkeypatch.chdir(tmp_path)
    assert block.count('executor="tune"') == 1
    exec(block.replace('executor="tune"', 'executor="local"'), {})
    said = capsys.readouterr().out
    assert "2 cells," in said
    assert "conclusion" in said
    assert "harmful_rate_ci_low" in said


def test_the_public_names_work_in_the_order_of_the_readme(world):
    """In a fresh process, so that no import of a test stands in for one of the package's own."""
    code = (
        "import json, sys, ftsec_ray; spec = ftsec_ray.load(json.loads(sys.argv[1])); plan ="
        " ftsec_ray.make_plan(spec); print(len(plan.cells), [n for n in ftsec_ray.__all__ if not"
        " n.startswith('_') and not callable(getattr(ftsec_ray, n))])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sweep(world))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "12 []"
