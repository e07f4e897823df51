"""Safe LoRA against a plain NumPy version of both projections."""

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.safe_lora import SafeLora, cosine, official_projection, top_directions
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import copy_model
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.numeric import SAME, assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
UNALIGNED = in_float64(tiny_model(seed=0))
ALIGNED = tiny_full(UNALIGNED, seed=5, size=0.02)
TUNED = {"adapter": tiny_adapter(ALIGNED), "full": tiny_full(ALIGNED)}
ROLES = {"unaligned": UNALIGNED, "reference": ALIGNED, "start": ALIGNED}


def reference_matrix(V, projection, rank):
    if projection == "rank_k":
        U = np.linalg.svd(V)[0][:, :rank]
        return U @ U.T
    return V @ V.T / np.linalg.norm(V)


def reference(kind, *, projection, rank, number):
    """Whole weights after Safe LoRA, the projected layers, and a threshold that picks them, by
    NumPy in float64.
    """
    unaligned, aligned, tuned = (whole(m) for m in (UNALIGNED, ALIGNED, TUNED[kind]))
    cosines, projected = {}, {}
    for name in (n for n in tuned if n.endswith("_proj.weight")):
        delta = tuned[name] - aligned[name]
        projected[name] = (
            reference_matrix(aligned[name] - unaligned[name], projection, rank) @ delta
        )
        cosines[name] = (
            (projected[name] * delta).sum()
            / np.linalg.norm(projected[name])
            / np.linalg.norm(delta)
        )
    ranked = sorted(cosines, key=cosines.get)
    chosen = ranked[:number]
    for name in chosen:
        tuned[name] = aligned[name] + (0.0 if projection == "drop" else projected[name])
    between = (cosines[ranked[number - 1]] + cosines[ranked[number]]) / 2
    return tuned, {name.removesuffix(".weight") for name in chosen}, between


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("projection", ["code", "rank_k", "drop"])
def test_it_equals_the_plain_numpy_version(kind, projection, tmp_path):
    ctx = context(tmp_path, models=ROLES)
    want, chosen, tau = reference(kind, projection=projection, rank=5, number=7)
    got = SafeLora(select="cosine", projection=projection, rank=5, tau=tau).revise_model(
        copy_model(TUNED[kind]), ctx
    )
    assert set(ctx.notes["projected"]) == chosen
    assert_same(whole(got), want)


def test_the_number_mode_takes_the_layers_with_the_lowest_cosine(tmp_path):
    ctx = context(tmp_path, models=ROLES)
    SafeLora(number=3, projection="rank_k", rank=5).revise_model(copy_model(TUNED["adapter"]), ctx)
    assert (
        set(ctx.notes["projected"])
        == reference("adapter", projection="rank_k", rank=5, number=3)[1]
    )


def test_the_default_is_that_of_the_official_code():
    default = SafeLora()
    assert (default.select, default.number, default.tau, default.projection) == (
        "number",
        10,
        0.5,
        "code",
    )


def test_an_adapter_stays_an_adapter_and_only_its_factor_b_changes(tmp_path):
    got = SafeLora(select="cosine", tau=1.0).revise_model(
        copy_model(TUNED["adapter"]), context(tmp_path, models=ROLES)
    )
    assert got.has_adapter
    assert got.base_digest == "start"
    before = dict(TUNED["adapter"].model.named_parameters())
    for name, weight in got.model.named_parameters():
        assert torch.equal(weight, before[name]) == ("lora_B" not in name), name


def test_nothing_changes_below_every_cosine(tmp_path):
    got = SafeLora(select="cosine", tau=-1.0).revise_model(
        copy_model(TUNED["full"]), context(tmp_path, models=ROLES)
    )
    assert all(
        np.array_equal(a, b)
        for a, b in zip(whole(got).values(), whole(TUNED["full"]).values(), strict=True)
    )


def test_drop_sets_every_chosen_update_to_zero(tmp_path):
    got = whole(
        SafeLora(select="cosine", projection="drop", tau=1.0).revise_model(
            copy_model(TUNED["adapter"]), context(tmp_path, models=ROLES)
        )
    )
    assert all(np.array_equal(weight, whole(ALIGNED)[name]) for name, weight in got.items())


def projector(V, rank):
    U = top_directions(V, rank)
    return U @ U.T


def test_the_true_projector_is_symmetric_idempotent_and_of_the_given_rank():
    V = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    P = projector(V, 6)
    assert_same(P, P.T)
    assert_same(P @ P, P)
    assert_same(P.trace(), 6.0)


def test_the_true_projector_of_full_rank_changes_nothing_and_of_low_rank_keeps_only_what_alignment_spans():
    generator = torch.Generator().manual_seed(0)
    assert_same(projector(torch.randn(16, 40, generator=generator), 16), torch.eye(16))
    low = torch.randn(16, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    assert top_directions(low, 8).shape == (16, 2)


def test_the_official_projection_shrinks_an_update_to_less_than_a_hundredth_and_is_not_idempotent():
    """For a width and an alignment step as small as those of real models: it practically drops the
    layer.
    """
    generator = torch.Generator().manual_seed(0)
    V = 1e-4 * torch.randn(1024, 1024, generator=generator)
    delta = torch.randn(1024, 8, generator=generator) @ torch.randn(8, 1024, generator=generator)
    once = official_projection(V, delta)
    assert float(once.norm() / delta.norm()) < 0.01
    assert float((official_projection(V, once) - once).norm() / once.norm()) > 0.5


def test_the_cosine_with_a_matrix_of_zeros_is_zero():
    assert cosine(torch.zeros(2, 2), torch.eye(2)) == 0.0
    assert cosine(torch.eye(2), 3 * torch.eye(2)) == pytest.approx(1.0, rel=SAME)


def test_twins_with_equal_weights_are_an_error(tmp_path):
    with pytest.raises(StageError, match="alignment"):
        SafeLora().revise_model(
            copy_model(TUNED["adapter"]), context(tmp_path, models={**ROLES, "unaligned": ALIGNED})
        )


def test_a_twin_of_another_shape_is_named(tmp_path):
    wide = tiny_model(hidden=48)
    with pytest.raises(StageError, match="q_proj"):
        SafeLora().revise_model(
            copy_model(TUNED["adapter"]), context(tmp_path, models={**ROLES, "unaligned": wide})
        )


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in SafeLora(rank=0, tau=2.0, number=0).check()] == ["rank", "tau", "number"]
