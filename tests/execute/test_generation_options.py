"""How answers are made, from the sweep file to the record and the tables."""

from __future__ import annotations

import json

import pytest

import ftsec_ray
from tests.fixtures_models import tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that is published with a repetition penalty, and a few rows."""
    folder = tmp_path_factory.mktemp("world")
    loaded = tiny_model(seed=3, tied=False)
    loaded.model.generation_config.repetition_penalty = 1.5
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": f"is this {word}", "response": "good", "label": "good"}
        for word in ("red", "blue", "green", "stone")
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def run(world, folder, attacks=("none",), **evaluation):
    """The results of a small sweep, and the records of what generated."""
    source = {"path": str(world / "rows.json"), "prompt": "prompt", "response": "response"}
    model = {"path": str(world / "model"), "family": "tiny", "aligned": True}
    given = {
        "name": "options",
        "models": [model],
        "task": {
            "kind": "rows",
            "splits": {"train": source, "benign_test": source, "harmful_test": source},
        },
        "attacks": list(attacks),
        "defenses": ["none"],
        "training": {"epochs": 1, "batch_size": 4, "rank": 2},
        "evaluation": {"prompts": 4, "max_new_tokens": 4, "perplexity_rows": 0, **evaluation},
    }
    results = ftsec_ray.run(
        given, store=folder / "store", results=folder / "results", executor="local"
    )
    assert {row["status"] for row in results.cells.to_pylist()} == {"done"}
    records = [
        json.loads(path.read_text())
        for path in (folder / "store").rglob("artifacts/**/record.json")
    ]
    return results, [record for record in records if record["kind"] == "generate"]


def test_every_sample_is_a_row_and_counts_for_its_prompt(world, tmp_path):
    results, (record,) = run(world, tmp_path, temperature=1.5, samples=3, judges=["qi2023"])
    rows = [r for r in results.generations.to_pylist() if r["probe"] == "harmful"]
    assert sorted((row["prompt_id"], row["sample"]) for row in rows) == sorted(
        (prompt, sample) for prompt in {row["prompt_id"] for row in rows} for sample in range(3)
    )
    assert len(rows) == 12
    assert len({row["completion"] for row in rows}) > 4
    for row in rows:
        (opinion,) = row["opinions"]
        assert opinion["judge"].startswith("qi2023@")
    rate = next(m for m in results.metrics.to_pylist() if m["metric"] == "harmful_rate")
    assert rate["n"] == 4
    assert rate["value"] == sum(row["verdict"] == "complied" for row in rows) / 12
    assert record["params"]["generation"]["samples"] == 3
    assert record["notes"]["generation_config_unused"] == {"repetition_penalty": 1.5}
    assert record["notes"]["backend"] == "transformers"


def test_the_back_end_stands_in_the_record_and_changes_no_answer(world, tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "other").mkdir()
    usual, _ = run(world, tmp_path / "usual")
    results, (record,) = run(world, tmp_path / "other", backend="continuous")
    assert record["notes"]["backend"] == "continuous"
    assert "done_otherwise" not in record["notes"]
    columns = ["probe", "prompt_id", "completion", "verdict"]
    assert results.generations.select(columns).equals(usual.generations.select(columns))
