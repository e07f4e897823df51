"""Safe Delta against inverses of sub-matrices, column by column, and its ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.conversation import asked, message
from ftsec_ray.defenses.safe_delta import SafeDelta, inverse_root
from ftsec_ray.errors import DataError
from ftsec_ray.execute.stage_job import change
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.row_tokens import encode_rows
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}


def repaired(method, tmp_path, kind="full", *, seed=0, task=None):
    ctx = context(tmp_path, models={"start": START}, seed=seed, task=task)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


def moments_by_hand(rows):
    """Damped 2/n sum of x x^T of every projection's inputs in the start model."""
    seen, sums = {}, {}
    handles = [
        m.register_forward_hook(lambda _m, given, _o, n=n: seen.update({n: given[0][0]}))
        for n, m in START.model.named_modules()
        if n.endswith("_proj")
    ]
    for ids, _ in encode_rows(START.tokenizer, rows, max_length=64):
        with torch.no_grad():
            START.model(input_ids=torch.tensor([ids]))
        for name, states in seen.items():
            for x in states.numpy():
                sums[name] = sums.get(name, 0.0) + 2.0 / len(rows) * np.outer(x, x)
    for handle in handles:
        handle.remove()
    return {n: H + 0.01 * np.mean(np.diag(H)) * np.eye(len(H)) for n, H in sums.items()}


def weight_by_hand(start, tuned, H, method):
    """Optimal brain surgery: after each column, the exact answer for the remaining columns."""
    W, width = start.copy(), start.shape[1]
    for first in range(0, width, method.block):
        last = min(first + method.block, width)
        # price of moving column j once those before it are fixed
        price = [1 / np.linalg.inv(H[j:, j:])[0, 0] for j in range(first, last)]
        cost = [
            (price[j - first], i, j, price[j - first] * (tuned[i, j] - W[i, j]) ** 2)
            for i in range(len(W))
            for j in range(first, last)
        ]
        cost.sort(key=lambda entry: entry[:3])
        budget = (
            method.s * sum(c for *_, c in cost)
            if method.budget == "share"
            else np.mean(price) * method.s / 2 * len(W) / 4096
        )
        taken, spent = set(), 0.0
        for _, i, j, c in cost[: len(cost) - int(method.keep_back * len(cost))]:
            spent += c
            if spent > budget:
                break
            taken.add((i, j))
        for j in range(first, last):
            inverse = np.linalg.inv(H[j:, j:])
            for i in range(len(W)):
                if (i, j) in taken:
                    moved = W[i, j] - tuned[i, j]
                    W[i, j] = tuned[i, j]
                    if method.compensate:
                        W[i, j + 1 :] -= moved * inverse[0, 1:] / inverse[0, 0]
    return W


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize(
    "params",
    [
        {"s": 0.3},
        {"s": 0.3, "block": 12},
        {"s": 0.6, "compensate": False},
        {"s": 2000.0, "budget": "code"},
    ],
)
def test_it_equals_the_column_by_column_version(kind, params, tmp_path):
    method = SafeDelta(rows=5, **params)
    got, ctx = repaired(method, tmp_path, kind)
    H = moments_by_hand(ctx.shuffled("safety", "safe_delta")[:5])
    start, tuned, got = whole(START), whole(TUNED[kind]), whole(got)
    changed = 0
    for name in start:
        if not name.endswith("_proj.weight"):
            assert np.array_equal(got[name], start[name])
            continue
        want = weight_by_hand(start[name], tuned[name], H[name.removesuffix(".weight")], method)
        # with few rows H is near its damping, so that inverses lose about five digits
        assert_same(got[name], want, rel=1e-7)
        changed += int((want != start[name]).any())
    assert changed == 14
    assert 0 < ctx.notes["taken"] < ctx.notes["entries"]


def test_with_equal_prices_and_no_compensation_the_cheapest_is_the_first_within_the_budget():
    aligned, tuned = torch.zeros(2, 3), torch.tensor([[3.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
    mask = SafeDelta(s=0.625, keep_back=0.0).mask(aligned, tuned, torch.ones(3))
    # squares 9 1 4 1 0 1, together 16: the budget of 10 holds the first two
    assert mask.tolist() == [[True, True, False], [False, False, False]]
    mask = SafeDelta(s=0.5, keep_back=0.0).mask(aligned, tuned, torch.tensor([9.0, 1.0, 1.0]))
    # costs 81 1 4 9 0 1 in the order of prices 1 4 0 1 81 9, together 96: the budget is 48
    assert mask.tolist() == [[False, True, True], [False, True, True]]
    mask = SafeDelta(s=1.0, keep_back=0.5).mask(aligned, tuned, torch.tensor([9.0, 1.0, 1.0]))
    assert mask.sum() == 3


@pytest.mark.parametrize("kind", TUNED)
def test_no_budget_gives_the_start_bit_for_bit_and_all_of_it_the_tuned_layers(kind, tmp_path):
    got, ctx = repaired(SafeDelta(s=0.0), tmp_path, kind)
    assert all(np.array_equal(w, whole(got)[n]) for n, w in whole(START).items())
    assert ctx.notes["taken"] == 0
    got = whole(repaired(SafeDelta(s=1.0, keep_back=0.0), tmp_path, kind)[0])
    for name, weight in whole(TUNED[kind]).items():
        want = weight if name.endswith("_proj.weight") else whole(START)[name]
        assert np.array_equal(got[name], want)


def test_compensation_keeps_the_outputs_on_the_safe_rows_closer_to_the_starts(tmp_path):
    errors = []
    H = moments_by_hand(context(tmp_path).shuffled("safety", "safe_delta")[:12])
    for compensate in (True, False):
        got = whole(repaired(SafeDelta(s=0.5, compensate=compensate), tmp_path)[0])
        deltas = {n: got[f"{n}.weight"] - whole(START)[f"{n}.weight"] for n in H}
        errors.append(sum(np.trace(d @ H[n] @ d.T) for n, d in deltas.items()))
    assert errors[0] < 0.9 * errors[1]


def test_the_control_takes_as_many_random_entries(tmp_path):
    made = [
        repaired(SafeDelta(select=select, compensate=False), tmp_path, seed=seed)
        for select, seed in (("cost", 0), ("random", 0), ("random", 1))
    ]
    assert len({ctx.notes["taken"] for _, ctx in made}) == 1
    start = whole(START)
    masks = [{n: whole(m)[n] != w for n, w in start.items() if "_proj" in n} for m, _ in made]
    for name, mask in masks[0].items():
        assert mask.sum() == masks[1][name].sum()
        assert not np.array_equal(mask, masks[1][name])
        assert not np.array_equal(masks[1][name], masks[2][name])


def test_an_input_that_is_always_zero_does_not_break_the_inverse():
    H = torch.diag(torch.tensor([2.0, 0.0, 3.0]))
    root = inverse_root(H)
    damped = torch.diag(torch.tensor([2.0, 1.0, 3.0])) + 0.02 * torch.eye(3)
    assert_same(root.T @ root @ damped, torch.eye(3))


def test_rows_of_several_turns_count_and_rows_without_answers_are_refused(tmp_path):
    task = tiny_task()
    rows = task.split("safety").to_pylist()
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take it")]
    longer = [{**row, "messages": [*turns, *row["messages"]]} for row in rows]
    other = replace(task, splits={**task.splits, "safety": table(longer)})
    assert repaired(SafeDelta(), tmp_path, task=other)[1].notes["safety_rows"] == len(rows)
    silent = [{**row, "messages": asked(row)} for row in rows]
    other = replace(task, splits={**task.splits, "safety": table(silent)})
    with pytest.raises(DataError, match="'safety'"):
        repaired(SafeDelta(), tmp_path, task=other)


def test_a_model_in_bfloat16_keeps_its_dtype_and_parameters_are_checked(tmp_path):
    start, tuned = tiny_model(seed=0), tiny_full(tiny_model(seed=0))
    for loaded in (start, tuned):
        loaded.model.to(torch.bfloat16)
    ctx = context(tmp_path, models={"start": start})
    got, lost = change(SafeDelta(), "revise_model", tuned, ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert 0.0 < lost < 0.5
    bad = SafeDelta(s=-1.0, keep_back=2.0, block=0, rows=0).check()
    assert [fault[0] for fault in bad] == ["s", "keep_back", "block", "rows"]
