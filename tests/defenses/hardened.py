"""What the tests of defenses share that train the aligned model before the user's fine-tune."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime, TaskData
from ftsec_ray.conversation import message, with_answer
from tests.defenses.shared import context, whole
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.killed_tune import killed_after

TRAINING = TrainingConfig(max_length=64, batch_size=4, rank=4, alpha=8.0)
SHORT = {
    "epochs": 1.0,
    "learning_rate": 1e-2,
    "batch_size": 8,
    "safety_rows": 8,
    "benign_rows": 8,
}


def hardened(method, workdir, *, start=None, task=None, models=None, dropout=0.0, every=60.0):
    """The model that a defense gives, and the context with its notes."""
    ctx = context(
        workdir,
        task=task,
        models=models,
        training=replace(TRAINING, dropout=dropout),
        runtime=Runtime(checkpoint_every_s=every),
    )
    return method.prepare_model(start or tiny_model(), ctx), ctx


def same(one, other) -> bool:
    """Whether two models have the same weights, bit for bit."""
    ours, theirs = whole(one), whole(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


def check_resume(method, tmp_path, monkeypatch, *, steps=1, models=None):
    """A training that was killed ends with the same weights and the same notes."""
    want, told = hardened(method, tmp_path / "whole", every=0.0, models=models)
    killed_after(
        steps,
        lambda: hardened(method, tmp_path / "killed", every=0.0, models=models),
        monkeypatch,
    )
    got, again = hardened(method, tmp_path / "killed", every=0.0, models=models)
    assert told.notes["steps"] > steps
    assert same(got, want)
    assert again.notes == told.notes


def check_bfloat16(method, tmp_path, *, models=None):
    """Weights in half precision keep their dtype, change, and stay finite."""
    start = tiny_model()
    start.model.to(torch.bfloat16)
    got, ctx = hardened(method, tmp_path, start=start, models=models)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert all(bool(w.isfinite().all()) for w in got.model.parameters())
    assert ctx.notes["rounding_lost"] < 0.5
    moved = [
        not torch.equal(a, b)
        for a, b in zip(got.model.parameters(), start.model.parameters(), strict=True)
    ]
    assert any(moved)


def check_cuts(method, tmp_path, name):
    """Rows of the method's own whose answer is cut are counted apart from those of the plain loss;
    `name` begins the count.
    """
    rows = tiny_task().split("harmful_train").to_pylist()
    long = [with_answer(r, "take the " * 60) for r in rows[:3]]
    task = replace(
        tiny_task(), splits={**tiny_task().splits, "harmful_train": table([*long, *rows[3:]])}
    )
    _, ctx = hardened(method, tmp_path, task=task)
    assert ctx.notes[f"{name}_answers_cut"] == 3
    assert ctx.notes[f"{name}_rows_left_out"] == 0
    assert "answers_cut" not in ctx.notes


def in_turns(one: dict) -> dict:
    """The row with an exchange before it."""
    before = [message("user", "how do i fix lamp"), message("assistant", "take the lamp")]
    return {**one, "messages": [*before, *one["messages"]]}


def turned_task() -> TaskData:
    """The tiny task with several turns in every request."""
    task = tiny_task()
    names = ("harmful_train", "safety", "benign_train")
    rows = {name: table([in_turns(r) for r in task.split(name).to_pylist()]) for name in names}
    return replace(task, splits={**task.splits, **rows})
