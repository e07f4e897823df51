"""One-shot repair against AdamW written out, and where it must change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.conversation import asked, message
from ftsec_ray.defenses.one_shot_repair import OneShotRepair
from ftsec_ray.errors import DataError
from ftsec_ray.models.load import copy_model
from ftsec_ray.training.repair import repair_config
from tests.defenses.repairing import tuned_by_hand
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}
CONFIG = TrainingConfig(max_length=64, rank=4, learning_rate=2e-3)


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (1, 3), (4, 2)])
def test_it_equals_plain_adamw_on_the_drawn_refusals(kind, rows, steps, tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    got = OneShotRepair(rows=rows, steps=steps).revise_model(copy_model(TUNED[kind]), ctx)
    drawn = ctx.shuffled("safety", "one_shot_repair")[:rows]
    config = repair_config(
        ctx, learning_rate=2e-3, epochs=1.0, batch_size=rows, schedule="constant", warmup_frac=0.0
    )
    want = tuned_by_hand(TUNED[kind], drawn, config, [2e-3] * steps)
    # Adam divides by the root of a second moment: of a gradient near zero, rounding shows
    assert_same(whole(got), want, rel=1e-6)
    assert ctx.notes["repair_row_ids"] == [row["row_id"] for row in drawn]
    assert ctx.notes["repair_steps"] == steps
    moved = sum(
        float(np.square(want[name] - weight).sum()) for name, weight in whole(TUNED[kind]).items()
    )
    assert ctx.notes["change_norm"] == pytest.approx(moved**0.5, rel=1e-5)


@pytest.mark.parametrize("nothing", [{"rows": 0}, {"steps": 0}])
def test_without_rows_or_steps_no_bit_changes_and_the_adapter_stays(nothing, tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    got = OneShotRepair(**nothing).revise_model(copy_model(TUNED["adapter"]), ctx)
    assert got.has_adapter
    assert same(whole(got), whole(TUNED["adapter"]))
    assert ctx.notes["change_norm"] == 0.0


def test_more_steps_move_the_weights_further_and_the_refusal_becomes_likelier(tmp_path):
    losses, norms = [], []
    for steps in (1, 4, 12):
        ctx = context(tmp_path / str(steps), training=CONFIG)
        OneShotRepair(steps=steps, learning_rate=1e-2).revise_model(copy_model(TUNED["full"]), ctx)
        losses.append(ctx.notes["repair_last_loss"])
        norms.append(ctx.notes["change_norm"])
    assert norms == sorted(norms)
    assert losses[2] < 0.8 * losses[0]


def test_its_twin_takes_the_same_steps_on_benign_rows(tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    twin = OneShotRepair(split="benign_train")
    assert twin.needs() == {"benign_train"}
    assert OneShotRepair().needs() == {"safety"}
    twin.revise_model(copy_model(TUNED["full"]), ctx)
    assert all(row_id.startswith("b/") for row_id in ctx.notes["repair_row_ids"])
    assert ctx.notes["repair_steps"] == 5


def test_rows_of_several_turns_are_taken_and_rows_without_an_answer_are_not(tmp_path):
    task = tiny_task()
    rows = task.split("safety").to_pylist()
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take it")]
    longer = [{**row, "messages": [*turns, *row["messages"]]} for row in rows[:2]]
    silent = [{**row, "messages": asked(row)} for row in rows[2:]]
    other = replace(task, splits={**task.splits, "safety": table([*longer, *silent])})
    ctx = context(tmp_path, task=other, training=CONFIG)
    OneShotRepair(rows=2).revise_model(copy_model(TUNED["full"]), ctx)
    assert set(ctx.notes["repair_row_ids"]) == {row["row_id"] for row in longer}
    with pytest.raises(DataError, match="ask for 2 or fewer"):
        OneShotRepair(rows=3).revise_model(copy_model(TUNED["full"]), ctx)


def test_a_model_in_bfloat16_keeps_its_dtype_and_rounding_is_told(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    ctx = context(tmp_path, training=CONFIG)
    got = OneShotRepair(steps=2, learning_rate=1e-2).revise_model(copy_model(start), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < ctx.notes["rounding_lost"] < 1.0


def test_parameters_out_of_range_are_named():
    bad = OneShotRepair(rows=-1, steps=-1, learning_rate=0.0).check()
    assert [fault[0] for fault in bad] == ["rows", "steps", "learning_rate"]
    assert OneShotRepair.IS_CONTROL
