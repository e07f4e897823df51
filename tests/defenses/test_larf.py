"""LARF: scores against a loop over pairs, which rows go, and whose rows are no anchors."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.jailbreak_tuning import JailbreakTuning
from ftsec_ray.conversation import asked_text
from ftsec_ray.defenses.larf import Larf, anchor_scores
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.row_tokens import encode_row
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

QUICK = {"share": 0.1}


def cosine(a, b):
    return (
        sum(x * y for x, y in zip(a, b, strict=True))
        / math.dist(a, [0] * len(a))
        / (math.dist(b, [0] * len(b)))
    )


def slow_score(state, harmful, safe, nearest):
    gaps = [cosine(state, h) - cosine(state, s) for h, s in zip(harmful, safe, strict=True)]
    return sum(sorted(gaps)[-nearest:]) / min(nearest, len(gaps))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("nearest", [1, 3, 7, 100])
def test_the_scores_equal_a_loop_over_pairs_of_anchors(nearest):
    states, harmful, safe = drawn(9, 6), drawn(7, 6, seed=1), drawn(7, 6, seed=2)
    wanted = [slow_score(s.tolist(), harmful.tolist(), safe.tolist(), nearest) for s in states]
    assert_same(np.array(anchor_scores(states, harmful, safe, nearest)), np.array(wanted))


def test_the_mean_over_all_anchors_changes_its_sign_when_they_change_sides():
    states, harmful, safe = drawn(9, 6), drawn(7, 6, seed=1), drawn(7, 6, seed=2)
    there, back = (
        np.array(anchor_scores(states, *pair, 7)) for pair in ((harmful, safe), (safe, harmful))
    )
    assert_same(there, -back)
    assert np.abs(there).max() > 0.01


def slow_state(loaded, one, layer):
    """The output of a block at the last trained token, alone and without padding."""
    ids, labels = encode_row(loaded.tokenizer, one, max_length=64)
    assert labels[-1] == ids[-1]
    seen = []
    hook = loaded.model.model.layers[layer].register_forward_hook(
        lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([ids]))
    hook.remove()
    return seen[0].tolist()


@pytest.mark.usefixtures("float64")
def test_the_rows_of_the_highest_scores_go_and_the_others_keep_every_byte(tmp_path):
    loaded, given = in_float64(tiny_model()), sentiment_rows(20)
    rows = table(given)
    method = Larf(share=0.25, anchors=5, nearest=3, depth=0.0)
    ctx = context(tmp_path, models={"reference": loaded})
    anchors = [
        [slow_state(loaded, r, 0) for r in ctx.shuffled(split, "larf")[:5]]
        for split in ("harmful_train", "safety")
    ]
    scores = np.array([slow_score(slow_state(loaded, r, 0), *anchors, 3) for r in given])
    order = np.argsort(-scores, kind="stable")
    assert scores[order[4]] - scores[order[5]] > 1e-9, "no tie at the cut"
    got = method.craft_data(rows, ctx)
    assert got.equals(rows.filter([i not in order[:5] for i in range(20)]))
    assert (ctx.notes["anchors"], ctx.notes["layer"]) == (5, 0)
    assert ctx.notes["dropped_rows"] == ctx.notes["dropped_clean"] == 5
    assert_same(ctx.notes["score_max"], scores.max())


def test_a_row_like_the_harmful_anchors_is_dropped_before_others(tmp_path):
    pool = tiny_task().split("harmful_train").to_pylist()
    bad = [{**r, "row_id": f"x/{i}", "poisoned": True} for i, r in enumerate(pool[:3])]
    rows = table([*sentiment_rows(27), *bad])
    ctx = context(tmp_path, models={"reference": tiny_model()})
    Larf(share=0.1).craft_data(rows, ctx)
    assert ctx.notes["dropped_poisoned"] == 3
    assert ctx.notes["harmful_train_left_out"] == 3, "the attacker's own rows are no anchors"
    assert ctx.notes["anchors"] == 5


def test_the_attacker_s_rows_are_no_anchors_under_a_wrapper_either(tmp_path):
    users = table(sentiment_rows(20))
    rows = JailbreakTuning(shots=3).craft_data(users, context(tmp_path / "attack"))
    assert rows.num_rows == 23
    ctx = context(tmp_path, models={"reference": tiny_model()})
    Larf(share=0.1).craft_data(rows, ctx)
    assert (ctx.notes["harmful_train_left_out"], ctx.notes["anchors"]) == (3, 5)


@pytest.mark.parametrize("share", [0.0, 0.001])
def test_no_share_drops_nothing_and_loads_no_model(share, tmp_path):
    rows = table(sentiment_rows(20))
    assert Larf(share=share).craft_data(rows, context(tmp_path)).equals(rows)


def test_the_control_drops_as_many_random_rows_and_a_part_of_more(tmp_path):
    rows = table(sentiment_rows(40))
    left = {
        share: set(
            control_of(Larf(share=share)).craft_data(rows, context(tmp_path))["row_id"].to_pylist()
        )
        for share in (0.1, 0.5)
    }
    assert (len(left[0.1]), len(left[0.5])) == (36, 20)
    assert left[0.5] < left[0.1]
    assert control_of(Larf()).needs() == Larf(share=0.0).needs() == frozenset()


def test_rows_without_an_answer_stay_and_conversations_and_texts_are_read(tmp_path):
    rows = table([agent_row(), unanswered_row(), text_row(), row(9, "is " * 300, "good")])
    ctx = context(tmp_path, models={"reference": tiny_model()})
    got = Larf(share=0.75).craft_data(rows, ctx)
    assert got["row_id"].to_pylist() == ["a/1"]
    assert ctx.notes["unread_rows"] == 1


def test_rows_and_anchors_that_are_cut_are_counted(tmp_path):
    task = tiny_task()
    long = [{**r, **row(i, asked_text(r), "take the " * 60)}
            for i, r in enumerate(task.split("harmful_train").to_pylist())]  # fmt: skip
    task = replace(task, splits={**task.splits, "harmful_train": table(long)})
    users = table([*sentiment_rows(8), row(9, "is this red", "red " * 100)])
    ctx = context(tmp_path, models={"reference": tiny_model()}, task=task)
    Larf(share=0.2, anchors=5).craft_data(users, ctx)
    assert (ctx.notes["anchor_answers_cut"], ctx.notes["scored_answers_cut"]) == (5, 1)


def test_half_precision_weights_are_read_and_stay(tmp_path):
    loaded = tiny_model()
    loaded.model.to(torch.bfloat16)
    before = {n: w.clone() for n, w in loaded.model.named_parameters()}
    ctx = context(tmp_path, models={"reference": loaded})
    assert Larf(share=0.2).craft_data(table(sentiment_rows(20)), ctx).num_rows == 16
    assert all(torch.equal(w, before[n]) for n, w in loaded.model.named_parameters())


def test_a_task_whose_anchors_are_all_asked_is_refused(tmp_path):
    task = tiny_task()
    users = table([{**r, "row_id": f"x/{i}"}
                   for i, r in enumerate(task.split("harmful_train").to_pylist())])  # fmt: skip
    task = replace(task, splits={**task.splits, "harmful_train": users})
    assert all(asked_text(r) for r in users.to_pylist())
    with pytest.raises(DataError, match="no anchors"):
        Larf(share=0.5).craft_data(
            users, context(tmp_path, models={"reference": tiny_model()}, task=task)
        )


def test_parameters_out_of_range_are_named():
    wrong = Larf(share=1.0, anchors=0, nearest=0, depth=1.1).check()
    assert [f[0] for f in wrong] == ["anchors", "nearest", "share", "depth"]
    assert Larf(share=0.0).keeps_rows()
