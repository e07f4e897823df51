"""Simulated steps and their first-order gradient, on quadratics that are solved by hand."""

from __future__ import annotations

import pytest
import torch

from ftsec_ray.training.losses import response_kl
from ftsec_ray.training.meta import gradients, noise_like, norm_of, restored, shifted, simulated
from ftsec_ray.training.setup import Batch, Step
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

pytestmark = pytest.mark.usefixtures("float64")
CENTRE, TARGET = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -4.0])


def weights():
    first = torch.tensor([4.0, 0.25], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[-1.5]], dtype=torch.float64, requires_grad=True)
    return {"a": first, "b": second}


def flat(parts):
    return torch.cat([part.flatten() for part in parts.values()])


def inner_gradients(trainable, curvature):
    """The gradient of curvature / 2 * |w - CENTRE|^2, written down."""

    def at(number):  # noqa: ARG001
        gap = curvature * (flat(trainable).detach() - CENTRE.double())
        return {"a": gap[:2], "b": gap[2:].view(1, 1)}

    return at


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_gradient_after_simulated_steps_is_that_at_the_weights_that_they_reach(steps):
    """k steps of rate r on a quadratic of curvature c end at m + (1 - r c)^k (w - m)."""
    trainable, rate, curvature, outer = weights(), 0.1, 3.0, 2.0
    before = flat(trainable).detach().clone()
    reached = CENTRE.double() + (1 - rate * curvature) ** steps * (before - CENTRE.double())
    with simulated(
        trainable, inner_gradients(trainable, curvature), steps=steps, learning_rate=rate
    ):
        assert_same(flat(trainable).detach(), reached)
        (outer / 2 * (flat(trainable) - TARGET.double()).square().sum()).backward()
    assert torch.equal(flat(trainable).detach(), before)
    assert_same(
        torch.cat([w.grad.flatten() for w in trainable.values()]), outer * (reached - TARGET)
    )


def test_a_normalised_step_has_the_length_of_its_rate_and_clipping_limits_it():
    for options, length in (({"normalised": True}, 0.1), ({"max_norm": 2.0}, 0.2)):
        trainable = weights()
        before = flat(trainable).detach().clone()
        gap = 50.0 * (before - CENTRE.double())
        at = inner_gradients(trainable, 50.0)
        with simulated(trainable, at, steps=1, learning_rate=0.1, **options):
            moved = flat(trainable).detach() - before
        assert_same(moved, -length * gap / gap.norm())
    zero = {name: torch.zeros_like(w) for name, w in trainable.items()}
    with simulated(trainable, lambda _: zero, steps=3, learning_rate=1.0, normalised=True):
        assert torch.equal(flat(trainable).detach(), before)


def test_weights_come_back_to_the_bit_also_after_an_error():
    trainable = {"a": torch.tensor([0.1, 1e-30, 3e8], dtype=torch.float32, requires_grad=True)}
    before = trainable["a"].detach().clone()

    def fail():
        with shifted(trainable, {"a": torch.full((3,), 1e9)}):
            assert not torch.equal(trainable["a"], before)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(trainable["a"], before)
    with restored(trainable), torch.no_grad():
        trainable["a"].fill_(float("nan"))
    assert torch.equal(trainable["a"], before)


def batch(ids, labels):
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.ones(len(ids), len(ids[0])).long())


IDS = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 9, 2, 4]]
LABELS = [[-100, -100, -100, 12, 2, 4], [-100, -100, -100, -100, 2, 4]]


def test_gradients_of_micro_batches_add_up_by_weight_and_leave_grad_alone():
    model = tiny_model(tied=False).model
    step = Step(0, 1, trainable=dict(model.named_parameters()))
    step.trainable["unused"] = torch.nn.Parameter(torch.ones(2))

    def loss(model, one, step):  # noqa: ARG001
        return model(**one.inputs()).logits.square().mean()

    parts = [batch(IDS[:1], LABELS[:1]), batch(IDS[1:], LABELS[1:])]
    weighed = [Batch(p.input_ids, p.labels, p.attention_mask, None, w) for p, w in
               zip(parts, (0.25, 0.75), strict=True)]  # fmt: skip
    found = gradients(model, weighed, loss, step)
    assert all(p.grad is None for p in model.parameters())
    (0.25 * loss(model, parts[0], step) + 0.75 * loss(model, parts[1], step)).backward()
    for name, weight in model.named_parameters():
        assert_same(found[name], weight.grad)
    assert not found["unused"].any()
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert norm_of(found) == pytest.approx(total, rel=1e-9)


def test_the_divergence_is_the_sum_over_words_at_the_response_tokens():
    model, clean = tiny_model(seed=1).model, tiny_model(seed=2).model
    one = batch(IDS, LABELS)
    found = response_kl(model, clean, one)
    p, q = (m(input_ids=one.input_ids).logits.softmax(-1) for m in (clean, model))
    terms = []
    for row, marks in enumerate(LABELS):
        for place, label in enumerate(marks):
            if label != -100:
                a, b = p[row, place - 1], q[row, place - 1]
                terms.append(sum(a[v] * (a[v] / b[v]).log() for v in range(len(a))))
    assert_same(found, sum(terms) / len(terms))
    assert len(terms) == 5
    found.backward()
    assert all(w.grad is None for w in clean.parameters())
    assert abs(float(response_kl(model, model, one))) < 1e-12


def test_noise_is_relative_to_each_tensor():
    torch.manual_seed(0)
    trainable = {"small": torch.full((4000,), 1e-3), "large": torch.full((4000,), -50.0)}
    noise = noise_like(trainable, 0.1)
    assert float(noise["small"].std()) == pytest.approx(1e-4, rel=0.1)
    assert float(noise["large"].std()) == pytest.approx(5.0, rel=0.1)
