"""Wanda pruning against loops over outputs, its control, and where nothing may change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.conversation import asked, message
from ftsec_ray.defenses.wanda import Wanda
from ftsec_ray.errors import DataError
from ftsec_ray.execute.stage_job import change
from ftsec_ray.models.load import copy_model, merged
from ftsec_ray.models.row_tokens import encode_rows
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.numeric import in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}


def sizes_by_hand(loaded, rows, *, answer_only):
    """Root mean square of every input of every projection, token by token."""
    plain, seen, squares, tokens = merged(loaded), {}, {}, 0
    handles = [
        module.register_forward_hook(lambda _m, given, _o, name=name: seen.update({name: given[0]}))
        for name, module in plain.model.named_modules()
        if name.endswith("_proj")
    ]
    for ids, labels in encode_rows(plain.tokenizer, rows, max_length=64):
        with torch.no_grad():
            plain.model(input_ids=torch.tensor([ids]))
        for place, label in enumerate(labels):
            if answer_only and label == -100:
                continue
            tokens += 1
            for name, states in seen.items():
                squares[name] = squares.get(name, 0.0) + states[0, place].numpy() ** 2
    for handle in handles:
        handle.remove()
    return {name: np.sqrt(total / tokens) for name, total in squares.items()}


def pruned(method, tmp_path, kind="full", **given):
    ctx = context(tmp_path, **given)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize(
    "params", [{}, {"tokens": "answer"}, {"share": 0.3}, {"score": "magnitude"}]
)
def test_of_every_output_exactly_the_lowest_scores_are_zero(kind, params, tmp_path):
    method = Wanda(rows=5, **params)
    got, ctx = pruned(method, tmp_path, kind)
    rows = ctx.shuffled("benign_train", "wanda")[:5]
    sizes = sizes_by_hand(TUNED[kind], rows, answer_only=method.tokens == "answer")
    tuned, got, zeros = whole(TUNED[kind]), whole(got), 0
    for name, weight in tuned.items():
        if not name.endswith("_proj.weight"):
            assert np.array_equal(weight, got[name])
            continue
        size = sizes[name.removesuffix(".weight")] if method.score == "wanda" else 1.0
        for out, row in enumerate(np.abs(weight) * size):
            lowest = np.argsort(row, kind="stable")[: int(method.share * len(row))]
            want = weight[out].copy()
            want[lowest] = 0.0
            assert np.array_equal(got[name][out], want), (name, out)
            zeros += len(lowest)
    assert ctx.notes["pruned"] == zeros
    moved = sum(np.square(got[n] - tuned[n]).sum() for n in tuned) ** 0.5
    assert ctx.notes["change_norm"] == pytest.approx(moved)


def test_the_control_zeroes_as_many_weights_of_every_output_at_random(tmp_path):
    one, ctx = pruned(Wanda(share=0.25), tmp_path)
    other, control = pruned(Wanda(share=0.25, random_weights=True), tmp_path)
    again, _ = pruned(Wanda(share=0.25, random_weights=True), tmp_path, seed=1)
    assert ctx.notes["pruned"] == control.notes["pruned"] > 0
    masks = [{n: w == 0 for n, w in whole(m).items() if "_proj" in n} for m in (one, other, again)]
    for name, mask in masks[0].items():
        assert np.array_equal(mask.sum(1), masks[1][name].sum(1))
        assert not np.array_equal(mask, masks[1][name])
        assert not np.array_equal(masks[1][name], masks[2][name])


@pytest.mark.parametrize("params", [{"share": 0.0}, {"share": 0.0, "random_weights": True}])
def test_a_share_of_zero_changes_no_bit_and_keeps_the_adapter(params, tmp_path):
    got, ctx = pruned(Wanda(**params), tmp_path, "adapter")
    assert got.has_adapter
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(TUNED["adapter"]).items())
    assert ctx.notes["change_norm"] == 0.0


def test_rows_of_several_turns_count_and_rows_without_answers_are_refused(tmp_path):
    task = tiny_task()
    rows = task.split("trusted").to_pylist()
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take it")]
    longer = [{**row, "messages": [*turns, *row["messages"]]} for row in rows]
    other = replace(task, splits={**task.splits, "trusted": table(longer)})
    method = Wanda(split="trusted")
    assert method.needs() == {"trusted"}
    assert Wanda(score="magnitude").needs() == frozenset()
    _, ctx = pruned(method, tmp_path, task=other)
    assert ctx.notes["trusted_rows"] == len(rows)
    silent = [{**row, "messages": asked(row)} for row in rows]
    other = replace(task, splits={**task.splits, "trusted": table(silent)})
    with pytest.raises(DataError, match="'trusted'"):
        pruned(method, tmp_path, task=other)


def test_a_model_in_bfloat16_keeps_its_dtype_and_its_other_weights(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    got, lost = change(Wanda(), "revise_model", start, context(tmp_path))
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert lost == 0.0  # zero and the old weights need no rounding
    assert not any(m._forward_pre_hooks for m in got.model.modules())


def test_parameters_out_of_range_are_named():
    assert [fault[0] for fault in Wanda(share=1.5, rows=0).check()] == ["share", "rows"]
