"""Frozen safety layers: the angles by hand, the rule of the range, and that frozen blocks keep
their bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.freeze_safety_layers import FreezeSafetyLayers, angle_gaps, opening
from ftsec_ray.errors import StageError
from ftsec_ray.models.chat import render
from tests.defenses.during import (
    CONFIG,
    are_equal,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_plain,
    assert_resumes,
    context,
    shaped,
    tuned,
    weights,
)
from tests.fixtures_models import tiny_model, tiny_task

QUICK = {"locate": "depth", "from_share": 0.5, "to_share": 1.0}


def angle(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / norms))))


def states_by_hand(loaded, split, block):
    """The output of a block at the last token of each prompt, each prompt alone."""
    found = []
    for row in tiny_task().split(split).to_pylist():
        text = render(loaded.tokenizer, chat_of(row), generate=True)
        ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        kept = []
        hook = loaded.model.model.layers[block].register_forward_hook(
            lambda _m, _i, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            loaded.model(input_ids=ids)
        hook.remove()
        found.append(kept[0].reshape(-1, kept[0].shape[-1])[-1].tolist())
    return found


@pytest.mark.usefixtures("float64")
def test_the_gap_of_a_block_is_the_mean_angle_to_forbidden_prompts_less_that_among_benign_ones():
    start = tiny_model(layers=3)
    ctx = context(start, task=tiny_task())
    method = FreezeSafetyLayers(from_share=0.0, to_share=0.0)
    method._by_gap(start, ctx)
    for split in ("benign_train", "safety"):
        assert ctx.notes[f"prompts_{split}"] == len(ctx.task.split(split))
    for block, got in enumerate(ctx.notes["gaps_degrees"]):
        benign, forbidden = (states_by_hand(start, s, block) for s in ("benign_train", "safety"))
        across = [angle(a, b) for a in benign for b in forbidden]
        among = [angle(a, b) for i, a in enumerate(benign) for j, b in enumerate(benign) if i != j]
        want = sum(across) / len(across) - sum(among) / len(among)
        assert abs(got - want) < 5.1e-5  # the record has four digits


def test_opposite_sets_are_180_degrees_apart_and_equal_ones_not_at_all():
    one = torch.tensor([1.0, 0.0]).expand(3, 2, 2)
    assert angle_gaps(one, -one[:2]) == pytest.approx([180.0, 180.0], abs=1e-9)
    assert angle_gaps(one, one) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("gaps", "shares", "want"),
    [
        ([0.0, 1.0, 5.0, 9.5, 10.0, 9.0], (0.1, 0.9), [1, 2, 3]),
        ([0.0, 1.0, 5.0, 9.5, 10.0, 9.0], (0.0, 1.0), [1, 2, 3, 4]),
        ([0.0, 1.0, 5.0, 9.5, 10.0, 9.0], (0.5, 0.5), [2]),
        ([10.0, 1.0], (0.1, 0.9), [0]),
        ([-1.0, 0.0], (0.1, 0.9), []),
        ([-3.0, 2.0], (0.0, 0.0), [1]),
    ],
)
def test_the_range_runs_from_the_opening_of_the_gap_to_its_flattening(gaps, shares, want):
    assert opening(gaps, *shares) == want


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_frozen_blocks_keep_their_bits_and_all_others_train(tmp_path, adapter):
    start = tiny_model(layers=4)
    method = FreezeSafetyLayers(locate="depth", from_share=0.25, to_share=0.75)
    ctx = context(start)
    report = tuned(method, tmp_path, start=start, config=replace(CONFIG, adapter=adapter), ctx=ctx)
    assert ctx.notes["frozen_blocks"] == [1, 2]
    before = {n: w.detach().numpy() for n, w in start.model.named_parameters()}
    for name, weight in weights(report).items():
        same = (weight == before[name]).all()
        if ".layers.1." in name or ".layers.2." in name:
            assert same, name
        elif name.endswith("_proj.weight"):
            assert not same, name


def test_the_control_freezes_as_many_blocks_and_the_seed_chooses_them():
    start = tiny_model(layers=6)
    seen = set()
    for seed in range(8):
        ctx = context(start, seed=seed)
        method = FreezeSafetyLayers(locate="depth", from_share=0.0, to_share=0.5, pick="random")
        shaped(method, start, ctx=ctx)
        assert ctx.notes["located_blocks"] == [0, 1, 2]
        assert len(set(ctx.notes["frozen_blocks"])) == 3
        seen.add(tuple(ctx.notes["frozen_blocks"]))
    assert len(seen) > 3


def test_an_empty_range_is_plain_tuning_bit_for_bit(tmp_path):
    assert_plain(FreezeSafetyLayers(locate="depth", from_share=0.2, to_share=0.2), tmp_path)


def test_the_dose_is_the_number_of_blocks(tmp_path):
    start = tiny_model(layers=4)
    counts = []
    for share in (0.0, 0.25, 0.5, 0.75):
        _, training = shaped(
            FreezeSafetyLayers(locate="depth", from_share=0.0, to_share=share), start
        )
        names = [n for n, _ in start.model.named_parameters() if training.is_trainable(n)]
        counts.append(sum(".layers." in n for n in names))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4


def test_a_model_without_a_block_that_trains_is_an_error_with_a_remedy():
    with pytest.raises(StageError, match="every block") as error:
        shaped(FreezeSafetyLayers(locate="depth", from_share=0.0, to_share=1.0))
    assert "exclude this model" in str(error.value)


def test_too_few_prompts_are_an_error():
    task = tiny_task()
    few = replace(task, splits={**task.splits, "safety": task.split("safety").slice(0, 1)})
    with pytest.raises(StageError, match="too few prompts in split 'safety'"):
        shaped(FreezeSafetyLayers(), ctx=context(task=few))


def test_without_a_gap_nothing_is_frozen_and_a_warning_says_so():
    task = tiny_task()
    same = replace(task, splits={**task.splits, "safety": task.split("benign_train")})
    ctx = context(task=same)
    plain, training = shaped(FreezeSafetyLayers(), ctx=ctx)
    names = [name for name, _ in tiny_model().model.named_parameters()]
    assert [n for n in names if training.is_trainable(n)] == names
    assert "no block is frozen" in ctx.warnings[0]
    assert training.steps == plain.steps


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(FreezeSafetyLayers(**QUICK), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(FreezeSafetyLayers(**QUICK), tmp_path)
    start = tiny_model(layers=4)
    start.model.to(torch.bfloat16)
    ctx = context(start)
    shaped(FreezeSafetyLayers(), start, ctx=ctx)
    assert len(ctx.notes["gaps_degrees"]) == 4


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(FreezeSafetyLayers(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named_and_needs_follow_them():
    faults = FreezeSafetyLayers(from_share=1.5, to_share=0.5, prompts=1).check()
    assert [f[0] for f in faults] == ["from_share", "to_share", "prompts"]
    assert FreezeSafetyLayers().needs() == {"start", "safety", "benign_train"}
    assert FreezeSafetyLayers(locate="depth").needs() == {"start"}


def test_two_equal_fine_tunes_are_equal(tmp_path):
    runs = [weights(tuned(FreezeSafetyLayers(**QUICK), tmp_path / n)) for n in ("a", "b")]
    assert are_equal(*runs)
