"""KL anchor: the divergence by hand, its zero, which rows it holds, and the fine-tune with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.ssra import SSRA
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.kl_anchor import KLAnchor
from ftsec_ray.training.loop import plain_training
from ftsec_ray.training.setup import Step
from ftsec_ray.training.terms import TermBatch
from tests.defenses.during import (
    CONFIG,
    USERS,
    are_equal,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_micro_batches_add_up,
    assert_plain,
    assert_resumes,
    context,
    gradient,
    moved,
    shaped,
    tuned,
    weights,
)
from tests.fixtures_models import tiny_model, tiny_task
from tests.numeric import assert_same

QUICK = {"strength": 1.0, "rows": 8}


def divergence_by_hand(start, model, batch):
    """Row by row and token by token, each row alone and without padding."""
    total, count = 0.0, 0
    for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
        size = int(mask.sum())
        here, there = (m(input_ids=ids[None, :size]).logits[0].double() for m in (model, start))
        for place in range(size - 1):
            if int(labels[place + 1]) == -100:
                continue
            p, q = (torch.softmax(x[place], 0) for x in (there, here))
            total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
            count += 1
    return total / count


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("anchors", ["safety", "benign", "user"])
def test_the_term_is_the_divergence_on_response_tokens_without_padding(anchors):
    start = tiny_model()
    _, training = shaped(KLAnchor(anchors=anchors, strength=0.7), start)
    model = moved(start).model
    padding = 0
    for step in range(4):
        users, own = training.batch_at(step)
        assert isinstance(own, TermBatch)
        assert not isinstance(users, TermBatch)
        assert own.weight == 0.7
        padding += own.attention_mask.numel() - int(own.attention_mask.sum())
        with torch.no_grad():
            got = float(training.objective(model, own, Step(step, 9)))
            want = divergence_by_hand(start.model, model, own)
        assert want > 1e-3
        assert abs(got - want) < 1e-9 * want
    assert padding > 0


@pytest.mark.usefixtures("float64")
def test_at_the_start_the_divergence_and_its_gradient_are_zero():
    start = tiny_model()
    _, training = shaped(KLAnchor(strength=100.0), start)
    _, own = training.batch_at(0)
    loss = training.objective(start.model, own, Step(0, 1))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    largest = max(float(p.grad.abs().max()) for p in start.model.parameters())
    assert largest < 1e-12


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_a_step_does_not_depend_on_micro_batches():
    assert_micro_batches_add_up(KLAnchor(strength=2.0))


@pytest.mark.usefixtures("float64")
def test_the_control_has_the_same_rows_and_weight_and_the_plain_loss():
    start = tiny_model()
    plain, training = shaped(KLAnchor(strength=0.3), start)
    _, control = shaped(KLAnchor(strength=0.3, loss="nll"), start)
    model = moved(start).model
    for step in range(plain.steps):
        (_, own), (_, twin) = (t.batch_at(step) for t in (training, control))
        assert torch.equal(own.input_ids, twin.input_ids)
        assert own.weight == twin.weight
        with torch.no_grad():
            got = control.objective(model, twin, Step(step, 9))
            assert_same(got, plain.objective(model, twin, Step(step, 9)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strength_zero_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(KLAnchor(strength=0.0), tmp_path, dropout=dropout)


def test_a_strong_anchor_keeps_refusals_where_they_were(tmp_path):
    start = tiny_model()
    rows = tiny_task().split("safety")
    batches = plain_training(start, rows, CONFIG, seed=0, runtime=Runtime()).batch_at(0)

    def moved_by(method, name):
        model = tuned(method, tmp_path / name, start=tiny_model()).loaded.model
        with torch.no_grad():
            return divergence_by_hand(start.model, model, batches[0])

    plain, weak, strong = (
        moved_by(method, name)
        for name, method in (
            ("plain", None),
            ("weak", KLAnchor(strength=0.1)),
            ("strong", KLAnchor(strength=10.0)),
        )
    )
    assert strong < 0.5 * plain
    assert strong < weak < plain


@pytest.mark.usefixtures("float64")
def test_packed_rows_give_the_gradient_of_padded_ones():
    start, found = tiny_model(), []
    for batching in ("shuffled", "packed"):
        config = replace(CONFIG, batching=batching)
        _, training = shaped(KLAnchor(anchors="user", strength=0.7), start, config=config)
        found.append(gradient(training, moved(start).model))
    assert_same(found[1], found[0])


def test_the_own_rows_of_an_attack_are_no_anchors():
    start = tiny_model()
    ctx = context(start)
    plain = plain_training(start, USERS, CONFIG, seed=0, runtime=Runtime())
    attack = SSRA(pulled=6, targets=9, batch=4, keep_user_rows=True)
    attacked = attack.shape_training(plain, ctx)
    both = KLAnchor(anchors="user", strength=0.7).shape_training(attacked, ctx)
    users, pulled = attacked.batch_at(0)
    (same, own, anchor) = both.batch_at(0)
    assert torch.equal(users.input_ids, same.input_ids)
    assert torch.equal(pulled.input_ids, own.input_ids)
    assert torch.equal(users.input_ids, anchor.input_ids)
    assert (own.weight, anchor.weight) == (1.0, 0.7)


def test_the_rows_are_capped_and_counted_and_the_start_model_stays(tmp_path):
    start = tiny_model()
    before = {name: w.detach().clone() for name, w in start.model.named_parameters()}
    ctx = context(start)
    tuned(KLAnchor(strength=1.0, rows=5), tmp_path, start=start, ctx=ctx)
    assert ctx.notes["anchor_rows"] == 5
    assert all(torch.equal(w, before[n]) for n, w in start.model.named_parameters())
    assert not any(w.grad is not None for w in start.model.parameters())
    ctx = context(start)
    shaped(KLAnchor(anchors="user"), start, ctx=ctx)
    assert ctx.notes["anchor_rows"] == USERS.num_rows


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(KLAnchor(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision_and_with_full_weights(tmp_path):
    assert_half_precision(KLAnchor(**QUICK), tmp_path)
    config = TrainingConfig(**{**CONFIG.__dict__, "adapter": "full"})
    own, plain = (
        weights(tuned(one, tmp_path / name, config=config))
        for name, one in (("a", KLAnchor(**QUICK)), ("b", None))
    )
    assert not are_equal(own, plain)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(KLAnchor(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named_and_needs_follow_them():
    assert [f[0] for f in KLAnchor(strength=-1.0, rows=0).check()] == ["strength", "rows"]
    assert KLAnchor().needs() == {"start", "safety"}
    assert KLAnchor(anchors="benign", loss="nll").needs() == {"benign_train"}
    assert KLAnchor(anchors="user").needs() == {"start"}
