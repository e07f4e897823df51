"""Prompts that are tuned on and asked, and rows without an answer, are counted and warned of."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from ftsec_ray.config.sweep import SourceSpec, TaskSpec
from ftsec_ray.data.overlap import overlap_warnings, overlaps, unanswered
from ftsec_ray.data.tasks import load_task
from ftsec_ray.stages import task as task_stage


def split(tmp_path, name, rows):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows), encoding="utf-8"
    )
    return name, SourceSpec(path=str(path), prompt="prompt", response="response")


def task_of(tmp_path, **splits):
    sources = tuple(split(tmp_path, name, rows) for name, rows in splits.items())
    return load_task(TaskSpec(name="mine", kind="rows", splits=sources))


def test_each_pair_of_splits_that_share_prompts_is_counted_whatever_case_and_spacing(tmp_path):
    task = task_of(
        tmp_path,
        train=[("one", "a"), ("two", "a")],
        harmful_train=[("Bake  a\tcake", "sure"), ("straße", "sure")],
        safety=[("steal a car", "no")],
        benign_train=[("x", "y")],
        harmful_test=[("bake a cake ", ""), ("steal a CAR", ""), ("STRASSE", ""), ("new", "")],
        test=[("three", "a"), ("one.", "a")],
        text=[("one", "one")],
    )
    shared = overlaps(task)
    assert shared == {"harmful_train/harmful_test": 2, "safety/harmful_test": 1}
    (first, _) = overlap_warnings(task, shared)
    assert first.startswith("task 'mine': 2 of 4 prompts of split 'harmful_test' are also in split")


def test_a_split_that_is_asked_what_it_was_tuned_on_is_warned_of_by_the_stage(
    tmp_path, monkeypatch
):
    rows = [("one", "a"), ("two", " "), ("three", "b")]
    task = task_of(tmp_path, train=rows, test=rows[:2])
    monkeypatch.setattr("ftsec_ray.data.tasks.load_task", lambda spec: task)
    monkeypatch.setattr("ftsec_ray.plan.decode.task_of", lambda stage: None)
    said = []
    job = SimpleNamespace(stage=None, out=tmp_path / "out", warn=said.append)
    notes = task_stage.run(job)["notes"]
    assert notes == {
        "splits": {"test": 2, "train": 3},
        "overlap": {"train/test": 2},
        "empty_responses": {"train": 1},
    }
    assert [text.split(":")[1][:21] for text in said] == [
        " 2 of 2 prompts of sp",
        " 1 of 3 rows of split",
    ]


@pytest.mark.parametrize("kind", ["microworld", "agent"])
def test_the_splits_of_the_microworld_share_no_prompt_that_would_warn(kind):
    task = load_task(TaskSpec(name="world", kind=kind))
    assert overlaps(task) == {}
    assert unanswered(task) == {}
