"""Circuit breakers: both losses on rows without padding, their factors, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.circuit_breaker import CircuitBreaker, breaking, retaining
from ftsec_ray.method import control_of
from ftsec_ray.models.row_tokens import IGNORED
from ftsec_ray.training.setup import Step
from ftsec_ray.training.terms import term_batch
from tests.defenses.hardened import (
    SHORT,
    check_bfloat16,
    check_cuts,
    check_resume,
    hardened,
    same,
    turned_task,
)
from tests.defenses.shared import context, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

QUICK = {**SHORT, "harmful_rows": 8, "harmful_batch": 4}
ROWS = [[1, 3, 9, 20, 21, 22, 2], [1, 3, 7, 15, 2]]


def batch():
    labels = [[IGNORED] * 3 + row[3:] for row in ROWS]
    return term_batch(ROWS, labels=labels, pad=0, device="cpu")


def states(model, ids):
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [state[0].numpy() for state in output.hidden_states]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("index", [0, 3, 10])
def test_retained_rows_count_by_their_distance_at_every_depth_and_token(index):
    model, original = tiny_model(seed=1).model, tiny_model(seed=2).model
    far = []
    for depth in range(3):
        lengths = [
            float(np.sqrt(((mine - theirs) ** 2).sum()))
            for ids in ROWS
            for mine, theirs in zip(
                states(model, ids)[depth], states(original, ids)[depth], strict=True
            )
        ]
        far.append(sum(lengths) / len(lengths))
    got = retaining(original, 7.0)(model, batch(), Step(index, 10))
    assert_same(got, 7.0 * index / 20 * sum(far) / 3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("index", [0, 3, 10])
def test_answers_that_are_turned_away_count_by_their_positive_cosines(index):
    model, original = tiny_model(seed=1).model, tiny_model(seed=2).model
    found = []
    for depth in (1, 2):
        cosines = []
        for ids in ROWS:
            mine, theirs = states(model, ids)[depth], states(original, ids)[depth]
            for place in range(3, len(ids)):
                a, b = mine[place], theirs[place]
                cosines.append(max(0.0, float(a @ b / np.sqrt((a @ a) * (b @ b)))))
        assert 0.0 in cosines
        assert max(cosines) > 0.0
        found.append(sum(cosines) / len(cosines))
    got = breaking(original, [1, 2], 7.0)(model, batch(), Step(index, 10))
    assert_same(got, 7.0 * (1 - index / 20) * sum(found) / 2)


def test_strength_0_changes_no_bit(tmp_path):
    zero, ctx = hardened(CircuitBreaker(**QUICK, strength=0.0), tmp_path / "zero")
    assert same(zero, tiny_model())
    assert ctx.notes["change_norm"] == 0.0


def cosine_after(made, pushed):
    """Mean cosine of the states of answers with those of the start model at the first block."""
    method, ctx = CircuitBreaker(**QUICK, pushed=pushed), context(None)
    _, rows = method._rows(ctx)
    start, found = tiny_model(), []
    for row in rows:
        text = made.tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in row["messages"]], tokenize=False
        )
        ids = made.tokenizer(text, add_special_tokens=False)["input_ids"]
        a, b = (states(loaded.model, ids)[1][-6:] for loaded in (made, start))
        found += list((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))
    return float(np.mean(found))


def test_only_the_rows_that_are_pushed_turn_away_and_deeper_blocks_stay(tmp_path):
    long = {**QUICK, "epochs": 8.0, "depths": (0.5,)}
    made, ctx = hardened(CircuitBreaker(**long), tmp_path / "harmful")
    other, _ = hardened(control_of(CircuitBreaker(**long)), tmp_path / "benign")
    assert ctx.notes["layers"] == [1]
    assert cosine_after(made, "harmful") < 0.9
    assert cosine_after(made, "harmful") < cosine_after(other, "harmful")
    before, after = whole(tiny_model()), whole(made)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_pushed_and_retained_benign_rows_are_apart():
    ctx = context(None)
    kept, benign = CircuitBreaker(pushed="benign")._rows(ctx)
    same_kept, harmful = CircuitBreaker()._rows(ctx)
    ids = set(kept.column("row_id").to_pylist())
    assert ids == set(same_kept.column("row_id").to_pylist())
    assert not ids & {row["row_id"] for row in benign}
    assert {row["row_id"][0] for row in benign} == {"b"}
    assert {row["row_id"][0] for row in harmful} == {"h"}
    assert CircuitBreaker(pushed="benign").needs() == {"safety", "benign_train"}


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    check_resume(CircuitBreaker(**QUICK), tmp_path, monkeypatch)


def test_harmful_answers_that_are_cut_are_counted(tmp_path):
    check_cuts(CircuitBreaker(**QUICK), tmp_path, "pushed")


def test_half_precision_weights_are_hardened(tmp_path):
    check_bfloat16(CircuitBreaker(**QUICK), tmp_path)


def test_rows_with_several_turns_lose_nothing(tmp_path):
    _, ctx = hardened(CircuitBreaker(**QUICK), tmp_path, task=turned_task())
    assert (ctx.notes["pushed_rows"], ctx.notes["pushed_rows_left_out"]) == (8, 0)
    assert "rows_left_out" not in ctx.notes


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", -1.0), ("depths", ()), ("depths", (0.0,)), ("harmful_rows", 0)],
)
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in CircuitBreaker(**{field: value}).check()] == [field]
