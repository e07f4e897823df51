"""SafeGrad: the surgery against flattened vectors, and a whole step against one written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.context import Runtime
from ftsec_ray.defenses.kl_anchor import KLAnchor
from ftsec_ray.defenses.safegrad import SafeGrad, operated
from ftsec_ray.training.hardening import capped
from tests.defenses.during import (
    CONFIG,
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
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

QUICK = {"rows": 8}


def drawn(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (4,), "c": (1, 5)}
    return {
        n: scale * torch.randn(s, generator=generator, dtype=torch.float64)
        for n, s in shapes.items()
    }


def flat(parts):
    return np.concatenate([parts[n].numpy().ravel() for n in sorted(parts)])


def by_hand(user, alignment, *, project, strength):
    u, a = flat(user), flat(alignment)
    if project and u @ a < 0:
        u = u - (u @ a) / (a @ a) * a
    return u + strength * a


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_surgery_on_tensors_is_surgery_on_one_vector(seed, project, strength):
    user, alignment = drawn(seed), drawn(100 + seed)
    found = operated(user, alignment, project=project, strength=strength)
    want = by_hand(user, alignment, project=project, strength=strength)
    assert np.abs(flat(found.gradient) - want).max() < 1e-12
    u, a = flat(user), flat(alignment)
    assert abs(found.cosine - u @ a / np.sqrt((u @ u) * (a @ a))) < 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_after_surgery_nothing_points_against_alignment_and_agreement_is_left_alone(seed):
    user, alignment = drawn(seed), drawn(100 + seed)
    found = operated(user, alignment, project=True, strength=0.0)
    before, after = (float(flat(g) @ flat(alignment)) for g in (user, found.gradient))
    if before < 0:
        assert abs(after) < 1e-12
    else:
        assert all(torch.equal(found.gradient[n], g) for n, g in user.items())
    opposite = {n: -g for n, g in alignment.items()}
    assert np.abs(
        flat(operated(opposite, alignment, project=True, strength=0.0).gradient)
    ).max() < (1e-12)


def test_a_gradient_of_zero_is_no_conflict():
    zero = {n: torch.zeros_like(g) for n, g in drawn(0).items()}
    for user, alignment in ((drawn(0), zero), (zero, drawn(0)), (zero, zero)):
        found = operated(user, alignment, project=True, strength=1.0)
        assert found.cosine == 0.0
        assert np.array_equal(flat(found.gradient), flat(user) + flat(alignment))


def plain_gradients(start, model, micro_batch):
    """The gradients of the user's rows and of the divergence, each by one backward pass."""
    plain, _ = shaped(SafeGrad(), start, runtime=Runtime(micro_batch=micro_batch))
    model.zero_grad()
    user = gradient(plain, model)
    rows = capped(context(start), "safety", 256, by="safegrad")
    total = 0.0
    for batch in plain.encode(rows, "safegrad")(0):
        labels, inputs = batch.labels[:, 1:], batch.inputs()
        here, there = (m(**inputs).logits[:, :-1].log_softmax(-1) for m in (model, start.model))
        nats = (there.exp() * (there - here)).sum(-1)[labels != -100]
        total = total + batch.weight * nats.mean()
    model.zero_grad()
    total.backward()
    alignment = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return user, alignment


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("project", [True, False])
def test_a_step_leaves_the_gradient_of_the_written_out_version(micro_batch, project):
    start = tiny_model()
    # far off, so that alignment and the user's rows disagree
    model = moved(start, size=0.3).model
    user, alignment = plain_gradients(start, model, micro_batch)
    for sign in (1.0, -1.0):  # the second is a conflict where the first is none
        method = SafeGrad(strength=0.5, project=project)
        _, training = shaped(method, start, runtime=Runtime(micro_batch=micro_batch))
        objective = training.objective
        signed = replace(training, objective=lambda m, b, s, o=objective, k=sign: k * o(m, b, s))
        model.zero_grad()
        got = gradient(signed, model)
        want = by_hand(
            {n: sign * g for n, g in user.items()}, alignment, project=project, strength=0.5
        )
        assert_same(flat(got), want)


@pytest.mark.usefixtures("float64")
def test_accumulation_erases_no_gradient():
    assert_micro_batches_add_up(SafeGrad())


@pytest.mark.usefixtures("float64")
def test_the_control_has_the_gradient_of_a_divergence_added_to_the_loss():
    start = tiny_model()
    model = moved(start).model
    config = replace(CONFIG, batch_size=64)  # all refusals in every step, in whatever order
    found = []
    for method in (SafeGrad(project=False, strength=0.5), KLAnchor(strength=0.5)):
        _, training = shaped(method, start, config=config)
        model.zero_grad()
        found.append(gradient(training, model))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_strength_and_projection_it_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(SafeGrad(strength=0.0, project=False), tmp_path, dropout=dropout)


def test_conflicts_and_their_cosine_are_counted(tmp_path):
    ctx = context()
    report = tuned(SafeGrad(**QUICK), tmp_path, ctx=ctx)
    assert ctx.notes["surgery_steps"] == len(report.losses) == 10
    assert 0 <= ctx.notes["conflict_steps"] <= 10
    assert -1.0 <= ctx.notes["mean_cosine"] <= 1.0
    assert ctx.notes["alignment_rows"] == 8


def test_projection_changes_the_weights(tmp_path):
    own, control = (
        weights(tuned(SafeGrad(project=project), tmp_path / str(project)))
        for project in (True, False)
    )
    assert not are_equal(own, control)


def test_a_killed_fine_tune_ends_with_the_same_weights_and_counts(tmp_path, monkeypatch):
    assert_resumes(SafeGrad(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(SafeGrad(**QUICK), tmp_path)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(SafeGrad(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in SafeGrad(strength=-1.0, rows=0).check()] == ["strength", "rows"]
