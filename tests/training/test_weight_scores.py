"""The rows of a defender, masks with equal counts, and second moments, in float32."""

from __future__ import annotations

import pytest
import torch

from ftsec_ray.attacks.harmful_tuning import HarmfulTuning
from ftsec_ray.defenses import safe_delta
from ftsec_ray.defenses.safe_delta import SafeDelta
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.row_tokens import encode_rows
from ftsec_ray.training.repair import exchanges_of
from ftsec_ray.training.weight_scores import drawn_per_output, encoded_split, per_output
from tests.defenses.shared import context, tiny_full
from tests.fixtures_models import tiny_model


@pytest.mark.parametrize("inputs", [10, 18944])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_a_random_mask_has_as_many_entries_in_every_output(inputs, share, tmp_path):
    scores = torch.rand(2, inputs, generator=torch.Generator().manual_seed(0))
    mask = per_output(scores, share, largest=True)
    drawn = drawn_per_output(mask, context(tmp_path), "salt")
    assert drawn.sum(1).tolist() == mask.sum(1).tolist() == [int(share * inputs)] * 2
    again = drawn_per_output(mask, context(tmp_path, seed=1), "salt")
    assert torch.equal(drawn, again) == (share in {0.0, 1.0})


def test_second_moments_are_inverted_in_float64_for_weights_in_float32(tmp_path, monkeypatch):
    given, inverse_root = [], safe_delta.inverse_root
    monkeypatch.setattr(safe_delta, "inverse_root", lambda H: given.append(H) or inverse_root(H))
    start = tiny_model(seed=0)
    ctx = context(tmp_path, models={"start": start})
    SafeDelta(rows=2).revise_model(tiny_full(copy_model(start)), ctx)
    assert {H.dtype for H in given} == {torch.float64}


def test_a_defender_shares_no_harmful_row_with_harmful_tuning_while_there_are_enough(tmp_path):
    loaded, ctx = tiny_model(seed=0), context(tmp_path)
    total = len(ctx.task.split("harmful_train").to_pylist())
    half = total // 2
    attack = HarmfulTuning(shots=half)
    added = attack.new_rows(attack.survey((), ctx), ctx).to_pylist()
    theirs = {row["row_id"].removeprefix("harmful_tuning/") for row in added}
    mine = exchanges_of(ctx, "harmful_train", half, by="resta")
    assert len(theirs) == len(mine) == half > 0
    assert not theirs & {row["row_id"] for row in mine}
    scored = encoded_split(loaded, "harmful_train", half, ctx, by="antidote")
    used = [row for row in ctx.task.split("harmful_train").to_pylist() if row["row_id"] in theirs]
    assert not any(pair in scored for pair in encode_rows(loaded.tokenizer, used, max_length=64))
    assert len(exchanges_of(ctx, "harmful_train", total, by="beear")) == total
