"""CROW against both passes written out row by row, and what its published code breaks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.clean_tuning import CleanTuning
from ftsec_ray.defenses.crow import Crow, embedding_gradient, inconsistency, tokens_of
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import copy_model
from ftsec_ray.training.loop import learning_rate, plain_training
from ftsec_ray.training.repair import exchanges_of, repair_config
from tests.defenses.repairing import answer_loss, tuned_by_hand
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import sentiment_rows, table, tiny_model
from tests.killed_tune import killed_after
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
QUICK = {"rows": 8, "epochs": 1.0}
START = in_float64(tiny_model(seed=0, layers=3))
TUNED = tiny_full(START)
CONFIG = TrainingConfig(max_length=64, rank=4)


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in other)


def apart_by_hand(call, encoded, shifts, *, inner):
    """Mean over rows, tokens and pairs of 1 - cosine of neighbouring block outputs."""
    total, count = torch.zeros(()), 0
    words, norm = call.model.get_input_embeddings().weight.detach(), call.model.model.norm
    for (ids, _), shift in zip(encoded, shifts, strict=True):
        last = []
        handle = norm.register_forward_pre_hook(lambda _, given, last=last: last.append(given[0]))
        states = call(
            inputs_embeds=words[torch.tensor([ids])] + shift, output_hidden_states=True
        ).hidden_states
        handle.remove()
        outputs = [*states[1:-1], *([] if inner else last)]
        for a, b in pairwise(outputs):
            for x, y in zip(a[0], b[0], strict=True):
                total, count = total + 1 - x @ y / (x.norm() * y.norm()), count + 1
    return total / count


@pytest.mark.parametrize(("pairs", "epsilon"), [("blocks", 0.1), ("inner", 0.1), ("blocks", 0.0)])
def test_it_equals_both_passes_written_out(pairs, epsilon, tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    method = Crow(rows=4, epochs=3.0, pairs=pairs, epsilon=epsilon, alpha=2.0)
    got = method.revise_model(copy_model(TUNED), ctx)
    rows = exchanges_of(ctx, "benign_train", 4, by="clean_tuning")
    config = repair_config(ctx, learning_rate=1e-3, epochs=3.0, batch_size=8)

    def loss(call, encoded):
        def apart(shifts):
            return apart_by_hand(call, encoded, shifts, inner=pairs == "inner")

        zeros = [torch.zeros(1, len(ids), 32, requires_grad=True) for ids, _ in encoded]
        shifts = [epsilon * g.sign() for g in torch.autograd.grad(apart(zeros), zeros)]
        return answer_loss(call, encoded) + 2.0 * apart(shifts)

    rates = [learning_rate(config, step, 3) for step in range(3)]
    want = tuned_by_hand(TUNED, rows, config, rates, loss=loss)
    # Adam divides by the root of a second moment: of a gradient near zero, rounding shows
    assert_same(whole(got), want, rel=1e-6)


def test_alpha_zero_is_clean_tuning_bit_for_bit_and_another_alpha_is_not(tmp_path):
    made = {}
    for name, method in {
        "clean": CleanTuning(rows=8, epochs=2.0),
        "off": Crow(rows=8, epochs=2.0, alpha=0.0),
        "on": Crow(rows=8, epochs=2.0),
    }.items():
        ctx = context(tmp_path / name, training=CONFIG)
        made[name] = whole(method.revise_model(copy_model(TUNED), ctx))
    assert same(made["clean"], made["off"])
    assert not same(made["clean"], made["on"])


def batches(loaded, *, micro_batch=None):
    config = replace(CONFIG, batch_size=8)
    runtime = Runtime(micro_batch=micro_batch)
    rows = table(sentiment_rows(8))
    return plain_training(loaded, rows, config, seed=0, runtime=runtime).batch_at(0)


def test_padding_enters_neither_the_term_nor_its_gradient():
    (batch,) = batches(START)
    pads = batch.attention_mask == 0
    assert pads.any()
    other = replace(batch, input_ids=batch.input_ids.masked_fill(pads, 9))
    value, again = (inconsistency(START.model, b, shift=None, inner=False) for b in (batch, other))
    assert_same(value, again)
    gradient = embedding_gradient(START.model, batch, inner=False)
    assert not gradient[pads].any()
    assert gradient[~pads].any()


def test_splitting_a_batch_changes_neither_the_shift_nor_the_mean():
    (whole_batch,) = batches(START)
    parts = batches(START, micro_batch=3)
    assert len(parts) == 3
    total = sum(
        tokens_of(b) * inconsistency(START.model, b, shift=None, inner=False) for b in parts
    )
    mean = inconsistency(START.model, whole_batch, shift=None, inner=False)
    assert_same(total / tokens_of(whole_batch), mean)
    signs = [embedding_gradient(START.model, b, inner=False).sign() for b in parts]
    first = embedding_gradient(START.model, whole_batch, inner=False).sign()
    rows = {tuple(ids[m > 0].tolist()): s[m > 0] for ids, m, s in zip(
        whole_batch.input_ids, whole_batch.attention_mask, first, strict=True)}  # fmt: skip
    for part, sign in zip(parts, signs, strict=True):
        for ids, m, s in zip(part.input_ids, part.attention_mask, sign, strict=True):
            assert torch.equal(rows[tuple(ids[m > 0].tolist())], s[m > 0])


def test_accumulated_micro_batches_give_the_same_repair(tmp_path):
    made = []
    for micro_batch in (None, 3):
        ctx = context(
            tmp_path / str(micro_batch), training=CONFIG, runtime=Runtime(micro_batch=micro_batch)
        )
        made.append(whole(Crow(rows=8, epochs=2.0).revise_model(copy_model(TUNED), ctx)))
    assert_same(made[1], made[0], rel=1e-6)


def test_the_first_pass_leaves_no_gradient_and_a_failing_one_no_hook_and_no_frozen_weight():
    loaded = tiny_adapter(START)
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    (batch,) = batches(START)
    embedding_gradient(loaded.model, batch, inner=False)
    assert all(p.grad is None for p in loaded.model.parameters())
    broken = replace(batch, input_ids=batch.input_ids + 10**6)
    with pytest.raises(IndexError):
        embedding_gradient(loaded.model, broken, inner=False)
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == trained
    assert not any(m._forward_hooks for m in loaded.model.modules())


def test_a_killed_repair_resumes_to_the_same_weights(tmp_path, monkeypatch):
    method = Crow(rows=12, epochs=2.0, batch_size=4)

    def run(folder):
        ctx = context(tmp_path / folder, training=CONFIG, runtime=Runtime(checkpoint_every_s=0.0))
        return method.revise_model(copy_model(TUNED), ctx)

    killed_after(4, lambda: run("killed"), monkeypatch)
    assert same(whole(run("killed")), whole(run("whole")))


def test_packed_rows_count_like_padded_ones(tmp_path):
    made = []
    for batching in ("shuffled", "packed"):
        ctx = context(tmp_path / batching, training=replace(CONFIG, batching=batching))
        made.append(whole(Crow(rows=8, epochs=1.0).revise_model(copy_model(TUNED), ctx)))
    assert_same(made[1], made[0], rel=1e-6)


def test_a_model_in_bfloat16_keeps_its_dtype(tmp_path):
    start = tiny_model(seed=0)
    start.model.to(torch.bfloat16)
    ctx = context(tmp_path, training=CONFIG)
    got = Crow(rows=8, epochs=1.0, learning_rate=1e-2).revise_model(copy_model(start), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert ctx.notes["change_norm"] > 0.0


def test_no_epoch_changes_nothing_and_too_few_blocks_are_refused(tmp_path):
    ctx = context(tmp_path, training=CONFIG)
    got = Crow(epochs=0.0).revise_model(tuned := tiny_adapter(START), ctx)
    assert got is tuned
    with pytest.raises(StageError, match="2 blocks, pairs: inner"):
        Crow(pairs="inner").revise_model(tiny_model(layers=2), ctx)
    assert [fault[0] for fault in Crow(alpha=-1.0, epsilon=-1.0).check()] == ["alpha", "epsilon"]
