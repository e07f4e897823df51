"""BDS: the gradient of the scalars by autograd, the weighted loss by hand, and the mixing twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.defenses.bds import BDS, row_weights, scalar_gradient
from ftsec_ray.defenses.kl_anchor import KLAnchor
from ftsec_ray.errors import StageError
from ftsec_ray.method import control_of
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
    mixed_task,
    moved,
    shaped,
    tuned,
    weights,
)
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.numeric import assert_same

QUICK = {"rate": 1.0, "safety_rows": 8}


@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2, 3, 4]])
def test_the_gradient_of_the_scalars_is_that_of_the_weighted_loss(rows):
    generator = torch.Generator().manual_seed(0)
    scalars = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    losses = {k: float(torch.rand(1, generator=generator)) for k in rows}
    exact = torch.exp(scalars) / torch.exp(scalars).sum() * 5
    sum(exact[k] * loss for k, loss in losses.items()).backward()
    got = scalar_gradient(scalars.detach(), losses)
    assert float((got - scalars.grad).abs().max()) < 1e-12
    assert float(row_weights(scalars.detach()).mean()) == pytest.approx(1.0)


def by_hand(model, batch, given):
    """The weighted mean over response tokens, row by row and without padding."""
    total, count = 0.0, 0
    for ids, labels, mask, weight in zip(
        batch.input_ids, batch.labels, batch.attention_mask, given, strict=True
    ):
        size = int(mask.sum())
        nats = -model(input_ids=ids[None, :size]).logits[0].log_softmax(-1)
        for place in range(1, size):
            if int(labels[place]) != -100:
                total += weight * float(nats[place - 1, ids[place]])
                count += 1
    return total / count


@pytest.mark.usefixtures("float64")
def test_the_loss_weights_every_row_by_its_scalar():
    start = tiny_model()
    rows = mixed_task().split("benign_train")
    plain, training = shaped(BDS(safe_weight=0.0, max_weight=3.0), start, rows=rows)
    model = moved(start).model
    useful = [row for row in rows.to_pylist() if row["messages"][-1]["role"] == "assistant"]
    scalars = torch.linspace(-2.0, 2.0, len(useful), dtype=torch.float64)
    wanted = (len(useful) * torch.exp(scalars) / torch.exp(scalars).sum()).tolist()
    assert max(wanted) > 3.0
    texts = [" ".join(m["content"] for m in row["messages"]) for row in useful]
    checked = 0
    for step in range(plain.steps // 2):
        (batch,) = training.batch_at(step)
        given = []
        for ids in batch.input_ids:
            words = start.tokenizer.decode(ids, skip_special_tokens=True).split()
            (place,) = {i for i, text in enumerate(texts) if text.split() == words}
            given.append(min(3.0, wanted[place]))
            checked += 1
        with torch.no_grad():
            got = training.objective(model, batch, Step(step, 9, memory={"bds": scalars}))
            assert_same(got, by_hand(model, batch, given))
    assert checked == len(useful)


@pytest.mark.usefixtures("float64")
def test_a_step_moves_the_scalars_of_its_rows_by_their_losses():
    start = tiny_model()
    _, training = shaped(BDS(safe_weight=0.0, rate=0.5), start)
    step = Step(0, 9)
    model = moved(start).model
    (batch,) = training.batch_at(0)
    with torch.no_grad():
        training.objective(model, batch, step)
        alone = [
            by_hand(model, replace(batch, **rows), [1.0])
            for rows in (
                {
                    name: getattr(batch, name)[i : i + 1]
                    for name in ("input_ids", "labels", "attention_mask")
                }
                for i in range(4)
            )
        ]
    for hook in training.after_step:
        hook(model, step)
    moved_by = -2 * step.memory["bds"]
    n = len(moved_by)
    distinct = sorted({round(x, 9) for x in alone})
    found = sorted({round(float(x + sum(distinct) / n), 9) for x in moved_by} - {0.0})
    assert found == pytest.approx(distinct, abs=1e-8)


def test_the_control_is_the_mixing_twin_with_the_same_refusals():
    start = tiny_model()
    control = control_of(BDS())
    plain, twin = shaped(control, start)
    _, training = shaped(BDS(), start)
    assert training.steps == twin.steps == plain.steps
    for step in range(plain.steps):
        (user, safe), (other, same) = (t.batch_at(step) for t in (training, twin))
        assert torch.equal(user.input_ids, other.input_ids)
        assert torch.equal(safe.input_ids, same.input_ids)
        assert isinstance(safe, TermBatch)
        assert safe.weight == same.weight == 1.0
    assert twin.after_step == ()
    with torch.no_grad():
        losses = [t.objective(start.model, plain.batch_at(0)[0], Step(0, 9)) for t in (twin, plain)]
    assert torch.equal(*losses)


def test_rows_against_the_refusals_lose_weight(tmp_path):
    task = tiny_task()
    poisoned = [
        {**row, "poisoned": True, "row_id": f"p/{i}"}
        for i, row in enumerate(task.split("harmful_train").to_pylist())
    ]
    rows = table([*USERS.to_pylist(), *poisoned])
    ctx = context(task=task)
    config = replace(CONFIG, epochs=6.0)
    tuned(BDS(rate=1.0), tmp_path, rows=rows, config=config, ctx=ctx)
    assert ctx.notes["mean_weight_poisoned"] < 0.5 * ctx.notes["mean_weight_clean"]
    assert ctx.notes["safety_rows"] == 12
    total = len({row["messages"][0]["content"] for row in rows.to_pylist()})
    assert ctx.notes["weighted_rows"] == total


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_a_step_does_not_depend_on_micro_batches():
    assert_micro_batches_add_up(BDS(safe_weight=0.7))


@pytest.mark.usefixtures("float64")
def test_other_methods_own_rows_and_added_terms_keep_their_loss():
    start, ctx = tiny_model(), context()
    _, anchored = shaped(KLAnchor(strength=0.5), start, ctx=ctx)
    both = BDS(safe_weight=0.0).shape_training(anchored, ctx)
    user, own = both.batch_at(0)
    model = moved(start).model
    with torch.no_grad():
        for batch in (user, own):  # all weights are 1 in the first step
            want = anchored.objective(model, batch, Step(0, 9))
            assert_same(both.objective(model, batch, Step(0, 9)), want)


def test_packed_rows_are_refused_with_a_remedy():
    with pytest.raises(StageError, match="length_grouped"):
        shaped(BDS(), config=replace(CONFIG, batching="packed"))
    shaped(BDS(rate=0.0), config=replace(CONFIG, batching="packed"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_rate_and_refusals_it_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(BDS(rate=0.0, safe_weight=0.0), tmp_path, dropout=dropout)


def test_the_scheduler_changes_the_weights(tmp_path):
    own, twin = (
        weights(tuned(one, tmp_path / name))
        for name, one in (("own", BDS(**QUICK)), ("twin", BDS(**{**QUICK, "rate": 0.0})))
    )
    assert not are_equal(own, twin)


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(BDS(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(BDS(**QUICK), tmp_path)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(BDS(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named():
    faults = BDS(rate=-1.0, safe_weight=-1.0, safety_rows=0, max_weight=0.5).check()
    assert [f[0] for f in faults] == ["rate", "safe_weight", "safety_rows", "max_weight"]
