"""Refusal ablation: the direction against a plain loop, and baked weights against hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.attacks import refusal_ablation as module
from ftsec_ray.attacks.refusal_ablation import (
    DirectionCandidate,
    RefusalAblation,
    ablated,
    mean_states,
    orthogonalise,
    refusal_log_odds,
    tried_layers,
)
from ftsec_ray.errors import StageError
from ftsec_ray.models.activations import first_tensor, last_logits
from ftsec_ray.models.load import copy_model, decoder_layers
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
    block.mlp.down_proj.bias = torch.nn.Parameter(torch.randn(32))
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
            module.render(made.tokenizer, module.chat_of(r), generate=True),
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
