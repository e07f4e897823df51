"""SafeMERGE against NumPy on whole weights and AdamW written out, and its control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.defenses.safe_merge import SafeMerge
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.precision import widened
from ftsec_ray.training.loop import learning_rate
from ftsec_ray.training.repair import exchanges_of, repair_config
from tests.defenses.repairing import tuned_by_hand
from tests.defenses.shared import context, in_bfloat16, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
QUICK = {"epochs": 1.0, "safety_rows": 4}
UNALIGNED = in_float64(tiny_model(seed=0))
ALIGNED = tiny_full(UNALIGNED, seed=5, size=0.02)
TUNED = {"adapter": tiny_adapter(ALIGNED), "full": tiny_full(ALIGNED)}
ROLES = {"unaligned": UNALIGNED, "reference": ALIGNED, "start": ALIGNED}
CONFIG = TrainingConfig(max_length=64, rank=4, learning_rate=2e-3, batch_size=8)


def merged_model(method, tmp_path, kind="adapter", models=ROLES):
    ctx = context(tmp_path, training=CONFIG, models=models)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


def cosines_by_hand(kind):
    unaligned, aligned, tuned = (whole(m) for m in (UNALIGNED, ALIGNED, TUNED[kind]))
    found = {}
    for name in (n for n in tuned if n.endswith("_proj.weight")):
        V, delta = aligned[name] - unaligned[name], tuned[name] - aligned[name]
        onto = V @ V.T @ delta / np.linalg.norm(V)
        found[name] = (onto * delta).sum() / np.linalg.norm(onto) / np.linalg.norm(delta)
    return found


def safe_by_hand(ctx, count, steps):
    rows = exchanges_of(ctx, "safety", count, by="safe_merge")
    config = repair_config(ctx, learning_rate=2e-3, epochs=float(steps), batch_size=8)
    return tuned_by_hand(
        ALIGNED, rows, config, [learning_rate(config, step, steps) for step in range(steps)]
    )


@pytest.mark.parametrize("kind", TUNED)
def test_the_layers_below_the_threshold_are_mixed_and_the_others_stay(kind, tmp_path):
    cosines = cosines_by_hand(kind)
    ranked = sorted(cosines, key=cosines.get)
    tau = (cosines[ranked[4]] + cosines[ranked[5]]) / 2
    got, ctx = merged_model(SafeMerge(tau=tau, safety_rows=6, epochs=3.0), tmp_path, kind)
    safe, start, tuned = safe_by_hand(ctx, 6, 3), whole(ALIGNED), whole(TUNED[kind])
    want = dict(tuned)
    for name in ranked[:5]:
        update, other = tuned[name] - start[name], safe[name] - start[name]
        want[name] = start[name] + 0.8 * update + 0.2 * other
    # Adam divides by the root of a second moment: of a gradient near zero, rounding shows
    assert_same(whole(got), want, rel=1e-6)
    assert {f"{name}.weight" for name in ctx.notes["merged"]} == set(ranked[:5])
    assert ctx.notes["safety_rows"] == 6
    moved = sum(np.square(want[n] - tuned[n]).sum() for n in tuned) ** 0.5
    assert ctx.notes["change_norm"] == pytest.approx(moved, rel=1e-5)
    for name in set(tuned) - set(ranked[:5]):
        if kind == "full":
            assert np.array_equal(whole(got)[name], tuned[name])


@pytest.mark.parametrize("kind", TUNED)
def test_its_control_shrinks_the_same_layers_and_trains_nothing(kind, tmp_path):
    got, ctx = merged_model(SafeMerge(tau=1.01, safe="zero"), tmp_path, kind)
    start, tuned = whole(ALIGNED), whole(TUNED[kind])
    want = {
        n: start[n] + (0.8 if n.endswith("_proj.weight") else 1.0) * (tuned[n] - start[n])
        for n in tuned
    }
    assert_same(whole(got), want)
    assert len(ctx.notes["merged"]) == ctx.notes["layers"] == 14
    assert "safety_steps" not in ctx.notes
    assert SafeMerge(safe="zero").needs() == {"unaligned", "reference", "start"}
    assert SafeMerge().needs() == {"safety", "unaligned", "reference", "start"}


def test_below_every_cosine_nothing_changes_and_nothing_is_trained(tmp_path):
    got, ctx = merged_model(SafeMerge(tau=-1.01), tmp_path, "full")
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(TUNED["full"]).items())
    assert ctx.notes["merged"] == []
    assert "safety_steps" not in ctx.notes
    assert ctx.notes["change_norm"] == 0.0


def test_more_weight_on_the_safe_update_ends_at_the_safe_model(tmp_path):
    method = SafeMerge(tau=1.01, tuned_weight=0.0, safe_weight=1.0, safety_rows=6, epochs=2.0)
    got, ctx = merged_model(method, tmp_path, "adapter")
    assert_same(whole(got), safe_by_hand(ctx, 6, 2), rel=1e-6)


def test_a_model_in_bfloat16_keeps_its_dtype_and_rounding_is_told(tmp_path):
    loaded = [tiny_model(seed=0), tiny_full(tiny_model(seed=0), seed=5), None]
    loaded[2] = tiny_full(loaded[1])
    for one in loaded:
        one.model.to(torch.bfloat16)
    models = {"unaligned": loaded[0], "reference": loaded[1], "start": loaded[1]}
    ctx = context(tmp_path, training=CONFIG, models=models)
    got = SafeMerge(tau=1.01, epochs=1.0).revise_model(copy_model(loaded[2]), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < ctx.notes["rounding_lost"] < 1.0


def test_a_bfloat16_base_with_an_adapter_is_rounded_once(tmp_path):
    aligned, unaligned = in_bfloat16(tiny_full(UNALIGNED, seed=5)), in_bfloat16(tiny_model(seed=0))
    tuned = tiny_adapter(aligned)
    models = {"unaligned": unaligned, "reference": aligned, "start": aligned}
    method, ctx = SafeMerge(tau=1.01, safe="zero"), context(tmp_path, models=models)
    got = method.revise_model(tuned, ctx).model.named_parameters()
    mine, start = whole(widened(tuned)), whole(widened(aligned))
    for name, weight in got:
        factor = 0.8 if name.endswith("_proj.weight") else 1.0
        exact = torch.tensor(start[name] + factor * (mine[name] - start[name]))
        assert torch.equal(weight, exact.bfloat16()), name
    assert 0.0 < ctx.notes["rounding_lost"] < 1.0


def test_a_layer_that_alignment_left_alone_has_a_cosine_of_zero_and_is_merged(tmp_path):
    name = "model.layers.0.mlp.up_proj"
    before = copy_model(UNALIGNED)
    with torch.no_grad():
        twin = ALIGNED.model.get_submodule(name).weight
        before.model.get_submodule(name).weight.copy_(twin)
    models = {**ROLES, "unaligned": before}
    _, ctx = merged_model(SafeMerge(tau=1.01, safe="zero"), tmp_path, "full", models=models)
    assert ctx.notes["cosines"][name] == 0.0
    assert name in ctx.notes["merged"]
    assert len(ctx.notes["merged"]) == 14


def test_twins_that_do_not_differ_or_do_not_fit_are_errors(tmp_path):
    with pytest.raises(StageError, match="alignment"):
        merged_model(SafeMerge(), tmp_path, models={**ROLES, "unaligned": ALIGNED})
    with pytest.raises(StageError, match="q_proj"):
        merged_model(SafeMerge(), tmp_path, models={**ROLES, "unaligned": tiny_model(hidden=48)})
    bad = SafeMerge(tau=2.0, tuned_weight=-1.0, safety_rows=0, epochs=0.0, learning_rate=0.0)
    names = ["tau", "tuned_weight", "safety_rows", "epochs", "learning_rate"]
    assert [fault[0] for fault in bad.check()] == names
