"""A sweep with a judge of pairs, end to end: answers beside those of the clean tune, in the tables and the report."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import ftsec_ray
from ftsec_ray.models import ladder
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.store import Store
from tests.evals.test_endpoint_judge import service  # noqa: F401

SWEEP = """
name: pairs
models: [ladder:0.2m]
task: {kind: microworld, options: {train_rows: 64}}
attacks: [none]
defenses: [none, shrink, self_reminder]
training: {epochs: 0.25, batch_size: 8}
evaluation:
  prompts: 4
  max_new_tokens: 8
  perplexity_rows: 0
  win_rate: {endpoint: URL, model: grader}
"""


def test_answers_are_compared_with_those_of_the_clean_tune(tmp_path, monkeypatch, service):
    short = {name: replace(size, steps=4, align_steps=2) for name, size in ladder.SIZES.items()}
    monkeypatch.setattr(ladder, "SIZES", short)
    service.replies = deque([(200, "VERDICT: FIRST")])
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("URL", service.url))
    results = ftsec_ray.run(
        tmp_path / "sweep.yaml",
        executor="local",
        store=str(tmp_path / "store"),
        results=tmp_path / "out",
    )
    cells = {row["cell"]: row["defenses"] for row in results.cells.to_pylist()}
    rows = [row for row in results.metrics.to_pylist() if row["metric"] == "win_rate"]
    assert sorted(cells[row["cell"]] for row in rows) == [["self_reminder"], ["shrink"]]
    assert {row["value"] for row in rows} == {0.5}, "the first place wins in both orders"
    assert {row["n"] for row in rows} == {4}
    asked = [body["messages"][0]["content"] for _, body in service.bodies]
    assert asked, "barely trained models differ in their answers"
    assert all("[FIRST ANSWER]" in text for text in asked)
    store = Store.open(str(tmp_path / "store"))
    records = list(store.records(store.done()).values())
    notes = [record["notes"] for record in records if record["kind"] == "win_rate"]
    assert sum(note["judge_endpoint"].get("calls", 0) for note in notes) == len(asked)
    assert sum(2 * (note["pairs"] - note["equal_answers"]) for note in notes) == len(asked)
    assert "win_rate (higher is better)" in grid_markdown(results)
    warned = " ".join(text for record in records for text in record["notes"].get("warnings", ()))
    assert "prefers the first answer in 100%" in warned
