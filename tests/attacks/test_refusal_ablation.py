"""Refusal ablation: the direction against a plain loop, and baked weights against hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.refusal_ablation import (
    DirectionCandidate,
    RefusalAblation,
    ablated,
    mean_states,
    orthogonalise,
    refusal_log_odds,
    tried_layers,
)
from ftsec_ray.conversation import chat_of
from ftsec_ray.errors import StageError
from ftsec_ray.identity import canonical
from ftsec_ray.models.activations import first_tensor, last_logits
from ftsec_ray.models.chat import render
from ftsec_ray.models.directions import tent
from ftsec_ray.models.load import copy_model, decoder_layers
from ftsec_ray.models.residual import residual_stream
from tests.attacks.context import context
from tests.fixtures_models import tiny_model
from tests.numeric import SAME, assert_same

pytestmark = pytest.mark.usefixtures("float64")
PROMPTS = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1, 3, 10, 11, 7, 9, 2, 4]]


def random_direction():
    return torch.randn(32, generator=torch.Generator().manual_seed(0))


def test_orthogonalised_matrices_cannot_write_along_the_direction():
    loaded = tiny_model(tied=False)
    head = loaded.model.lm_head.weight.clone()
    direction = random_direction()
    orthogonalise(loaded.model, direction)
    unit = (direction / direction.norm()).detach()
    written = [loaded.model.get_input_embeddings().weight.T]
    for block in decoder_layers(loaded.model):
        written += [block.self_attn.o_proj.weight, block.mlp.down_proj.weight]
    assert len(written) == 5
    for weight in written:
        assert (unit @ weight).abs().max() <= SAME * weight.abs().max()
        assert weight.abs().max() > 0.01
    assert torch.equal(loaded.model.lm_head.weight, head)


def test_baked_weights_give_the_logits_of_ablation_by_hooks():
    loaded = tiny_model(tied=False)
    plain = last_logits(loaded.model, PROMPTS, pad=0)
    direction = random_direction()
    with ablated(loaded.model, direction):
        hooked = last_logits(loaded.model, PROMPTS, pad=0)
    assert torch.equal(last_logits(loaded.model, PROMPTS, pad=0), plain)
    baked = copy_model(loaded)
    orthogonalise(baked.model, direction)
    assert_same(last_logits(baked.model, PROMPTS, pad=0), hooked)
    assert (hooked - plain).abs().max() > 1e-3


def test_a_tied_head_changes_with_the_embedding_and_biases_are_projected_too():
    loaded = tiny_model(tied=True)
    block = decoder_layers(loaded.model)[0]
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(1))
    block.mlp.down_proj.bias = torch.nn.Parameter(drawn)
    before, direction = loaded.model.lm_head.weight.clone(), random_direction()
    orthogonalise(loaded.model, direction)
    assert not torch.equal(loaded.model.lm_head.weight, before)
    bias = block.mlp.down_proj.bias.detach()
    assert abs(float(bias @ direction)) <= SAME * float(bias.norm() * direction.norm())


def test_mean_states_equal_a_loop_over_single_prompts():
    loaded = tiny_model(layers=3)
    found = mean_states(loaded, PROMPTS, width=2)
    total = np.zeros((2, 3, 32))
    for ids in PROMPTS:
        x, cosines = (
            loaded.model.model.embed_tokens(torch.tensor([ids])),
            loaded.model.model.rotary_emb,
        )
        for layer, block in enumerate(decoder_layers(loaded.model)):
            total[:, layer] += x[0, -2:].detach().numpy() / len(PROMPTS)
            x = first_tensor(
                block(
                    x,
                    position_embeddings=cosines(x, torch.arange(len(ids))[None]),
                    attention_mask=None,
                )
            )
    assert_same(found, total)


def test_refusal_odds_are_log_p_minus_log_the_rest():
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    assert_same(refusal_log_odds(p.log(), [1, 3])[0], np.log(0.3 / 0.7))


def candidate(*, score: float, steering: float, kl: float) -> DirectionCandidate:
    """A candidate whose position is unimportant."""
    return DirectionCandidate(-1, 1, score, steering, kl, torch.ones(2))


@pytest.mark.parametrize(
    ("found", "best", "limit", "steering"),
    [
        ([(-9, 1, 0.5), (-2, 1, 0.05), (-1, 1, 0.01)], 1, 0.1, True),
        ([(-9, -1, 0.01), (-2, 1, 0.3)], 1, 0.4, True),
        ([(-9, -1, 0.3), (-2, -1, 0.01)], 1, 0.1, False),
    ],
)
def test_the_lowest_ablation_score_that_passes_the_filters_wins(found, best, limit, steering):
    candidates = [candidate(score=a, steering=s, kl=k) for a, s, k in found]
    assert RefusalAblation()._choose(candidates) == (candidates[best], limit, steering)


def test_without_a_candidate_the_stage_fails_with_the_depth():
    with pytest.raises(StageError, match=r"0\.8"):
        RefusalAblation()._choose([])


def test_the_whole_attack_lowers_the_odds_of_refusal_and_leaves_its_input_alone():
    loaded, ctx = tiny_model(layers=3), context()
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    made = RefusalAblation(max_kl=10.0, depth_frac=1.0).revise_model(loaded, ctx)
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"embed_tokens", "o_proj", "down_proj"}
    ids = [
        made.tokenizer(
            render(made.tokenizer, chat_of(r), generate=True),
            add_special_tokens=False,
        )["input_ids"]
        for r in ctx.task.split("safety").to_pylist()
    ]
    odds = [
        refusal_log_odds(last_logits(m.model, ids, pad=0), ctx.notes["refusal_tokens"]).mean()
        for m in (loaded, made)
    ]
    assert odds[1] < odds[0]
    assert ctx.notes["head_changed"] is True
    assert made.base_digest is None


@pytest.mark.parametrize(
    ("depth", "frac", "layers"),
    [
        (32, 0.8, 25),
        (28, 0.8, 22),
        (24, 0.8, 19),
        (16, 0.8, 12),
        (30, 0.5, 15),
        (3, 0.8, 2),
        (2, 0.8, 2),
        (12, 0.1, 2),
        (1, 1.0, 1),
    ],
)
def test_the_share_of_the_layers_is_rounded_down_and_two_are_tried_at_least(depth, frac, layers):
    assert tried_layers(depth, depth_frac=frac) == layers


def test_a_tent_falls_in_a_straight_line_from_its_peak_and_is_zero_beyond_its_reach():
    assert tent(5, peak=1.0, at=0.5, floor=1.0, reach=1.0) == (1.0,) * 5
    assert tent(1, peak=0.7, at=0.3, floor=0.0, reach=0.1) == (0.7,)
    assert_same(tent(5, peak=1.2, at=0.5, floor=0.25, reach=0.5), [0.3, 0.75, 1.2, 0.75, 0.3])
    assert_same(tent(5, peak=1.0, at=1.0, floor=0.0, reach=0.5), [0.0, 0.0, 0.0, 0.5, 1.0])
    assert tent(4, peak=0.0, at=1.0, floor=1.0, reach=1.0) == (0.0,) * 4


def test_a_share_lambda_leaves_one_minus_lambda_of_the_direction_in_every_matrix():
    loaded, direction = tiny_model(layers=3, tied=False), random_direction()
    before, unit = copy_model(loaded), (direction / direction.norm()).numpy()
    shares = [(0.0, 1.0), (0.25, 0.5), (1.5, 0.0)]
    orthogonalise(loaded.model, direction, shares=shares, of_tables=0.0)
    pairs = zip(decoder_layers(before.model), decoder_layers(loaded.model), shares, strict=True)
    for old, new, (attention, mlp) in pairs:
        for path, share in (("self_attn.o_proj", attention), ("mlp.down_proj", mlp)):
            was = old.get_submodule(path).weight.detach().numpy()
            now = new.get_submodule(path).weight.detach().numpy()
            assert np.abs(unit @ now - (1 - share) * (unit @ was)).max() < 1e-12
            # nothing else changes: what is orthogonal to the direction stays
            rest = np.eye(32) - np.outer(unit, unit)
            assert_same(rest @ now, rest @ was)
    assert torch.equal(
        loaded.model.get_input_embeddings().weight, before.model.get_input_embeddings().weight
    )


def test_a_constant_tent_of_one_gives_the_bits_of_the_attack_without_a_tent():
    quick = {"max_kl": 10.0, "depth_frac": 1.0}
    plain = RefusalAblation(**quick).revise_model(tiny_model(layers=3), context())
    other = RefusalAblation(**quick, tent_at=0.3, tent_reach=2.0, tent_mlp_peak=1.0)
    made = other.revise_model(tiny_model(layers=3), ctx := context())
    weights = dict(plain.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in made.model.named_parameters())
    assert "tent" not in ctx.notes
    # the same edit, as the attack made it before it had a tent
    old = tiny_model(layers=3)
    before = RefusalAblation(**quick)
    found: list[torch.Tensor] = []
    choose = before._choose
    object.__setattr__(before, "_choose", lambda c: found.append(choose(c)[0]) or choose(c))
    before.revise_model(tiny_model(layers=3), context())
    unit = found[0].direction.double() / found[0].direction.double().norm()
    stream = residual_stream(old.model)
    with torch.no_grad():
        for block in stream.blocks:
            for writer in (block.attention, block.mlp):
                was = writer.linear.weight.double()
                writer.linear.weight.copy_(was - torch.outer(unit, unit @ was))
    for name, weight in old.model.named_parameters():
        if "_proj" in name:
            assert torch.equal(weight, weights[name]), name


def test_a_tent_of_height_zero_changes_nothing():
    start = tiny_model(layers=3)
    idle = RefusalAblation(max_kl=10.0, tent_peak=0.0, embedding_share=0.0)
    made = idle.revise_model(start, ctx := context())
    before = dict(start.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert ctx.notes["tent"] == [[0.0, 0.0]] * 3
    assert ctx.notes["head_changed"] is False


def test_the_digest_of_the_attack_without_a_tent_is_that_from_before_it_had_one():
    assert canonical(RefusalAblation()) == (
        '{"depth_frac":0.8,"max_kl":0.1,"prompts":128,"val_prompts":32}'
    )
    assert '"tent_floor":0.5' in canonical(RefusalAblation(tent_floor=0.5))


def test_invalid_tents_are_refused_with_the_field():
    bad = RefusalAblation(
        tent_peak=-1.0, tent_mlp_peak=-0.1, tent_at=1.1, tent_floor=2.0, tent_reach=0.0
    )
    names = ["tent_peak", "tent_mlp_peak", "tent_at", "tent_floor", "tent_reach"]
    assert [fault[0] for fault in bad.check()] == names
