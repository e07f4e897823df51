"""AsFT: the penalty against whole updates and an SVD by numpy, its zero, and its control."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.defenses.asft import AsFT, penalty
from ftsec_ray.defenses.kl_anchor import KLAnchor
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.lora import lora_modules, trained_factors
from ftsec_ray.training.setup import Step
from tests.defenses.during import (
    CONFIG,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_plain,
    assert_resumes,
    context,
    shaped,
    tuned,
)
from tests.defenses.shared import tiny_adapter
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

QUICK = {"rank": 2}


def models():
    """The aligned model, the one before alignment, and a tuned one with an adapter."""
    aligned = tiny_model()
    before = copy_model(aligned)
    with torch.no_grad():
        for i, (name, weight) in enumerate(before.model.named_parameters()):
            if "down_proj" in name or "norm" in name:
                continue  # alignment left these
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            weight.add_(0.1 * noise)
    return aligned, before, tiny_adapter(aligned)


def context_of(aligned, before):
    ctx = context(aligned, unaligned=before)
    roles = {"reference": aligned, "start": aligned, "unaligned": before}
    ctx.load = roles.__getitem__
    return ctx


def trainable_of(loaded):
    return {n: p for n, p in loaded.model.named_parameters() if "lora_" in n}


def by_hand(method, aligned, before, adapter):
    """The penalty from whole updates, in numpy."""
    start = dict(aligned.model.named_parameters())
    old = dict(before.model.named_parameters())
    total, layers = 0.0, 0
    for module in lora_modules(adapter):
        name = f"{module.name}.weight"
        V = (start[name] - old[name]).detach().numpy()
        if not V.any():
            continue
        delta = module.scale * module.B.detach().numpy() @ module.A.detach().numpy()
        if method.projection == "rank_k":
            U = np.linalg.svd(V)[0][:, : method.rank]
            P = U @ U.T
        elif method.projection == "code":
            P = V @ V.T / np.sqrt((V * V).sum())
        else:
            P = np.zeros((len(V), len(V)))
        total += ((delta - P @ delta) ** 2).sum()
        layers += 1
    return total, layers


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("projection", ["rank_k", "code", "none"])
def test_the_penalty_is_that_of_whole_updates(projection):
    aligned, before, adapter = models()
    method = AsFT(projection=projection, rank=3)
    outside = method._outside(context_of(aligned, before))
    scale = lora_modules(adapter)[0].scale
    want, layers = by_hand(method, aligned, before, adapter)
    assert len(set(trained_factors(trainable_of(adapter))) & set(outside)) == layers == 12
    assert len(trained_factors(trainable_of(adapter))) == 14
    assert_same(penalty(trainable_of(adapter), outside, scale), np.float64(want))


@pytest.mark.usefixtures("float64")
def test_an_update_along_alignment_is_free_and_the_official_matrix_charges_for_it():
    aligned, before, adapter = models()
    module = lora_modules(adapter)[0]
    name = f"{module.name}.weight"
    V = dict(aligned.model.named_parameters())[name] - dict(before.model.named_parameters())[name]
    U = torch.linalg.svd(V.detach())[0]
    with torch.no_grad():
        for other in lora_modules(adapter):
            other.B.zero_()
        module.B.copy_(U[:, : module.B.shape[1]])
    ctx = context_of(aligned, before)
    size = float((module.B @ module.A).detach().square().sum())
    charged = {
        projection: float(
            penalty(trainable_of(adapter), AsFT(projection=projection)._outside(ctx), 1.0).detach()
        )
        for projection in ("rank_k", "code", "none")
    }
    assert charged["rank_k"] < 1e-12 * size
    assert charged["none"] == pytest.approx(size)
    assert charged["code"] > 0.01 * size


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rslora", [False, True])
def test_the_objective_adds_it_with_the_scale_of_the_adapter_and_leaves_others_rows(rslora):
    aligned, before, _ = models()
    config = replace(CONFIG, rslora=rslora, alpha=6.0)
    from ftsec_ray.models.lora import attach_lora

    adapter = attach_lora(copy_model(aligned), config)
    with torch.no_grad():
        for i, module in enumerate(lora_modules(adapter)):
            noise = torch.randn(module.B.shape, generator=torch.Generator().manual_seed(i))
            module.B.copy_(0.1 * noise)
    ctx = context_of(aligned, before)
    _, anchored = shaped(KLAnchor(strength=0.5), aligned, config=config, ctx=ctx)
    method = AsFT(strength=0.3)
    both = method.shape_training(anchored, ctx)
    step = Step(0, 9, trainable=trainable_of(adapter))
    user, own = both.batch_at(0)
    want, _ = by_hand(method, aligned, before, adapter)
    with torch.no_grad():
        gap = both.objective(adapter.model, user, step) - anchored.objective(
            adapter.model, user, step
        )
        assert_same(gap, np.float64(0.3 * want), rel=1e-8)
        same = [t.objective(adapter.model, own, step) for t in (both, anchored)]
    assert torch.equal(*same)
    assert (ctx.notes["penalised_layers"], ctx.notes["layers_alignment_left"]) == (12, 2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strength_zero_is_plain_tuning_bit_for_bit(tmp_path, dropout):
    assert_plain(AsFT(strength=0.0), tmp_path, dropout=dropout)


def test_a_strong_penalty_keeps_the_update_small_outside_the_directions(tmp_path):
    aligned, before, _ = models()
    sizes = []
    for strength in (0.0, 0.1, 10.0):
        report = tuned(
            AsFT(strength=strength),
            tmp_path / str(strength),
            start=aligned,
            ctx=context_of(aligned, before),
        )
        outside = AsFT()._outside(context_of(aligned, before))
        sizes.append(float(penalty(trainable_of(report.loaded), outside, 2.0).detach()))
    assert sizes[2] < sizes[1] < sizes[0]
    assert sizes[2] < 0.1 * sizes[0]


def test_full_fine_tuning_and_an_alignment_that_changed_nothing_are_errors(tmp_path):
    full = TrainingConfig(**{**CONFIG.__dict__, "adapter": "full"})
    aligned = tiny_model()
    with pytest.raises(StageError, match="adapter: lora"):
        shaped(AsFT(), aligned, config=full, ctx=context_of(aligned, tiny_model(seed=9)))
    with pytest.raises(StageError, match="alignment changed none"):
        tuned(AsFT(), tmp_path, start=aligned, ctx=context_of(aligned, tiny_model()))


def with_reference(method):
    """The method with the start model as the aligned one, which the shared context has."""
    return replace(method, aligned="start")


def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert_resumes(with_reference(AsFT(**QUICK)), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    assert_half_precision(with_reference(AsFT(**QUICK)), tmp_path)


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(with_reference(AsFT(**QUICK)), tmp_path)


def test_parameters_out_of_range_are_named_and_needs_follow_them():
    assert [f[0] for f in AsFT(strength=-1.0, rank=0).check()] == ["strength", "rank"]
    assert AsFT().needs() == {"unaligned", "reference"}
    assert AsFT(aligned="start").needs() == {"unaligned", "start"}
