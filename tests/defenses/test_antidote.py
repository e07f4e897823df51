"""Antidote against loops over outputs, its controls, and where nothing may change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.antidote import Antidote
from ftsec_ray.execute.stage_job import change
from ftsec_ray.models.load import copy_model
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.defenses.test_wanda import sizes_by_hand
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}


def pruned(method, tmp_path, kind="full", *, seed=0):
    ctx = context(tmp_path, models={"start": START}, seed=seed)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize(
    "params",
    [{}, {"prune": "weight"}, {"mask": "benign"}, {"tokens": "answer", "share": 0.3}],
)
def test_of_every_output_exactly_the_highest_scores_are_taken_back(kind, params, tmp_path):
    method = Antidote(rows=4, **params)
    got, ctx = pruned(method, tmp_path, kind)
    split = {"harmful": "harmful_train", "benign": "benign_train"}[method.mask]
    by = {"harmful": "harmful_tuning", "benign": "antidote"}[method.mask]
    rows = ctx.shuffled(split, by)[:: -1 if method.mask == "harmful" else 1][:4]
    sizes = sizes_by_hand(TUNED[kind], rows, answer_only=method.tokens == "answer")
    start, tuned, want, removed = whole(START), whole(TUNED[kind]), whole(TUNED[kind]), 0
    for name in (n for n in tuned if n.endswith("_proj.weight")):
        scored = tuned[name] - (start[name] if method.prune == "update" else 0.0)
        for out, row in enumerate(np.abs(scored) * sizes[name.removesuffix(".weight")]):
            top = np.argsort(-row, kind="stable")[: int(method.share * len(row))]
            want[name][out, top] = start[name][out, top] if method.prune == "update" else 0.0
            removed += len(top)
    assert_same(whole(got), want)
    assert ctx.notes["removed"] == removed > 0
    moved = sum(np.square(want[n] - tuned[n]).sum() for n in tuned) ** 0.5
    update = sum(np.square(start[n] - tuned[n]).sum() for n in tuned) ** 0.5
    assert ctx.notes["change_norm"] == pytest.approx(moved)
    assert ctx.notes["update_norm"] == pytest.approx(update)


def test_entries_that_are_kept_and_weights_outside_the_blocks_keep_their_bits(tmp_path):
    got = whole(pruned(Antidote(), tmp_path)[0])
    start, tuned = whole(START), whole(TUNED["full"])
    for name in tuned:
        back = got[name] != tuned[name]
        assert np.array_equal(got[name][back], start[name][back])
        assert back.any() == name.endswith("_proj.weight")


def test_the_control_takes_back_as_many_random_entries_of_every_output(tmp_path):
    made = [
        pruned(Antidote(share=0.25, mask=mask), tmp_path, seed=seed)
        for mask, seed in (("harmful", 0), ("random", 0), ("random", 1))
    ]
    assert len({ctx.notes["removed"] for _, ctx in made}) == 1
    tuned = whole(TUNED["full"])
    masks = [{n: whole(m)[n] != w for n, w in tuned.items() if "_proj" in n} for m, _ in made]
    for name, mask in masks[0].items():
        assert np.array_equal(mask.sum(1), masks[1][name].sum(1))
        assert not np.array_equal(mask, masks[1][name])
        assert not np.array_equal(masks[1][name], masks[2][name])


def test_a_share_of_zero_changes_no_bit_and_a_share_of_one_gives_the_start_in_the_blocks(tmp_path):
    got, _ = pruned(Antidote(share=0.0), tmp_path, "adapter")
    assert got.has_adapter
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(TUNED["adapter"]).items())
    got = whole(pruned(Antidote(share=1.0), tmp_path, "adapter")[0])
    assert all(np.array_equal(w, got[n]) for n, w in whole(START).items())


def test_it_needs_only_what_its_mask_reads():
    assert Antidote().needs() == {"start", "harmful_train"}
    assert Antidote(mask="benign").needs() == {"start", "benign_train"}
    assert Antidote(mask="random").needs() == {"start"}
    assert [fault[0] for fault in Antidote(share=-0.1, rows=0).check()] == ["share", "rows"]


def test_a_model_in_bfloat16_keeps_its_dtype(tmp_path):
    start, tuned = tiny_model(seed=0), tiny_full(tiny_model(seed=0))
    for loaded in (start, tuned):
        loaded.model.to(torch.bfloat16)
    ctx = context(tmp_path, models={"start": start})
    got, lost = change(Antidote(), "revise_model", tuned, ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert lost == 0.0  # the start's and the tuned weights need no rounding
