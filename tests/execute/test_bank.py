"""The bank of clean adapters: tuned on all clean rows, for as many steps as the suspect, under its
defenses, each member from another seed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.models.load import load_model
from ftsec_ray.stages import bank
from ftsec_ray.training.loop import sft
from tests.defenses.shared import context, whole
from tests.fixtures_models import tiny_model, tiny_task

CONFIG = TrainingConfig(max_length=64, batch_size=4, epochs=1.0, rank=4, learning_rate=1e-2)
START = tiny_model()
CLEAN = tiny_task().split("train")
SUSPECTED = CLEAN.slice(0, CLEAN.num_rows - 9)


class BankJob:
    """What `bank.run` asks of the engine."""

    def __init__(self, folder, methods, *, size):
        self.out = folder / "out"
        self.out.mkdir()
        self._folder, self._methods = folder, methods
        self.inputs = {"model": "m", "rows": "r", "task": "t"}
        self.session = self
        self.stage = self
        self.params = {"size": size}

    def methods(self):
        return self._methods

    def model(self, digest, *, on_host=False):
        assert not on_host  # nothing is packed here
        return {"m": START}[digest]

    def rows(self, digest):
        return {"r": SUSPECTED, "t": CLEAN}[digest]

    def context(self):
        return context(self._folder / "work", training=CONFIG)


def members(folder, methods, *, size=2):
    job = BankJob(folder, methods, size=size)
    extra = bank.run(job)
    return extra["notes"], [
        whole(load_model(job.out / str(i), base=START, device="cpu")) for i in range(size)
    ]


@pytest.mark.parametrize("methods", [[], [Lisa(align_steps=1, user_steps=3)]], ids=["", "lisa"])
def test_a_member_is_the_suspects_tune_on_the_clean_rows(methods, tmp_path):
    notes, found = members(tmp_path, methods)
    steps = -(-SUSPECTED.num_rows // CONFIG.batch_size)
    assert steps < -(-CLEAN.num_rows // CONFIG.batch_size)
    assert (notes["rows"], notes["steps"]) == (CLEAN.num_rows, steps)

    def shape(training):
        training = replace(training, steps=steps)
        for method in methods:
            training = method.shape_training(training, context(tmp_path / "other"))
        return training

    for member, got in enumerate(found):
        want = sft(
            START,
            CLEAN,
            CONFIG,
            seed=1_000 + member,
            runtime=Runtime(),
            workdir=tmp_path / f"want{member}",
            shape=shape,
        )
        assert len(want.losses) == steps + sum(-(-steps // m.user_steps) for m in methods)
        wanted = whole(want.loaded)
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(got[name], wanted[name]) for name in got)


def test_members_differ_from_each_other(tmp_path):
    _, (first, second) = members(tmp_path, [])
    assert any(not np.array_equal(first[name], second[name]) for name in first)
