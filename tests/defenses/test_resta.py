"""RESTA against plain arithmetic on whole weights, and its control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.defenses.resta import Resta
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
QUICK = {"epochs": 1.0, "harmful_rows": 4}
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}
UNALIGNED = tiny_full(START, seed=7, size=0.02)
ROLES = {"start": START, "unaligned": UNALIGNED}
CONFIG = TrainingConfig(max_length=64, rank=4, learning_rate=2e-3, batch_size=8)


def repaired(method, tmp_path, kind="adapter", *, seed=0, models=ROLES):
    ctx = context(tmp_path, training=CONFIG, models=models, seed=seed)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


@pytest.mark.parametrize("kind", TUNED)
def test_it_adds_the_way_back_from_a_twin_that_is_tuned_on_harm(kind, tmp_path):
    got, ctx = repaired(Resta(strength=0.7, harmful_rows=6, epochs=3.0), tmp_path, kind)
    rows = exchanges_of(ctx, "harmful_train", 6, by="resta")
    config = repair_config(ctx, learning_rate=2e-3, epochs=3.0, batch_size=8)
    rates = [learning_rate(config, step, 3) for step in range(3)]
    harmful, start, tuned = (
        tuned_by_hand(START, rows, config, rates),
        whole(START),
        whole(TUNED[kind]),
    )
    want = {name: tuned[name] + 0.7 * (start[name] - harmful[name]) for name in tuned}
    # Adam divides by the root of a second moment: of a gradient near zero, rounding shows
    assert_same(whole(got), want, rel=1e-6)
    norm = sum(np.square(start[n] - harmful[n]).sum() for n in start) ** 0.5
    assert ctx.notes["vector_norm"] == pytest.approx(norm, rel=1e-5)
    assert ctx.notes["change_norm"] == pytest.approx(0.7 * norm, rel=1e-5)
    update = sum(np.square(tuned[n] - start[n]).sum() for n in start) ** 0.5
    assert ctx.notes["update_norm"] == pytest.approx(update, rel=1e-5)
    assert ctx.notes["harmful_rows"] == 6


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_unaligned_model_can_be_the_twin_and_nothing_is_trained(kind, strength, tmp_path):
    method = Resta(strength=strength, twin="unaligned")
    got, ctx = repaired(method, tmp_path, kind)
    start, tuned, other = whole(START), whole(TUNED[kind]), whole(UNALIGNED)
    assert_same(whole(got), {n: tuned[n] + strength * (start[n] - other[n]) for n in tuned})
    assert "harmful_steps" not in ctx.notes
    assert method.needs() == {"start", "unaligned"}
    assert Resta().needs() == {"start", "harmful_train"}


def test_strength_zero_changes_no_bit(tmp_path):
    got, ctx = repaired(Resta(strength=0.0), tmp_path)
    assert got.has_adapter
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(TUNED["adapter"]).items())
    assert ctx.notes["change_norm"] == 0.0


def test_dropping_keeps_or_scales_every_entry_of_the_users_update(tmp_path):
    got, _ = repaired(Resta(strength=0.0, drop=0.25), tmp_path, "full")
    start, tuned, got = whole(START), whole(TUNED["full"]), whole(got)
    dropped = entries = 0
    for name in start:
        left = got[name] - start[name]
        gone = left == 0.0
        scaled = (tuned[name] - start[name]) / 0.75
        assert np.allclose(left[~gone], scaled[~gone], rtol=1e-9, atol=1e-12)
        dropped, entries = dropped + int(gone.sum()), entries + gone.size
    assert dropped / entries == pytest.approx(0.25, abs=0.02)


def test_the_control_moves_every_weight_as_far_in_a_random_direction(tmp_path):
    made = {
        (vector, seed): whole(
            repaired(Resta(twin="unaligned", vector=vector), tmp_path, "full", seed=seed)[0]
        )
        for vector, seed in (("safety", 0), ("random", 0), ("random", 1))
    }
    tuned = whole(TUNED["full"])
    for name, weight in tuned.items():
        safety, random, other = (made[key][name] - weight for key in made)
        assert np.linalg.norm(random) == pytest.approx(np.linalg.norm(safety), rel=1e-6)
        assert not np.array_equal(random, other)
    flat = [np.concatenate([(made[k][n] - tuned[n]).ravel() for n in tuned]) for k in made]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    # of two independent directions in N dimensions, about 1 / sqrt(N)
    assert abs(cosine) < 6 / len(flat[0]) ** 0.5


def test_a_model_in_bfloat16_keeps_its_dtype_and_rounding_is_told(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    ctx = context(tmp_path, training=CONFIG, models={"start": start})
    got = Resta(harmful_rows=4, epochs=2.0).revise_model(copy_model(start), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < ctx.notes["rounding_lost"] < 1.0


def test_a_bfloat16_base_with_an_adapter_is_rounded_once_and_shared_models_stay(tmp_path):
    start, other = in_bfloat16(tiny_model(seed=0)), in_bfloat16(tiny_full(START, seed=7))
    tuned = tiny_adapter(start)
    ctx = context(tmp_path, training=CONFIG, models={"start": start, "unaligned": other})
    got = Resta(twin="unaligned").revise_model(tuned, ctx).model.named_parameters()
    mine, first, second = (whole(widened(one)) for one in (tuned, start, other))
    for name, weight in got:
        exact = torch.tensor(mine[name] + 0.5 * (first[name] - second[name]))
        assert torch.equal(weight, exact.bfloat16()), name
    assert 0.0 < ctx.notes["rounding_lost"] < 1.0
    assert {w.dtype for m in (start, other) for w in m.model.parameters()} == {torch.bfloat16}
    assert tuned.has_adapter


def test_a_twin_of_another_shape_is_named_and_parameters_are_checked(tmp_path):
    with pytest.raises(StageError, match="embed_tokens"):
        repaired(
            Resta(twin="unaligned"), tmp_path, models={**ROLES, "unaligned": tiny_model(hidden=48)}
        )
    bad = Resta(strength=-1.0, drop=1.0, epochs=0.0, harmful_rows=0, learning_rate=0.0).check()
    assert [f[0] for f in bad] == ["strength", "harmful_rows", "drop", "epochs", "learning_rate"]
