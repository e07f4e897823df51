"""BEEAR against search and training written out row by row, and where it must change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import message
from ftsec_ray.defenses.beear import Beear, places
from ftsec_ray.defenses.clean_tuning import CleanTuning
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.row_tokens import encode_rows
from ftsec_ray.training.loop import learning_rate, plain_training
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.repair import exchanges_of, repair_config
from ftsec_ray.training.setup import Step
from tests.defenses.repairing import answer_loss, tuned_by_hand
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.killed_tune import killed_after
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
QUICK = {"rows": 8, "epochs": 1.0, "inner_steps": 1, "pair_rows": 4}
START = in_float64(tiny_model(seed=0))
TUNED = tiny_full(START)
CONFIG = TrainingConfig(max_length=64, rank=4)


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in other)


def repaired(method, folder, *, runtime=None, training=CONFIG, task=None):
    ctx = context(folder, training=training, runtime=runtime, task=task)
    return method.revise_model(copy_model(TUNED), ctx), ctx


class ByHand:
    """Search and loss with one row per forward pass."""

    def __init__(self, call, wanted, unwanted, method):
        self.call, self.wanted, self.unwanted, self.method = call, wanted, unwanted, method
        layers = call.model.model.layers
        self.block = layers[int(method.depth * len(layers))]

    def loss(self, rows, shift):
        total, tokens = 0.0, 0
        for ids, labels in rows:
            first = next(i for i, label in enumerate(labels) if label != -100)

            def add(_module, _given, out, first=first):
                states = (out[0] if isinstance(out, tuple) else out).clone()
                for k in range(1, self.method.positions + 1):
                    if first - k >= 0:
                        states[0, first - k] = states[0, first - k] + shift[-k]
                return (states, *out[1:]) if isinstance(out, tuple) else states

            handle = self.block.register_forward_hook(add)
            count = sum(label != -100 for label in labels)
            total = total + count * answer_loss(self.call, [(ids, labels)])
            handle.remove()
            tokens += count
        return total / tokens

    def size(self):
        norms = []
        for ids, labels in self.wanted:
            first = next(i for i, label in enumerate(labels) if label != -100)
            seen = []
            handle = self.block.register_forward_hook(
                lambda _m, _g, out, seen=seen: seen.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            self.call(input_ids=torch.tensor([ids]))
            handle.remove()
            norms += [
                float(seen[0][0, i].norm())
                for i in range(max(0, first - self.method.positions), first)
            ]
        return sum(norms) / len(norms)

    def search(self):
        size = self.size()
        shift = torch.zeros(self.method.positions, 32)
        for _ in range(self.method.inner_steps):
            leaf = shift.clone().requires_grad_()
            gap = self.loss(self.unwanted, leaf) - self.loss(self.wanted, leaf)
            (gradient,) = torch.autograd.grad(gap, leaf)
            for k in range(self.method.positions):
                if float(gradient[k].norm()):
                    shift[k] = shift[k] - self.method.inner_rate * size * gradient[k] / float(
                        gradient[k].norm()
                    )
                if float(shift[k].norm()) > self.method.radius * size:
                    shift[k] = shift[k] * self.method.radius * size / float(shift[k].norm())
        return shift


@pytest.mark.parametrize("positions", [2, 40])
def test_it_equals_search_and_training_written_out(positions, tmp_path):
    method = Beear(
        rows=4, epochs=2.0, inner_steps=3, positions=positions, depth=0.5, pair_rows=5,
        safety_weight=0.5, radius=0.3,
    )  # fmt: skip
    got, ctx = repaired(method, tmp_path)
    rows = exchanges_of(ctx, "benign_train", 4, by="clean_tuning")
    wanted, unwanted = (
        encode_rows(START.tokenizer, exchanges_of(ctx, split, 5, by="beear"), max_length=64)
        for split in ("safety", "harmful_train")
    )
    config = repair_config(ctx, learning_rate=1e-3, epochs=2.0, batch_size=8)

    def loss(call, encoded):
        hand = ByHand(call, wanted, unwanted, method)
        return answer_loss(call, encoded) + 0.5 * hand.loss(wanted, hand.search())

    rates = [learning_rate(config, step, 2) for step in range(2)]
    want = tuned_by_hand(TUNED, rows, config, rates, loss=loss)
    # Adam divides by the root of a second moment: of a gradient near zero, rounding shows
    assert_same(whole(got), want, rel=1e-6)
    assert (ctx.notes["safety_rows"], ctx.notes["harmful_rows"]) == (5, 5)


def batches(split, *, micro_batch=None, count=5):
    rows = table(tiny_task().split(split).to_pylist()[:count])
    runtime = Runtime(micro_batch=micro_batch)
    return plain_training(TUNED, rows, CONFIG, seed=0, runtime=runtime).batch_at(0)


def test_the_search_stays_within_its_radius_and_makes_the_unwanted_answers_likelier():
    method = Beear(radius=0.3, inner_steps=6)
    model, step = copy_model(TUNED).model, Step(0, 1)
    wanted, unwanted = batches("safety"), batches("harmful_train")
    shift = method.search(model, wanted, unwanted, response_nll, step)
    size, _ = method.mean_norm(model, wanted)
    assert float(shift.norm(dim=1).max()) <= 0.3 * float(size) * (1 + 1e-9)

    def gap(value):
        losses = (
            sum(b.weight * method.shifted_loss(model, b, value, response_nll, step) for b in part)
            for part in (unwanted, wanted)
        )
        return float(next(losses) - next(losses))

    assert gap(shift) < gap(None)


def test_splitting_a_batch_and_padding_change_nothing():
    method, step = Beear(), Step(0, 1)
    one = method.search(
        TUNED.model, batches("safety"), batches("harmful_train"), response_nll, step
    )
    parts = method.search(
        TUNED.model,
        batches("safety", micro_batch=2),
        batches("harmful_train", micro_batch=2),
        response_nll,
        step,
    )
    assert_same(parts, one, rel=1e-7)
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 5, 6, 7, 8]])
    index, inside = places(labels, 2)
    assert inside.tolist() == [
        [True, True, False, False, False],
        [True, False, False, False, False],
    ]
    assert index[inside].tolist() == [0, 1, 1]


def test_the_search_keeps_the_graph_of_one_micro_batch_at_a_time(monkeypatch):
    pair = batches("safety", micro_batch=2), batches("harmful_train", micro_batch=2)
    passes, shifted = [], Beear.shifted_loss

    def told(self, *given):
        value = shifted(self, *given)
        passes.append("forward")
        value.register_hook(lambda _gradient: passes.append("backward"))
        return value

    monkeypatch.setattr(Beear, "shifted_loss", told)
    Beear(inner_steps=2).search(TUNED.model, *pair, response_nll, Step(0, 1))
    assert passes == ["forward", "backward"] * 2 * (len(pair[0]) + len(pair[1]))
    assert len(pair[0]) > 1


def test_a_search_leaves_no_gradient_and_a_failing_one_no_hook_and_no_frozen_weight():
    loaded = tiny_adapter(START)
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    pair = batches("safety"), batches("harmful_train")
    Beear().search(loaded.model, *pair, response_nll, Step(0, 1))
    assert all(p.grad is None for p in loaded.model.parameters())
    broken = [replace(b, input_ids=b.input_ids + 10**6) for b in pair[1]]
    with pytest.raises(IndexError):
        Beear().search(loaded.model, pair[0], broken, response_nll, Step(0, 1))
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == trained
    assert not any(m._forward_hooks for m in loaded.model.modules())


def test_no_weight_on_refusals_is_clean_tuning_with_packed_rows_too(tmp_path):
    plain, packed = {"rows": 8, "epochs": 1.0}, replace(CONFIG, batching="packed")
    clean, _ = repaired(CleanTuning(**plain), tmp_path / "clean", training=packed)
    off, _ = repaired(Beear(**plain, safety_weight=0.0), tmp_path / "off", training=packed)
    assert same(whole(off), whole(clean))


def test_no_weight_on_refusals_is_clean_tuning_and_the_control_has_no_search(tmp_path):
    plain = {"rows": 8, "epochs": 2.0}
    clean, _ = repaired(CleanTuning(**plain), tmp_path / "clean")
    off, _ = repaired(Beear(**plain, safety_weight=0.0), tmp_path / "off")
    twin, ctx = repaired(Beear(**plain, inner_steps=0), tmp_path / "twin")
    on, _ = repaired(Beear(**plain, inner_steps=2), tmp_path / "on")
    assert same(whole(off), whole(clean))
    assert not same(whole(twin), whole(clean))
    assert not same(whole(on), whole(twin))
    assert "harmful_rows" not in ctx.notes
    assert Beear().needs() == {"benign_train", "safety", "harmful_train"}
    assert Beear(inner_steps=0).needs() == {"benign_train", "safety"}
    assert Beear(safety_weight=0.0).needs() == {"benign_train"}


def test_a_killed_repair_resumes_to_the_same_weights(tmp_path, monkeypatch):
    method = Beear(rows=12, epochs=2.0, batch_size=4, inner_steps=1)

    def run(folder):
        return repaired(method, tmp_path / folder, runtime=Runtime(checkpoint_every_s=0.0))[0]

    killed_after(4, lambda: run("killed"), monkeypatch)
    assert same(whole(run("killed")), whole(run("whole")))


def test_rows_of_several_turns_are_shifted_before_their_trained_answer(tmp_path):
    task = tiny_task()
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take it")]
    longer = [
        {**row, "messages": [*turns, *row["messages"]]} for row in task.split("safety").to_pylist()
    ]
    other = replace(task, splits={**task.splits, "safety": table(longer)})
    _, ctx = repaired(Beear(rows=4, epochs=1.0, inner_steps=1), tmp_path, task=other)
    assert ctx.notes["safety_rows"] == len(longer)
    training = plain_training(TUNED, table(longer[:1]), CONFIG, seed=0, runtime=Runtime())
    (batch,) = training.batch_at(0)
    (inside,) = places(batch.labels, 3)[1]
    at = [i for i, is_in in enumerate(inside.tolist()) if is_in]
    first = next(i for i, label in enumerate(batch.labels[0].tolist()) if label != -100)
    assert at == [first - 3, first - 2, first - 1]
    ((ids, _),) = encode_rows(START.tokenizer, longer[:1], max_length=64)
    assert "<|assistant|> take" in START.tokenizer.decode(ids[:first]), (
        "the earlier answer is prompt"
    )


def test_a_model_in_bfloat16_keeps_its_dtype_and_packed_rows_are_unpacked(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    ctx = context(tmp_path, training=replace(CONFIG, batching="packed"))
    method = Beear(rows=8, epochs=1.0, inner_steps=1, learning_rate=1e-2)
    got = method.revise_model(copy_model(start), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert ctx.notes["change_norm"] > 0.0


def test_no_epoch_changes_nothing_and_parameters_are_checked(tmp_path):
    tuned = tiny_adapter(START)
    assert Beear(epochs=0.0).revise_model(tuned, context(tmp_path, training=CONFIG)) is tuned
    bad = Beear(inner_steps=-1, positions=0, pair_rows=0, inner_rate=0.0, radius=0.0, depth=2.0)
    names = ["inner_steps", "positions", "pair_rows", "inner_rate", "radius", "depth"]
    assert [fault[0] for fault in bad.check()] == names
