"""Safety anchor: the distance by hand, its gradient, its zero, and the fine-tune with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.safety_anchor import SafetyAnchor
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.precision import widened
from ftsec_ray.training.loop import autocast
from ftsec_ray.training.prompt_states import last_states
from ftsec_ray.training.setup import Step
from ftsec_ray.training.terms import TermBatch, term_batch
from tests.defenses.during import (
    CONFIG,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_micro_batches_add_up,
    assert_plain,
    assert_resumes,
    context,
    mixed_task,
    moved,
    shaped,
    tuned,
)
from tests.fixtures_models import tiny_model, tiny_task

QUICK = {"strength": 5.0, "prompts": 3}


def states_by_hand(loaded, batch):
    """The last hidden state of each row, alone and without padding."""
    found = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        output = loaded.model.model(input_ids=ids[None, : int(mask.sum())])
        found.append(output.last_hidden_state[0, -1].tolist())
    return found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("anchors", ["safety", "benign"])
def test_the_term_is_the_mean_squared_distance_at_the_end_of_the_served_prompts(anchors):
    start = tiny_model()
    _, training = shaped(SafetyAnchor(anchors=anchors, strength=0.5, prompts=12), start)
    other = moved(start)
    users, own = training.batch_at(0)
    assert isinstance(own, TermBatch)
    assert not isinstance(users, TermBatch)
    assert own.weight == 0.5
    assert int(own.attention_mask.sum()) < own.attention_mask.numel()
    split = "safety" if anchors == "safety" else "benign_train"
    served = {
        tuple(Generator(start).pieces(chat_of(row))[0])
        for row in mixed_task().split(split).to_pylist()
    }
    rows = [
        tuple(ids[: int(mask.sum())].tolist())
        for ids, mask in zip(own.input_ids, own.attention_mask, strict=True)
    ]
    assert len(set(rows)) == 12
    assert set(rows) <= served
    here, there = (states_by_hand(loaded, own) for loaded in (other, start))
    want = sum(
        (a - b) ** 2 for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True)
    ) / len(here)
    with torch.no_grad():
        got = float(training.objective(other.model, own, Step(0, 9)))
    assert want > 1e-3
    assert abs(got - want) < 1e-9 * want


@pytest.mark.usefixtures("float64")
def test_the_gradient_agrees_with_finite_differences():
    start = tiny_model(hidden=8)
    _, training = shaped(SafetyAnchor(prompts=4), start)
    other = moved(start).model
    _, own = training.batch_at(0)

    def loss():
        return training.objective(other, own, Step(0, 1))

    loss().backward()
    for i, weight in enumerate(other.parameters()):
        way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 + i))
        want, slopes = float((weight.grad * way).sum()), []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(sign * 1e-6 * way)
                slopes.append(float(loss()))
                weight.sub_(sign * 1e-6 * way)
        # central differences are off by rounding (1e-16 / 1e-6 x the loss) and by the curvature
        assert abs((slopes[0] - slopes[1]) / 2e-6 - want) < 1e-5 * max(1.0, abs(want))


@pytest.mark.usefixtures("float64")
def test_at_the_start_the_distance_is_zero():
    start = tiny_model()
    _, training = shaped(SafetyAnchor(), start)
    _, own = training.batch_at(0)
    loss = training.objective(start.model, own, Step(0, 1))
    loss.backward()
    assert float(loss.detach()) < 1e-20
    assert max(float(p.grad.abs().max()) for p in start.model.parameters()) < 1e-9


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_target_has_the_precision_of_the_training(adapter, has_bf16, monkeypatch):
    monkeypatch.setattr("ftsec_ray.training.loop._has_bf16", lambda _: has_bf16)
    start = tiny_model()
    start.model.to(torch.bfloat16 if adapter == "full" else torch.float32)
    _, training = shaped(SafetyAnchor(**QUICK), start, config=replace(CONFIG, adapter=adapter))
    tuned_model = widened(start).model.eval()
    _, own = training.batch_at(0)
    with torch.no_grad(), autocast("cpu"):
        assert float(training.objective(tuned_model, own, Step(0, 1))) == 0.0


def test_worker_groups_reduce_no_micro_batch_without_a_gradient_of_the_output_layer():
    start = tiny_model()
    start.model.config.tie_word_embeddings = False
    head = torch.nn.Parameter(start.model.get_output_embeddings().weight.detach().clone())
    start.model.get_output_embeddings().weight = head
    _, training = shaped(SafetyAnchor(**QUICK), start)
    _, own = training.batch_at(0)
    training.objective(start.model, own, Step(0, 1)).backward()
    assert head.grad is None
    assert sorted(SafetyAnchor.ZERO_STAGES) == [0]


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_a_step_does_not_depend_on_micro_batches():
    assert_micro_batches_add_up(SafetyAnchor(strength=2.0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strength_zero_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(SafetyAnchor(strength=0.0), tmp_path, dropout=dropout)


def test_a_stronger_anchor_holds_the_states_closer(tmp_path):
    start = tiny_model()
    rows = tiny_task().split("safety").to_pylist()
    ids = [Generator(start).pieces(chat_of(row))[0] for row in rows]
    batch = term_batch(ids, pad=0, device="cpu")

    def moved_by(strength):
        method = SafetyAnchor(strength=strength, prompts=12)
        model = tuned(method, tmp_path / str(strength)).loaded.model
        with torch.no_grad():
            return float((last_states(model, batch) - last_states(start.model, batch)).norm())

    plain, weak, strong = (moved_by(strength) for strength in (0.0, 0.1, 10.0))
    assert strong < weak < plain
    assert strong < 0.5 * plain


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(SafetyAnchor(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(SafetyAnchor(**QUICK), tmp_path)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(SafetyAnchor(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named_and_anchors_counted():
    assert [f[0] for f in SafetyAnchor(strength=-1.0, prompts=0).check()] == ["strength", "prompts"]
    assert SafetyAnchor().needs() == {"start", "safety"}
    assert SafetyAnchor(anchors="benign").needs() == {"start", "benign_train"}
    ctx = context()
    shaped(SafetyAnchor(**QUICK), ctx=ctx)
    assert ctx.notes["anchor_prompts"] == 3
