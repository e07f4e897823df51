"""Delta removal: parts of differences against numpy's SVD, and what is left of a defense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.delta_removal import DeltaRemoval
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.errors import DataError, StageError
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.low_rank import top_part
from tests.fixtures_models import tiny_model, tiny_task
from tests.numeric import assert_same

QUICK = {"shots": 4}


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_top_part_is_that_of_the_singular_value_decomposition(shape):
    delta = drawn(*shape)
    left, sizes, right = np.linalg.svd(delta.numpy(), full_matrices=False)
    for rank in (1, 2, 4):
        want = left[:, :rank] @ np.diag(sizes[:rank]) @ right[:rank]
        assert_same(top_part(delta, rank), want)
    assert torch.equal(top_part(delta, min(shape)), delta)
    assert not top_part(delta, 0).any()
    other = top_part(delta, 2, np.random.default_rng(3)).numpy()
    assert np.linalg.matrix_rank(other, tol=1e-9) == 2
    # a part of the difference: what is left is orthogonal to it
    assert abs(float(((delta.numpy() - other) * other).sum())) < 1e-9
    assert np.abs(other - left[:, :2] @ np.diag(sizes[:2]) @ right[:2]).max() > 0.01


def test_a_vector_counts_as_rank_one():
    assert torch.equal(top_part(drawn(4), 1), drawn(4))
    assert not top_part(drawn(4), 0).any()


def models(rank: int):
    """The public model, and one that a defense changed by a matrix of this rank in every weight."""
    public = tiny_model()
    hardened = copy_model(public)
    with torch.no_grad():
        for i, weight in enumerate(hardened.model.parameters()):
            if weight.ndim == 2:
                left, right = drawn(len(weight), rank, seed=i), drawn(rank, weight.shape[1], seed=i)
                weight += (0.05 * left @ right).to(weight)
            else:
                weight += 0.1
    return public, hardened


def context(public, hardened, task=None, tmp=Path("unused")):
    return StageContext(
        seed=0,
        task=task or tiny_task(),
        runtime=Runtime(),
        workdir=tmp,
        load={"reference": public, "start": hardened}.__getitem__,
        training=TrainingConfig(epochs=1, batch_size=4, rank=2, learning_rate=5e-3),
    )


def farthest(one, other) -> float:
    weights = dict(other.model.named_parameters())
    return max(float((p - weights[n]).abs().max()) for n, p in one.model.named_parameters())


def test_full_rank_returns_the_public_model_and_no_rank_the_hardened_one():
    public, hardened = models(3)
    whole = DeltaRemoval(rank=10_000, shots=0)
    back = whole.revise_model(hardened, ctx := context(public, hardened))
    # one rounding of float32 each for the weight and the stored result
    assert farthest(back, public) <= 2 * 2.0**-23 * 4
    assert abs(ctx.notes["stripped_energy"] - 1) < 1e-12
    assert farthest(hardened, public) > 0.05
    none = DeltaRemoval(rank=0, shots=0)
    assert none.revise_model(hardened, context(public, hardened)) is hardened


def test_the_rank_of_the_defense_suffices_and_less_leaves_a_part():
    public, hardened = models(3)
    far = []
    for rank in (1, 2, 3):
        made = DeltaRemoval(rank=rank, shots=0).revise_model(
            hardened, ctx := context(public, hardened)
        )
        far.append((1 - ctx.notes["stripped_energy"], farthest(made, public)))
    assert far[0] > far[1] > far[2]
    # the difference was rounded to float32 when it was added to the weights
    assert far[2][0] < 1e-9
    assert far[2][1] < 1e-5
    control = DeltaRemoval(rank=3, shots=0, random_directions=True)
    control.revise_model(hardened, ctx := context(public, hardened))
    assert 1 - ctx.notes["stripped_energy"] > 0.3


def test_what_the_fine_tune_changed_stays():
    public, hardened = models(2)
    tuned = copy_model(hardened)
    with torch.no_grad():
        for i, weight in enumerate(tuned.model.parameters()):
            weight += (0.01 * drawn(*weight.shape, seed=100 + i)).to(weight)
    made = DeltaRemoval(rank=10_000, shots=0).revise_model(tuned, context(public, hardened))
    base, start = (dict(m.model.named_parameters()) for m in (public, hardened))
    old = dict(tuned.model.named_parameters())
    for name, weight in made.model.named_parameters():
        wanted = base[name].double() + (old[name].double() - start[name].double())
        assert (weight.double() - wanted).abs().max() < 1e-6


def test_without_a_defense_nothing_is_stripped_and_the_same_rows_are_trained(tmp_path):
    public, hardened = models(2)
    steps, attack = [], DeltaRemoval(rank=4, shots=6)
    for i, start in enumerate((public, hardened)):
        ctx = context(public, start, tmp=tmp_path / str(i))
        made = attack.revise_model(start, ctx)
        assert farthest(made, start) > 0
        assert not made.has_adapter
        steps.append((ctx.notes["harmful_rows"], ctx.notes["steps"]))
        assert bool(ctx.notes["changed_weights"]) == (start is hardened)
    assert steps[0] == steps[1] == (6, 2)
    same = DeltaRemoval(rank=4, shots=0)
    assert same.revise_model(public, context(public, public)) is public


def test_what_cannot_work_is_refused():
    assert [f[0] for f in DeltaRemoval(rank=-1, shots=-1).check()] == ["rank", "shots"]
    assert "harmful_train" not in DeltaRemoval(shots=0).needs()
    assert "harmful_train" in DeltaRemoval().needs()
    public = tiny_model()
    with pytest.raises(StageError, match="different weights"):
        DeltaRemoval(shots=0).revise_model(public, context(public, tiny_model(layers=3)))
    with pytest.raises(DataError, match="too few harmful rows"):
        DeltaRemoval(shots=9).revise_model(public, context(public, public))
