"""Weight statistics: every feature against the whole matrix, and scores that tell an odd adapter
from a bank.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from ftsec_ray.defenses import weight_statistics
from ftsec_ray.defenses.weight_statistics import (
    WeightStatistics,
    features,
    frobenius_scores,
    layer_features,
    spectral_scores,
)
from ftsec_ray.errors import StageError
from ftsec_ray.method import control_of
from ftsec_ray.models import update_spectra
from ftsec_ray.models.load import merged
from tests.defenses.shared import context, tiny_adapter, whole
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
START = in_float64(tiny_model())
BANK = {f"clean_bank:{i}": tiny_adapter(START, seed=10 + i) for i in range(6)}


def full_features(delta):
    sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    energy = sigma**2 / (sigma**2).sum()
    return {
        "sigma_1": sigma[0],
        "frobenius": np.linalg.norm(delta),
        "energy_concentration": energy[0],
        "spectral_entropy": stats.entropy(energy),
        "kurtosis": stats.kurtosis(delta.astype(np.float64), axis=None),
        "normalised": np.linalg.norm(delta) / np.sqrt(delta.size),
    }


@pytest.mark.parametrize(("out", "inner", "rank"), [(40, 24, 3), (24, 40, 8), (16, 16, 20)])
def test_features_of_factors_equal_those_of_the_whole_matrix(out, inner, rank, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(out, rank, generator=generator),
        torch.randn(rank, inner, generator=generator),
    )
    monkeypatch.setattr(update_spectra, "ROWS_AT_A_TIME", 7)
    want = full_features((left @ right).numpy())
    for got in (layer_features(left, right), layer_features(left @ right, None)):
        assert_same(got, want)


def test_an_adapter_and_its_folded_twin_have_the_same_features():
    low, full = features(BANK["clean_bank:0"], START), features(merged(BANK["clean_bank:0"]), START)
    assert low.keys() == full.keys()
    assert len(low) == 14
    start, tuned = whole(START), whole(BANK["clean_bank:0"])
    for name, got in low.items():
        want = full_features(tuned[f"{name}.weight"] - start[f"{name}.weight"])
        assert_same(got, want)
        assert_same(full[name], want)


def odd_adapter():
    """One layer carries far more than the others, in one direction."""
    odd = tiny_adapter(START, seed=99)
    for name, parameter in odd.model.named_parameters():
        if "layers.1.mlp.down_proj.lora_B" in name:
            parameter.data[:, 0] *= 12.0
    return odd


@pytest.mark.parametrize("statistic", ["frobenius_std", "spectral"])
def test_an_odd_adapter_scores_above_the_whole_bank(statistic, tmp_path):
    ctx = context(tmp_path, models={**BANK, "start": START})
    found = WeightStatistics(statistic=statistic).inspect(odd_adapter(), ctx)
    assert len(found.clean_scores) == 6
    assert found.score > 2 * max(found.clean_scores)


def test_a_clean_model_scores_like_the_bank_on_average():
    """Over 300 draws of seven models of one kind: neither the mean score nor the rank gives the
    first one away.
    """
    generator, gaps, ranks = np.random.default_rng(0), [], []
    for _ in range(300):
        points = generator.normal(size=(7, 14, 5))
        tables = [
            [dict(zip(weight_statistics.FEATURES, layer, strict=True)) for layer in model]
            for model in points
        ]
        score, *clean = spectral_scores(tables)
        gaps.append(score - np.mean(clean))
        ranks.append(np.mean(np.array(clean) < score))
    assert abs(np.mean(gaps)) < 0.03
    assert abs(np.mean(ranks) - 0.5) < 0.06


def test_the_frobenius_score_is_the_spread_of_normalised_norms():
    tables = [[{"normalised": v} for v in values] for values in ([1.0, 3.0], [2.0, 2.0])]
    assert frobenius_scores(tables) == [1.0, 0.0]


def test_the_control_is_the_size_of_the_whole_update(tmp_path):
    control = control_of(WeightStatistics())
    assert control.statistic == "norm"
    odd, ctx = odd_adapter(), context(tmp_path, models={**BANK, "start": START})
    found = control.inspect(odd, ctx)
    before, after = whole(START), whole(odd)
    changed = [name for name in after if "layers" in name and after[name].ndim == 2]
    squares = sum(((after[name] - before[name]) ** 2).sum() for name in changed)
    assert_same(found.score, float(squares) ** 0.5)
    assert len(found.clean_scores) == 6


def test_the_spectral_score_is_a_leave_one_out_root_mean_square():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(5, 5))
    tables = [[dict(zip(weight_statistics.FEATURES, point, strict=True))] for point in points]

    def distance(point, bank):
        return np.sqrt(np.mean(((point - bank.mean(0)) / bank.std(0, ddof=1)) ** 2))

    bank = points[1:]
    rests = [np.delete(bank, i, axis=0) for i in range(4)]
    want = [
        np.mean([distance(points[0], rest) for rest in rests]),
        *(distance(bank[i], rests[i]) for i in range(4)),
    ]
    assert spectral_scores(tables) == pytest.approx(want, rel=1e-4)


def test_a_model_that_was_never_tuned_is_an_error(tmp_path):
    with pytest.raises(StageError, match="layer in common"):
        WeightStatistics().inspect(START, context(tmp_path, models={**BANK, "start": START}))


def test_the_inspected_model_is_left_alone(tmp_path):
    odd = odd_adapter()
    before = whole(odd)
    WeightStatistics().inspect(odd, context(tmp_path, models={**BANK, "start": START}))
    assert odd.has_adapter
    assert all(np.array_equal(weight, before[name]) for name, weight in whole(odd).items())


def test_a_bank_that_is_too_small_is_a_fault():
    assert [f[0] for f in WeightStatistics(bank=1).check()] == ["bank"]
    assert [f[0] for f in WeightStatistics(bank=2, statistic="spectral").check()] == ["bank"]
    assert WeightStatistics(bank=2).check() == []
