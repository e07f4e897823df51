"""The controls on the update of a tune, against plain arithmetic on whole weights."""

import numpy as np
import pytest
import torch

from ftsec_ray.defenses.drop_layer import DropLayer
from ftsec_ray.defenses.matched_noise import MatchedNoise
from ftsec_ray.defenses.random_mask import RandomMask
from ftsec_ray.defenses.shrink import Shrink
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.update import stands_on, updates
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, gamma, in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}


def revised(method, kind, tmp_path, *, seed=0):
    ctx = context(tmp_path, models={"start": START}, seed=seed)
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_shrink_is_the_straight_line_between_start_and_tuned(kind, gamma, tmp_path):
    got, _ = revised(Shrink(gamma=gamma), kind, tmp_path)
    start, tuned, got = whole(START), whole(TUNED[kind]), whole(got)
    for name in start:
        assert_same(got[name], start[name] + gamma * (tuned[name] - start[name]))


@pytest.mark.parametrize("kind", TUNED)
def test_shrink_by_one_changes_no_bit_and_by_zero_gives_the_start_bit_for_bit(kind, tmp_path):
    for factor, same_as in ((1.0, TUNED[kind]), (0.0, START)):
        got, want = whole(revised(Shrink(gamma=factor), kind, tmp_path)[0]), whole(same_as)
        assert all(np.array_equal(got[name], want[name]) for name in want)


def test_low_rank_controls_keep_the_adapter_and_its_base(tmp_path):
    for method in (Shrink(gamma=0.5), DropLayer(frac=0.5)):
        got, _ = revised(method, "adapter", tmp_path)
        assert got.has_adapter
        assert got.base_digest == "start"
        assert stands_on(got, START)


@pytest.mark.parametrize("kind", TUNED)
def test_matched_noise_has_the_norm_of_each_update_times_the_scale(kind, tmp_path):
    got, _ = revised(MatchedNoise(scale=0.5), kind, tmp_path)
    start, tuned, got = whole(START), whole(TUNED[kind]), whole(got)
    for name in start:
        update, noise = (
            np.linalg.norm(tuned[name] - start[name]),
            np.linalg.norm(got[name] - tuned[name]),
        )
        # the noise is drawn, and its own norm taken, in float32: a sum of squares, then its root and
        # a division
        assert abs(noise - 0.5 * update) <= gamma(start[name].size + 2) * 0.5 * update
    assert any(np.linalg.norm(tuned[name] - start[name]) > 0.01 for name in start)


def test_matched_noise_depends_on_the_seed_alone_and_is_gaussian(tmp_path):
    first, again, other = (
        whole(revised(MatchedNoise(), "full", tmp_path, seed=s)[0]) for s in (0, 0, 1)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])
    noise = (first[name] - whole(TUNED["full"])[name]).ravel()
    assert abs(float(np.mean((noise / noise.std()) ** 4)) - 3.0) < 0.5


@pytest.mark.parametrize("kind", TUNED)
def test_random_mask_leaves_each_entry_at_the_start_or_at_the_tuned_value(kind, tmp_path):
    got, ctx = revised(RandomMask(frac=0.3), kind, tmp_path)
    start, tuned, got = whole(START), whole(TUNED[kind]), whole(got)
    taken_back = changed = 0
    for name in start:
        assert np.all((got[name] == start[name]) | (got[name] == tuned[name])), name
        moved = tuned[name] != start[name]
        changed, taken_back = (
            changed + int(moved.sum()),
            taken_back + int((moved & (got[name] == start[name])).sum()),
        )
    assert taken_back / changed == pytest.approx(0.3, abs=0.02)
    assert ctx.notes["dropped"] / ctx.notes["entries"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("frac", "same_as"), [(0.0, "tuned"), (1.0, "start")])
def test_random_mask_at_the_ends_is_exact(frac, same_as, tmp_path):
    got = whole(revised(RandomMask(frac=frac), "full", tmp_path)[0])
    want = whole(TUNED["full"] if same_as == "tuned" else START)
    assert all(np.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize(("order", "dropped"), [("last", 1), ("first", 0)])
def test_drop_layer_takes_back_whole_blocks_and_nothing_else(kind, order, dropped, tmp_path):
    got = whole(revised(DropLayer(frac=0.5, order=order), kind, tmp_path)[0])
    start, tuned = whole(START), whole(TUNED[kind])
    for name in start:
        want = start if f".layers.{dropped}." in name else tuned
        assert np.array_equal(got[name], want[name]), name


@pytest.mark.parametrize("order", ["lowest_norm", "highest_norm"])
def test_drop_layer_by_norm_takes_the_layers_at_that_end(order, tmp_path):
    _, ctx = revised(DropLayer(frac=0.25, order=order, group="layer"), "adapter", tmp_path)
    start, tuned = whole(START), whole(TUNED["adapter"])
    norms = {
        name.removesuffix(".weight"): np.linalg.norm(tuned[name] - start[name])
        for name in start
        if "_proj" in name
    }
    ranked = sorted(norms, key=norms.get, reverse=order == "highest_norm")
    assert set(ctx.notes["dropped"]) == set(ranked[: len(ctx.notes["dropped"])])
    assert len(ctx.notes["dropped"]) == 4  # a quarter of 14 layers, rounded


def test_an_adapter_on_weights_other_than_the_starts_is_read_whole(tmp_path):
    moved = copy_model(TUNED["adapter"])
    with torch.no_grad():
        moved.model.get_base_model().model.norm.weight.add_(0.5)
    got = Shrink(gamma=0.0).revise_model(moved, context(tmp_path, models={"start": START}))
    assert not got.has_adapter
    want = whole(START)
    assert all(np.array_equal(weight, want[name]) for name, weight in whole(got).items())


def test_the_norm_of_a_low_rank_update_is_that_of_the_whole_matrix():
    _, found = updates(copy_model(TUNED["adapter"]), START, low_rank=True)
    assert len(found) == 14
    for update in found:
        assert_same(update.norm(), np.linalg.norm(update.delta().numpy()))


def test_a_low_rank_update_refuses_a_full_matrix():
    _, found = updates(copy_model(TUNED["adapter"]), START, low_rank=True)
    with pytest.raises(StageError, match=r"self_attn\.q_proj"):
        found[0].write(torch.zeros(32, 32))


def test_controls_never_touch_the_start(tmp_path):
    before = whole(START)
    for method in (Shrink(), MatchedNoise(), RandomMask(), DropLayer()):
        for kind in TUNED:
            revised(method, kind, tmp_path)
    assert all(np.array_equal(weight, before[name]) for name, weight in whole(START).items())


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (Shrink(gamma=1.5), "gamma"),
        (MatchedNoise(scale=-1.0), "scale"),
        (RandomMask(frac=2.0), "frac"),
        (DropLayer(frac=-0.1), "frac"),
    ],
)
def test_parameters_out_of_range_are_named(method, field):
    assert [fault[0] for fault in method.check()] == [field]
