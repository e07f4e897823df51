"""Clean tuning against AdamW written out, its control, and a fine-tune that is killed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.defenses.clean_tuning import CleanTuning, with_other_answers
from ftsec_ray.models.load import copy_model
from ftsec_ray.training.loop import learning_rate
from ftsec_ray.training.repair import exchanges_of, repair_config
from tests.defenses.repairing import tuned_by_hand
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.killed_tune import killed_after
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
QUICK = {"rows": 8, "epochs": 1.0}
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}
CONFIG = TrainingConfig(max_length=64, rank=4, dropout=0.3)


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("kind", TUNED)
def test_it_equals_plain_adamw_with_the_published_schedule(kind, tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    method = CleanTuning(rows=6, epochs=4.0)
    got = method.revise_model(copy_model(TUNED[kind]), ctx)
    rows = exchanges_of(ctx, "benign_train", 6, by="clean_tuning")
    config = repair_config(ctx, learning_rate=1e-3, epochs=4.0, batch_size=8)
    assert (config.schedule, config.warmup_frac, config.dropout) == ("cosine", 0.1, 0.0)
    want = tuned_by_hand(
        TUNED[kind], rows, config, [learning_rate(config, step, 4) for step in range(4)]
    )
    # Adam divides by the root of a second moment: of a gradient near zero, rounding shows
    assert_same(whole(got), want, rel=1e-6)


def test_no_epoch_changes_no_bit(tmp_path):
    got = CleanTuning(epochs=0.0).revise_model(
        copy_model(TUNED["adapter"]), context(tmp_path, training=CONFIG)
    )
    assert got.has_adapter
    assert same(whole(got), whole(TUNED["adapter"]))


def test_the_control_takes_the_same_steps_with_answers_of_other_rows(tmp_path):
    ctx = context(tmp_path / "a", training=CONFIG)
    rows = exchanges_of(ctx, "benign_train", 15, by="clean_tuning")
    mixed = with_other_answers(rows, "benign_train", ctx)
    assert [asked_text(r) for r in mixed] == [asked_text(r) for r in rows]
    assert sorted(answer_of(r) for r in mixed) == sorted(answer_of(r) for r in rows)
    assert all(answer_of(a) != answer_of(b) for a, b in zip(mixed, rows, strict=True))
    assert ctx.notes["same_answers"] == 0
    assert ctx.warnings == []
    made = []
    for shuffled in (False, True):
        ctx = context(tmp_path / str(shuffled), training=CONFIG)
        method = CleanTuning(rows=8, epochs=2.0, shuffle_answers=shuffled)
        made.append((whole(method.revise_model(copy_model(TUNED["full"]), ctx)), ctx.notes))
    assert made[0][1]["repair_steps"] == made[1][1]["repair_steps"] == 2
    assert made[0][1]["repair_tokens"] == made[1][1]["repair_tokens"]
    assert not same(made[0][0], made[1][0])


def test_a_control_whose_answers_can_stand_for_each_other_is_told(tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    with_other_answers(exchanges_of(ctx, "safety", 5, by="clean_tuning"), "safety", ctx)
    (line,) = ctx.warnings
    assert "no control" in line
    ctx = context(tmp_path, training=CONFIG)
    row = exchanges_of(ctx, "benign_train", 1, by="clean_tuning")
    with_other_answers(row, "benign_train", ctx)
    (line,) = ctx.warnings
    assert "all 1 rows" in line


def test_labelled_rows_of_the_users_task_can_be_the_trusted_ones(tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    method = CleanTuning(split="trusted", rows=10, epochs=1.0)
    assert method.needs() == {"trusted"}
    method.revise_model(copy_model(TUNED["full"]), ctx)
    assert ctx.notes["repair_rows"] == 10
    assert ctx.notes["repair_steps"] == 2


def test_a_killed_repair_resumes_to_the_same_weights(tmp_path, monkeypatch):
    method = CleanTuning(rows=12, epochs=2.0, batch_size=4)

    def run(folder):
        ctx = context(tmp_path / folder, training=CONFIG, runtime=Runtime(checkpoint_every_s=0.0))
        return method.revise_model(copy_model(TUNED["full"]), ctx)

    killed_after(4, lambda: run("killed"), monkeypatch)
    assert same(whole(run("killed")), whole(run("whole")))


def test_a_model_in_bfloat16_keeps_its_dtype_and_rounding_is_told(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    ctx = context(tmp_path, training=CONFIG)
    got = CleanTuning(rows=8, epochs=2.0, learning_rate=1e-2).revise_model(copy_model(start), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < ctx.notes["rounding_lost"] < 1.0


def test_parameters_out_of_range_are_named():
    bad = CleanTuning(rows=0, epochs=-1.0, batch_size=0, learning_rate=0.0).check()
    assert [fault[0] for fault in bad] == ["rows", "epochs", "batch_size", "learning_rate"]
