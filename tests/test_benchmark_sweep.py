"""A sweep with a benchmark of one's own, end to end: one stage per finished model, in the tables and on the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import ftsec_ray
from ftsec_ray.models import ladder
from ftsec_ray.store import Store

pytest.importorskip("lm_eval", reason="needs the extra `benchmarks`")

SWEEP = """
name: small
models: [ladder:0.2m]
task: {kind: microworld, options: {train_rows: 64}}
attacks: [none]
defenses: [none, self_reminder, shrink]
training: {epochs: 0.25, batch_size: 8}
evaluation: {prompts: 4, max_new_tokens: 8, perplexity_rows: 0, BENCHMARKS}
"""
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: colours.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["good", "bad"]
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a sweep in the folder: its metrics, and the kinds of the stages that it made."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    short = {name: replace(size, steps=4, align_steps=2) for name, size in ladder.SIZES.items()}
    monkeypatch.setattr(ladder, "SIZES", short)
    store = Store.open(str(tmp_path / "store"))

    def ran(benchmarks):
        (tmp_path / "sweep.yaml").write_text(SWEEP.replace("BENCHMARKS", benchmarks))
        before = store.done()
        results = ftsec_ray.run(
            Path(tmp_path / "sweep.yaml"),
            executor="local",
            store=str(tmp_path / "store"),
            results=tmp_path / "out",
        )
        records = store.records(store.done() - before).values()
        assert results.cells.num_rows == 3
        # the next run writes into the same folder
        return results.metrics.to_pylist(), sorted(record["kind"] for record in records)

    return ran


def test_a_benchmark_costs_its_own_stages_and_stands_in_the_tables(run, tmp_path):
    rows = [
        {"question": f"is this good or bad ? {word} .", "answer": i % 2}
        for i, word in enumerate(["cold", "warm", "red", "old", "new", "long"])
    ]
    (tmp_path / "colours.yaml").write_text(TASK)
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "others.yaml").write_text(TASK.replace("task: colours", "task: others"))
    plain, _ = run("keep_generations: true")
    first, made = run("benchmarks: [colours.yaml], benchmark_limit: 5")
    assert made == ["benchmark"] * 3, "one per finished model and wrapper, and nothing anew"
    _, made = run("benchmarks: [colours.yaml, others.yaml], benchmark_limit: 5")
    assert made == ["benchmark"] * 3, "another benchmark leaves the first one alone"
    measured = [row for row in first if row["metric"] == "benchmark:colours:acc"]
    assert len({row["cell"] for row in measured}) == len(measured) == 3
    for row in measured:
        assert row["n"] == 5
        assert row["value"] * 5 == pytest.approx(round(row["value"] * 5))
        assert row["ci_low"] < row["value"] < row["ci_high"] or row["value"] in (0.0, 1.0)
    assert {row["metric"] for row in first} == {row["metric"] for row in plain} | {
        "benchmark:colours:acc"
    }
    shown = (tmp_path / "out" / "small" / "report.html").read_text(encoding="utf-8")
    assert "<code>colours:acc</code>" in shown
