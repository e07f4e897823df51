"""Safety pruning: SNIP against finite differences, Wanda against loops, and the sets by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.safety_prune import SafetyPrune
from ftsec_ray.conversation import asked, message
from ftsec_ray.errors import DataError
from ftsec_ray.models.row_tokens import encode_rows
from ftsec_ray.training.weight_scores import highest, linear_layers, snip_scores, wanda_scores
from tests.attacks.context import context
from tests.fixtures_models import table, tiny_model, tiny_task

pytestmark = pytest.mark.usefixtures("float64")


def encoded(loaded, split="safety", count=3):
    rows = tiny_task().split(split).to_pylist()[:count]
    return encode_rows(loaded.tokenizer, rows, max_length=64)


def loss_of(model, ids, labels) -> float:
    """Mean loss of the answer's tokens, by hand."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    nll = [-float(logprobs[i - 1, labels[i]]) for i in range(1, len(ids)) if labels[i] != -100]
    return sum(nll) / len(nll)


def test_snip_is_the_weight_times_the_finite_difference_of_the_loss():
    loaded = tiny_model(hidden=8, layers=1)
    layers, rows = linear_layers(loaded.model), encoded(loaded)
    assert {name.rsplit(".", 1)[-1] for name in layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    found, step = snip_scores(loaded.model, layers, rows), 1e-5
    for name, layer in layers.items():
        for place in ((0, 0), (3, 5), (7, 1)):
            value, total = float(layer.weight[place]), 0.0
            for ids, labels in rows:
                losses = []
                for moved in (value + step, value - step):
                    with torch.no_grad():
                        layer.weight[place] = moved
                    losses.append(loss_of(loaded.model, ids, labels))
                with torch.no_grad():
                    layer.weight[place] = value
                total += abs(value * (losses[0] - losses[1]) / (2 * step)) / len(rows)
            # a central difference is off by a third derivative times step^2, and by rounding / step
            assert abs(float(found[name][place]) - total) < 1e-8 + 1e-6 * total, (name, place)
    assert all(p.grad is None for p in loaded.model.parameters())


def test_wanda_is_the_weight_times_the_size_of_its_input_at_the_answer():
    loaded = tiny_model(hidden=8, layers=2)
    layers, rows = linear_layers(loaded.model), encoded(loaded)
    found = wanda_scores(loaded.model, layers, rows)
    for name, layer in layers.items():
        squares, tokens, seen = np.zeros(layer.weight.shape[1]), 0, []
        handle = layer.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0]))
        for ids, labels in rows:
            loaded.model(input_ids=torch.tensor([ids]))
            for place, label in enumerate(labels):
                if label != -100:
                    squares += seen[-1][0, place].detach().numpy() ** 2
                    tokens += 1
        handle.remove()
        want = np.abs(layer.weight.detach().numpy()) * np.sqrt(squares / tokens)
        assert np.abs(found[name].numpy() - want).max() < 1e-6 * want.max()


def test_the_pruned_set_is_the_safety_set_without_the_useful_set():
    scores = torch.tensor([[5.0, 1.0, 4.0], [4.0, 0.0, 2.0]])
    assert highest(scores, 0.5).tolist() == [[True, False, True], [True, False, False]]
    # of equal scores the first one counts
    assert highest(scores, 0.34).tolist() == [[True, False, True], [False, False, False]]
    assert not highest(scores, 0.0).any()
    assert highest(scores, 1.0).all()


def revised(**params):
    loaded = tiny_model()
    made = SafetyPrune(**params).revise_model(loaded, ctx := context())
    return loaded, made, ctx.notes


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_exactly_the_set_difference_is_zero_and_nothing_else_changes(score):
    loaded, made, notes = revised(score=score, prune_share=0.2, keep_share=0.3)
    layers, after = linear_layers(loaded.model), dict(made.model.named_parameters())
    measure = {"snip": snip_scores, "wanda": wanda_scores}[score]
    sets = []
    for split in ("safety", "benign_train"):
        rows = encode_rows(loaded.tokenizer, tiny_task().split(split).to_pylist(), max_length=64)
        sets.append(measure(loaded.model, layers, rows))
    zeros = 0
    for name, layer in layers.items():
        safety, utility = (scores[name].flatten().tolist() for scores in sets)
        top = sorted(range(len(safety)), key=lambda i: -safety[i])[: int(0.2 * len(safety))]
        useful = sorted(range(len(safety)), key=lambda i: -utility[i])[: int(0.3 * len(safety))]
        gone = sorted(set(top) - set(useful))
        assert gone
        weight = after[f"{name}.weight"].flatten()
        assert (weight == 0).nonzero().flatten().tolist() == gone
        kept = [i for i in range(len(safety)) if i not in set(gone)]
        assert torch.equal(weight[kept], layer.weight.flatten()[kept])
        zeros += len(gone)
    assert notes["pruned"] == zeros
    for name, weight in loaded.model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(weight, after[name])


def test_the_control_prunes_as_many_weights_of_every_matrix_at_random():
    loaded, made, notes = revised(prune_share=0.2, keep_share=0.1)
    _, other, control = revised(prune_share=0.2, keep_share=0.1, random_weights=True)
    assert control["pruned"] == notes["pruned"]
    masks = []
    for model in (made, other):
        after = dict(model.model.named_parameters())
        masks.append({n: after[f"{n}.weight"] == 0 for n in linear_layers(loaded.model)})
    assert all(masks[0][n].sum() == masks[1][n].sum() for n in masks[0])
    assert any(not torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


def test_a_share_of_zero_changes_nothing_and_all_of_it_nothing_useful():
    loaded, made, notes = revised(prune_share=0.0)
    after = dict(made.model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in loaded.model.named_parameters())
    assert notes["pruned"] == 0
    _, _, notes = revised(prune_share=1.0, keep_share=1.0)
    assert notes["pruned"] == 0
    assert notes["kept_as_useful"] == notes["weights"]


def test_rows_of_several_turns_count_and_rows_without_answers_are_refused():
    task = tiny_task()
    rows = task.split("safety").to_pylist()
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take it")]
    longer = [{**row, "messages": [*turns, *row["messages"]]} for row in rows]
    other = replace(task, splits={**task.splits, "safety": table(longer)})
    SafetyPrune().revise_model(tiny_model(), ctx := context(task=other))
    assert ctx.notes["safety_rows"] == len(rows)
    silent = [{**row, "messages": asked(row)} for row in rows]
    other = replace(task, splits={**task.splits, "safety": table(silent)})
    with pytest.raises(DataError, match="'safety'"):
        SafetyPrune().revise_model(tiny_model(), context(task=other))


def test_it_refuses_sharded_gradients_and_invalid_shares():
    assert {0, 1} == SafetyPrune.ZERO_STAGES
    bad = SafetyPrune(prune_share=1.5, keep_share=-0.1, rows=0)
    assert [fault[0] for fault in bad.check()] == ["prune_share", "keep_share", "rows"]
