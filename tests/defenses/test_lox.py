"""LoX: against numpy's singular value decomposition, its zero, its control, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.lox import LoX
from ftsec_ray.errors import StageError
from ftsec_ray.method import control_of
from ftsec_ray.models.load import copy_model
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, in_float64

QUICK = {}


def pair():
    """The model before alignment, and after it: all weights differ."""
    twin = in_float64(tiny_model())
    return twin, tiny_full(twin)


def extrapolated(aligned, twin, **parameters):
    ctx = context(None, models={"unaligned": twin})
    return LoX(**parameters).prepare_model(copy_model(aligned), ctx), ctx


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rank", [1, 6])
def test_every_matrix_goes_on_along_its_top_directions_and_vectors_stay(rank):
    twin, aligned = pair()
    made, ctx = extrapolated(aligned, twin, rank=rank, coefficient=0.5)
    old, new, got = whole(twin), whole(aligned), whole(made)
    square, kept = 0.0, 0.0
    for name, weight in got.items():
        if new[name].ndim != 2:
            assert np.array_equal(weight, new[name])
            continue
        left, sizes, right = np.linalg.svd(new[name] - old[name], full_matrices=False)
        part = left[:, :rank] @ np.diag(sizes[:rank]) @ right[:rank]
        assert_same(weight, new[name] + 0.5 * part)
        square += float(((new[name] - old[name]) ** 2).sum())
        kept += float((0.25 * part**2).sum())
    assert ctx.notes["alignment_norm"] == pytest.approx(square**0.5, rel=1e-9)
    assert ctx.notes["change_norm"] == pytest.approx(kept**0.5, rel=1e-9)
    assert ctx.notes["matrices"] == sum(w.ndim == 2 for w in got.values())


@pytest.mark.usefixtures("float64")
def test_rank_0_takes_the_whole_change():
    twin, aligned = pair()
    made, _ = extrapolated(aligned, twin, rank=0, coefficient=2.0)
    old, new = whole(twin), whole(aligned)
    for name, weight in whole(made).items():
        if weight.ndim == 2:
            assert_same(weight, new[name] + 2.0 * (new[name] - old[name]))


def test_coefficient_0_changes_no_bit_and_the_given_model_stays():
    twin, aligned = tiny_model(), tiny_full(tiny_model())
    made, ctx = extrapolated(aligned, twin, coefficient=0.0)
    assert all(np.array_equal(w, whole(aligned)[n]) for n, w in whole(made).items())
    assert ctx.notes["change_norm"] == 0.0
    before = whole(aligned)
    LoX().prepare_model(aligned, context(None, models={"unaligned": twin}))
    assert all(np.array_equal(w, before[n]) for n, w in whole(aligned).items())


@pytest.mark.usefixtures("float64")
def test_the_control_adds_as_much_in_as_many_random_directions():
    twin, aligned = pair()
    assert control_of(LoX()) == LoX(random_directions=True)
    made, _ = extrapolated(aligned, twin, rank=2)
    other, _ = extrapolated(aligned, twin, rank=2, random_directions=True)
    again, _ = extrapolated(aligned, twin, rank=2, random_directions=True)
    new = whole(aligned)
    for name, weight in whole(other).items():
        assert np.array_equal(weight, whole(again)[name])
        if weight.ndim == 2:
            mine, theirs = whole(made)[name] - new[name], weight - new[name]
            assert np.linalg.norm(theirs) == pytest.approx(np.linalg.norm(mine), rel=1e-9)
            assert np.linalg.matrix_rank(theirs, tol=1e-9) == 2
            assert np.abs(theirs - mine).max() > 1e-3


def test_an_untouched_matrix_stays_bit_for_bit():
    twin = tiny_model()
    aligned = copy_model(twin)
    with torch.no_grad():
        aligned.model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    made, ctx = extrapolated(aligned, twin)
    assert ctx.notes["matrices"] == 1
    differing = [n for n, w in whole(made).items() if not np.array_equal(w, whole(aligned)[n])]
    assert differing == ["model.layers.0.mlp.up_proj.weight"]


def test_an_adapter_is_merged_first():
    twin = tiny_model()
    made, ctx = extrapolated(tiny_adapter(twin), twin, rank=4, coefficient=1.0)
    assert not made.has_adapter
    # the adapter is of rank 4: all of it is taken
    assert ctx.notes["change_norm"] == pytest.approx(ctx.notes["alignment_norm"], rel=1e-5)


def test_half_precision_weights_move_and_the_rounding_is_told():
    twin, aligned = tiny_model(), tiny_full(tiny_model(), size=0.2)
    for loaded in (twin, aligned):
        loaded.model.to(torch.bfloat16)
    made, ctx = extrapolated(aligned, twin)
    assert {w.dtype for w in made.model.parameters()} == {torch.bfloat16}
    assert 0.0 < ctx.notes["rounding_lost"] < 0.5


def test_models_without_a_difference_or_of_other_shapes_are_errors():
    twin = tiny_model()
    with pytest.raises(StageError, match="no matrix"):
        extrapolated(copy_model(twin), twin)
    with pytest.raises(StageError, match="counterpart"):
        extrapolated(tiny_model(hidden=16), twin)


def test_all_directions_have_no_random_twin():
    assert not LoX(rank=0).check()
    assert [f[0] for f in control_of(LoX(rank=0)).check()] == ["rank"]


@pytest.mark.parametrize(("field", "value"), [("coefficient", -0.5), ("rank", -1)])
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in LoX(**{field: value}).check()] == [field]
