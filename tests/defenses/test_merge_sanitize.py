"""Merging against a plain mean of whole weights, and its control against plain shrinking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.merge_sanitize import MergeSanitize
from ftsec_ray.defenses.shrink import Shrink
from ftsec_ray.errors import StageError
from ftsec_ray.execute.stage_job import change
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.precision import widened
from tests.defenses.shared import context, in_bfloat16, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}
BANK = {f"clean_bank:{i}": tiny_adapter(START, seed=10 + i) for i in range(3)}
ROLES = {"start": START, **BANK}


def made(method, tmp_path, kind="adapter", models=ROLES):
    ctx = context(tmp_path, models=models)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("bank", [1, 3])
def test_it_is_the_uniform_mean_of_the_tuned_model_and_its_partners(kind, bank, tmp_path):
    got, ctx = made(MergeSanitize(bank=bank), tmp_path, kind)
    members = [whole(TUNED[kind]), *(whole(BANK[f"clean_bank:{i}"]) for i in range(bank))]
    want = {name: sum(m[name] for m in members) / len(members) for name in members[0]}
    assert_same(whole(got), want)
    assert not got.has_adapter
    assert ctx.notes["partners"] == bank
    moved = sum(np.square(want[n] - members[0][n]).sum() for n in want) ** 0.5
    assert ctx.notes["change_norm"] == pytest.approx(moved)


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("bank", [1, 2])
def test_its_control_is_shrinking_by_the_same_factor(kind, bank, tmp_path):
    got, _ = made(MergeSanitize(bank=bank, partners="start"), tmp_path, kind)
    shrunk = Shrink(gamma=1 / (bank + 1)).revise_model(
        copy_model(TUNED[kind]), context(tmp_path, models=ROLES)
    )
    assert_same(whole(got), whole(shrunk))


def test_the_weight_of_the_partners_goes_from_nothing_to_all(tmp_path):
    tuned, other = whole(TUNED["full"]), whole(BANK["clean_bank:0"])
    for share in (0.25, 1.0):
        got, _ = made(MergeSanitize(bank=1, weight=share), tmp_path, "full")
        assert_same(whole(got), {n: tuned[n] + share * (other[n] - tuned[n]) for n in tuned})
    got, ctx = made(MergeSanitize(weight=0.0), tmp_path)
    assert got.has_adapter
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(TUNED["adapter"]).items())
    assert ctx.notes["change_norm"] == 0.0


def test_a_weight_that_nobody_trained_keeps_its_bits(tmp_path):
    # a sixth of a number, six times, is not always the number
    bank = {f"clean_bank:{i}": BANK[f"clean_bank:{i % 3}"] for i in range(6)}
    got, _ = made(MergeSanitize(bank=6), tmp_path, models={"start": START, **bank})
    got, start, kept = whole(got), whole(START), 0
    for name in (n for n in start if not n.endswith("_proj.weight")):
        assert np.array_equal(got[name], start[name]), name
        kept += 1
    assert kept > 0


def test_adapters_on_a_bfloat16_base_are_averaged_before_rounding(tmp_path):
    start = in_bfloat16(tiny_model(seed=0))
    tuned, *bank = (tiny_adapter(start, seed=seed) for seed in (1, 10, 11))
    roles = {"start": start, **{f"clean_bank:{i}": one for i, one in enumerate(bank)}}
    got, _ = change(MergeSanitize(), "revise_model", tuned, context(tmp_path, models=roles))
    members = [whole(widened(one)) for one in (tuned, *bank)]
    for name, weight in got.model.named_parameters():
        exact = torch.tensor(sum(member[name] for member in members) / 3)
        assert torch.equal(weight, exact.bfloat16()), name
    assert all(one.has_adapter for one in (tuned, *bank))


def test_a_partner_of_another_shape_is_named_and_parameters_are_checked(tmp_path):
    wide = {**ROLES, "clean_bank:0": tiny_model(hidden=48)}
    with pytest.raises(StageError, match="embed_tokens"):
        made(MergeSanitize(bank=1), tmp_path, models=wide)
    assert [fault[0] for fault in MergeSanitize(bank=0, weight=1.5).check()] == ["bank", "weight"]
    assert MergeSanitize().needs() == {"clean_bank", "start"}
    assert MergeSanitize(partners="start").needs() == {"start"}


def test_a_model_in_bfloat16_keeps_its_dtype(tmp_path):
    start, tuned = tiny_model(seed=0), tiny_full(tiny_model(seed=0))
    for loaded in (start, tuned):
        loaded.model.to(torch.bfloat16)
    ctx = context(tmp_path, models={"start": start})
    got, lost = change(MergeSanitize(partners="start"), "revise_model", tuned, ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < lost < 0.5
