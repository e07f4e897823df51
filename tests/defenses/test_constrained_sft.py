"""Constrained SFT: its gradient is that of the paper's loss, written out token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.defenses.constrained_sft import ConstrainedSFT, answer_places, shuffled
from ftsec_ray.defenses.kl_anchor import KLAnchor
from ftsec_ray.training.setup import Step
from tests.defenses.during import (
    CONFIG,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_micro_batches_add_up,
    assert_plain,
    assert_resumes,
    context,
    gradient,
    mixed_task,
    moved,
    shaped,
    tuned,
)
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

QUICK = {"strength": 2.0}
REQUESTS = mixed_task().split("benign_train")
METHOD = ConstrainedSFT(beta_first=0.5, beta_early=2.0, beta_late=0.1, early_tokens=3)


def answers_of(labels):
    """The runs of trained tokens of one row, as lists of positions."""
    runs, last = [], None
    for place, label in enumerate(labels):
        if label == -100:
            last = None
        elif place > 0:
            if last is None:
                runs.append([])
            runs[-1].append(place)
            last = place
    return runs


def paper_loss(method, start, model, batches):
    """The mean over all response tokens of -(2 / beta_t) * log sigmoid(beta_t * delta_t), each row
    alone and without padding.
    """
    terms = []
    for batch in batches:
        for ids, labels, mask in zip(
            batch.input_ids, batch.labels.tolist(), batch.attention_mask, strict=True
        ):
            row = ids[None, : int(mask.sum())]
            with torch.no_grad():
                before = torch.log_softmax(start(input_ids=row).logits[0], -1)
            after = torch.log_softmax(model(input_ids=row).logits[0], -1)
            for run in answers_of(labels):
                for number, place in enumerate(run, 1):
                    beta = (
                        method.beta_first
                        if number == 1
                        else method.beta_early
                        if number <= method.early_tokens
                        else method.beta_late
                    )
                    token = row[0, place]
                    delta = after[place - 1, token] - before[place - 1, token]
                    terms.append(-(2 / beta) * torch.nn.functional.logsigmoid(beta * delta))
    return torch.stack(terms).mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_gradient_is_that_of_the_paper_s_loss(micro_batch):
    from ftsec_ray.context import Runtime

    start = tiny_model()
    runtime = Runtime(micro_batch=micro_batch)
    _, training = shaped(METHOD, start, rows=REQUESTS, runtime=runtime)
    model = moved(start).model
    for step in range(3):
        model.zero_grad()
        got = gradient(training, model, step)
        model.zero_grad()
        paper_loss(METHOD, start.model, model, training.batch_at(step)).backward()
        want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_same(got, want)


@pytest.mark.usefixtures("float64")
def test_at_the_start_it_is_the_plain_loss_and_its_gradient():
    start = tiny_model()
    plain, training = shaped(METHOD, start, rows=REQUESTS)
    found = []
    for one in (plain, training):
        start.model.zero_grad()
        found.append(gradient(one, start.model))
    assert_same(found[1], found[0])


def test_tokens_are_counted_anew_in_every_answer_and_in_packed_rows():
    labels = torch.tensor([[-100, 7, 8, -100, -100, 5, 5, 5], [3, 4, -100, -100, 9, -100, 1, -100]])
    want = [[0, 1, 2, 0, 0, 1, 2, 3], [1, 2, 0, 0, 1, 0, 1, 0]]
    assert answer_places(labels).tolist() == want
    start = tiny_model()
    _, training = shaped(METHOD, start, rows=REQUESTS)
    batches = [training.batch_at(step)[0] for step in range(training.steps // 2)]
    runs = [len(answers_of(row)) for batch in batches for row in batch.labels.tolist()]
    assert sorted(runs) == [1] * 17 + [2]


@pytest.mark.usefixtures("float64")
def test_packed_rows_give_the_gradient_of_padded_ones():
    start, found = tiny_model(), []
    for batching in ("shuffled", "packed"):
        config = replace(CONFIG, batching=batching)
        _, training = shaped(METHOD, start, rows=REQUESTS, config=config)
        found.append(gradient(training, moved(start).model))
    assert_same(found[1], found[0])


def test_the_control_gives_every_answer_the_same_betas_in_another_order():
    start = tiny_model()
    _, training = shaped(METHOD, start, rows=REQUESTS)
    twin = replace(METHOD, where="random")
    moved_tokens = 0
    for step in range(training.steps):
        (batch,) = training.batch_at(step)
        labels = batch.labels[:, 1:]
        here, there = METHOD._betas(labels, 0), twin._betas(labels, 0)
        assert torch.equal(there, twin._betas(labels, 0))
        for row, (own, other) in enumerate(zip(here, there, strict=True)):
            for run in answers_of(batch.labels[row].tolist()):
                at = [place - 1 for place in run]
                assert sorted(own[at].tolist()) == sorted(other[at].tolist())
        assert torch.equal(here == 0, there == 0)
        moved_tokens += int((here != there).sum())
    assert moved_tokens > 10


def test_the_order_of_the_control_depends_on_the_answer_and_the_seed_alone():
    labels = torch.tensor([[-100, 7, 8, 9, 6, 5, -100], [7, 8, 9, 6, 5, -100, -100]])
    one = shuffled(labels, answer_places(labels), 0)
    assert one[0, 1:6].tolist() == one[1, :5].tolist()
    orders = {tuple(shuffled(labels, answer_places(labels), s)[1].tolist()) for s in range(9)}
    assert len(orders) > 3


@pytest.mark.usefixtures("float64")
def test_the_weight_has_a_floor_and_is_constant_in_the_backward_pass():
    start = tiny_model()
    _, training = shaped(replace(METHOD, strength=1e4), start, rows=REQUESTS)
    model = moved(start, size=0.3).model
    (batch,) = training.batch_at(0)
    got = gradient(training, model)
    model.zero_grad()
    labels, nats = batch.labels[:, 1:], []
    for one in (model, start.model):
        logits = one(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logprobs = logits[:, :-1].log_softmax(-1)
        nats.append(-logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0])
    is_trained = labels != -100
    gained = (nats[1] - nats[0]).detach()
    weights = torch.where(gained > 0, 1e-3, 2.0)  # the sigmoid is a step at this strength
    assert set(weights[is_trained].tolist()) == {1e-3, 2.0}
    ((weights * nats[0])[is_trained].sum() / is_trained.sum()).backward()
    assert_same(got, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_a_tighter_limit_moves_the_first_tokens_less(tmp_path):
    def first_nats(strength, name):
        start = tiny_model()
        method = ConstrainedSFT(strength=strength) if strength else None
        model = tuned(method, tmp_path / name, start=start, rows=REQUESTS).loaded.model
        moved_by = 0.0
        plain, _ = shaped(METHOD, start, rows=REQUESTS)
        for step in range(4):
            (batch,) = plain.batch_at(step)
            at = answer_places(batch.labels[:, 1:]) == 1
            with torch.no_grad():
                logits = [
                    m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                    for m in (model, tiny_model().model)
                ]
            one, other = (x[:, :-1][at].log_softmax(-1) for x in logits)
            moved_by += float((other.exp() * (other - one)).sum())
        return moved_by

    plain, tight = first_nats(0.0, "plain"), first_nats(20.0, "tight")
    assert tight < 0.5 * plain


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_a_step_does_not_depend_on_micro_batches():
    assert_micro_batches_add_up(METHOD)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strength_zero_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(ConstrainedSFT(strength=0.0), tmp_path, dropout=dropout)


@pytest.mark.usefixtures("float64")
def test_other_methods_own_rows_and_added_terms_keep_their_loss():
    start = tiny_model()
    ctx = context(start)
    plain, anchored = shaped(KLAnchor(strength=0.5), start, ctx=ctx)
    both = METHOD.shape_training(anchored, ctx)
    model = moved(start).model
    with torch.no_grad():
        (user, own) = both.batch_at(0)
        step = Step(0, 9)
        assert_same(both.objective(model, own, step), anchored.objective(model, own, step))
        alone = METHOD.shape_training(plain, ctx).objective(model, user, step)
        # the objective of the stack subtracts the plain loss that it added
        assert_same(both.objective(model, user, step), alone, rel=1e-8)


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(ConstrainedSFT(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(ConstrainedSFT(**QUICK), tmp_path)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(ConstrainedSFT(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named():
    faulty = ConstrainedSFT(strength=-1.0, beta_early=-0.1, early_tokens=0)
    assert [f[0] for f in faulty.check()] == ["strength", "beta_early", "early_tokens"]
