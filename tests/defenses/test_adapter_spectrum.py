"""The adapter spectrum: every statistic against a whole singular value decomposition, and scores
against a bank in plain loops.
"""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats

from ftsec_ray.defenses.adapter_spectrum import AdapterSpectrum, statistic_of
from ftsec_ray.errors import StageError
from ftsec_ray.method import control_of
from ftsec_ray.models.load import merged
from ftsec_ray.models.lora import lora_modules
from ftsec_ray.models.precision import widened
from tests.defenses.shared import context, tiny_adapter, whole
from tests.fixtures_models import tiny_model
from tests.models.families import family_model
from tests.numeric import assert_same, float64, in_float64

QUICK = {"bank": 4}
STATISTICS = ("first_share", "effective_rank", "spectral_norm", "kurtosis", "frobenius")
SHAPES = ("first_share", "effective_rank", "kurtosis")
START = tiny_model()
BANK = {f"clean_bank:{i}": tiny_adapter(START, seed=10 + i) for i in range(6)}


def slow_statistic(name, delta):
    """The statistic of a whole matrix, from its full singular value decomposition."""
    sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    if name == "first_share":
        return max(sigma) ** 2 / sum(value**2 for value in sigma)
    if name == "effective_rank":
        return math.exp(stats.entropy(sigma))
    if name == "kurtosis":
        return stats.kurtosis(delta.astype(np.float64), axis=None)
    return max(sigma) if name == "spectral_norm" else np.linalg.norm(delta)


def slow_scores(tables, direction, share, *, is_count=False):
    """The scores in loops: `tables` are one list of values per model, the suspect first;
    `direction` is 1 or -1 for one side, 0 for both; `share` may be a number of layers instead.
    """

    def score(model, others):
        distances = []
        for layer, value in enumerate(model):
            values = [other[layer] for other in others]
            middle = sum(values) / len(values)
            spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))
            distance = (value - middle) / (spread + 1e-6 * abs(middle) + 1e-12)
            distances.append(direction * distance if direction else abs(distance))
        count = share if is_count else max(1, math.ceil(share * len(distances)))
        return sum(sorted(distances)[-count:]) / count

    suspect, *bank = tables
    rests = [[other for other in bank if other is not member] for member in bank]
    seen = [score(suspect, rest) for rest in rests]
    clean = [score(member, rest) for member, rest in zip(bank, rests, strict=True)]
    return [sum(seen) / len(seen), *clean]


def ctx_of(tmp_path, start=START, bank=None):
    return context(tmp_path, models={**(BANK if bank is None else bank), "start": start})


def concentrated(scale=1.0):
    """An adapter with the first direction of one layer enlarged, and all its updates scaled."""
    odd = tiny_adapter(START, seed=99)
    for module in lora_modules(odd):
        with torch.no_grad():
            module.B.mul_(scale)
            if module.name.endswith("layers.1.mlp.down_proj"):
                module.B[:, 0] *= 12.0
    return odd


def scored(method, suspect, tmp_path, **given):
    return replace(method, bank=len(given.get("bank") or BANK)).inspect(
        suspect, ctx_of(tmp_path, **given)
    )


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize(("out", "inner", "rank"), [(40, 24, 3), (24, 40, 8), (16, 16, 20)])
def test_a_statistic_of_factors_is_that_of_the_whole_matrix(out, inner, rank, name):
    generator = torch.Generator().manual_seed(0)
    with float64():
        left = torch.randn(out, rank, generator=generator)
        right = torch.randn(rank, inner, generator=generator)
        want = slow_statistic(name, (left @ right).numpy())
        for got in (statistic_of(name, left, right), statistic_of(name, left @ right, None)):
            # the whole matrix has more singular values: of the size of rounding, 1e-16 of the first
            assert got == pytest.approx(want, rel=1e-9)


def test_statistics_at_known_spectra():
    flat, peak = torch.eye(4), torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    found = {
        name: [statistic_of(name, matrix, None) for matrix in (flat, peak)] for name in STATISTICS
    }
    assert found["first_share"] == [0.25, 1.0]
    assert found["effective_rank"] == pytest.approx([4.0, 1.0], rel=1e-12)
    assert found["spectral_norm"] == [1.0, 4.0]
    assert found["frobenius"] == [2.0, 4.0]


@pytest.mark.parametrize("side", ["both", "concentrated"])
@pytest.mark.parametrize(("statistic", "direction"), [("first_share", 1), ("effective_rank", -1)])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_scores_are_those_of_plain_loops(statistic, direction, side, share):
    table = np.random.default_rng(0).lognormal(size=(5, 10))
    method = AdapterSpectrum(statistic=statistic, side=side, share=share)
    got, distances = method.scores(table)
    direction = 0 if side == "both" else direction
    assert_same(got, slow_scores(table.tolist(), direction, share))
    columns = [[[value] for value in column] for column in table.T.tolist()]
    assert_same(distances, np.array([slow_scores(one, direction, 1.0)[0] for one in columns]))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_score_of_a_model_is_that_of_its_whole_updates(statistic, tmp_path):
    with float64():
        start = in_float64(tiny_model())
        models = [tiny_adapter(start, seed=10 + i) for i in range(5)]
        suspect, bank = models[0], {f"clean_bank:{i}": m for i, m in enumerate(models[1:])}
        found = scored(
            AdapterSpectrum(statistic=statistic), suspect, tmp_path, start=start, bank=bank
        )
        before, tables = whole(start), []
        for after in map(whole, models):
            changed = [n for n in after if "layers" in n and after[n].ndim == 2]
            tables.append([slow_statistic(statistic, after[n] - before[n]) for n in changed])
    assert found.details["layers"] == len(tables[0]) == 14
    got = [found.score, *found.clean_scores]
    assert got == pytest.approx(slow_scores(tables, 0, 1.0), rel=1e-6)


@pytest.mark.parametrize("statistic", ["first_share", "effective_rank", "kurtosis"])
def test_a_layer_with_a_peaked_spectrum_is_found_and_named(statistic, tmp_path):
    one_layer = AdapterSpectrum(statistic=statistic, side="concentrated", share=0.01)
    found = scored(one_layer, concentrated(), tmp_path)
    assert found.score > 1.5 * max(found.clean_scores)
    assert found.details["furthest_layer"] == "model.layers.1.mlp.down_proj"
    # the furthest layer need not be the same against every subset of the bank
    assert found.score / 2 < found.details["furthest_distance"] <= found.score
    all_layers = scored(replace(one_layer, share=1.0), concentrated(), tmp_path)
    assert all_layers.score < found.score / 4


def test_a_flatter_spectrum_scores_high_on_both_sides_and_below_the_bank_on_one(tmp_path):
    flat = tiny_adapter(START, seed=99)
    for module in lora_modules(flat):
        with torch.no_grad():
            module.B.copy_(torch.linalg.qr(module.B).Q)
            module.A.copy_(torch.linalg.qr(module.A.T).Q.T)
    for statistic in ("first_share", "effective_rank"):
        method = AdapterSpectrum(statistic=statistic)
        either = scored(method, flat, tmp_path)
        assert either.score > 1.5 * max(either.clean_scores)
        one = scored(replace(method, side="concentrated"), flat, tmp_path)
        assert one.score < min(one.clean_scores)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_only_statistics_of_size_see_the_size_of_an_update(statistic, tmp_path):
    method = AdapterSpectrum(statistic=statistic)
    small, large = (scored(method, concentrated(scale), tmp_path).score for scale in (1.0, 8.0))
    if statistic in SHAPES:
        assert large == pytest.approx(small, rel=1e-3)
    else:
        assert large > 3 * small


def test_the_control_differs_in_the_statistic_alone_and_reads_only_the_size(tmp_path):
    method = AdapterSpectrum(share=0.5, side="concentrated")
    control = control_of(method)
    changed = [
        f.name for f in fields(method) if getattr(method, f.name) != getattr(control, f.name)
    ]
    assert changed == ["statistic"]
    assert control_of(control) is None
    swapped = concentrated()
    for module in lora_modules(swapped):
        with torch.no_grad():  # the same size, with all of it in one direction
            size = float((module.B @ module.A).norm())
            module.B[:, 1:] = 0.0
            module.B.mul_(size / float((module.B @ module.A).norm()))
    both = [scored(control, model, tmp_path).score for model in (concentrated(), swapped)]
    assert both[1] == pytest.approx(both[0], rel=1e-3)
    seen = [scored(method, model, tmp_path).score for model in (concentrated(), swapped)]
    assert seen[1] > 3 * seen[0]


def test_the_number_of_layers_that_count_is_not_raised_by_rounding():
    table = np.random.default_rng(0).lognormal(size=(5, 100))
    for count in range(1, 101):
        got = AdapterSpectrum(share=count / 100).scores(table)[0]
        assert_same(got, slow_scores(table.tolist(), 0, count, is_count=True))


def test_a_clean_model_scores_like_the_bank_on_average():
    """Over 300 draws of seven models of one kind: neither the mean score nor the rank gives the
    first one away.
    """
    generator, gaps, ranks = np.random.default_rng(0), [], []
    method = AdapterSpectrum(share=0.3)
    for _ in range(300):
        (score, *clean), _distances = method.scores(generator.normal(size=(7, 20)))
        gaps.append(score - np.mean(clean))
        ranks.append(np.mean(np.array(clean) < score))
    assert abs(np.mean(gaps)) < 0.1
    assert abs(np.mean(ranks) - 0.5) < 0.06


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families_and_wholly_tuned_models_are_scored_like_adapters(family, tmp_path):
    start = family_model(family, tied=True)
    models = [tiny_adapter(start, seed=10 + i, size=0.3) for i in range(4)]
    scores = []
    for suspects in (models, [merged(model) for model in models]):
        bank = {f"clean_bank:{i}": model for i, model in enumerate(suspects[1:])}
        found = scored(AdapterSpectrum(), suspects[0], tmp_path, start=start, bank=bank)
        scores.append([found.score, *found.clean_scores])
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)


def test_half_precision_is_read_in_float32(tmp_path):
    start = family_model("llama", tied=True)
    start.model.to(torch.bfloat16)
    for adapter in ("lora", "full"):
        models = [tiny_adapter(start, seed=i) for i in range(4)]
        if adapter == "full":
            models = [merged(model) for model in models]
        found = []
        for change in (lambda model: model, widened):
            bank = {f"clean_bank:{i}": change(model) for i, model in enumerate(models[1:])}
            method = AdapterSpectrum(statistic="effective_rank")
            found.append(
                scored(method, change(models[0]), tmp_path, start=change(start), bank=bank)
            )
        assert found[0] == found[1]
        assert math.isfinite(found[0].score)


def test_layers_that_not_every_model_changed_are_counted(tmp_path):
    narrow = tiny_adapter(START, seed=99)
    for module in lora_modules(narrow)[:3]:
        with torch.no_grad():
            module.B.zero_()
    found = scored(AdapterSpectrum(), narrow, tmp_path)
    assert (found.details["layers"], found.details["layers_left_out"]) == (11, 3)


def test_a_bank_of_rank_one_has_no_shape_and_a_suspect_of_rank_one_is_no_error(tmp_path):
    thin = {name: tiny_adapter(START, seed=i, rank=1) for i, name in enumerate(BANK)}
    for statistic in ("first_share", "effective_rank"):
        method = AdapterSpectrum(statistic=statistic)
        with pytest.raises(StageError, match="kurtosis"):
            scored(method, tiny_adapter(START, seed=99), tmp_path, bank=thin)
        found = scored(method, tiny_adapter(START, seed=99, rank=1), tmp_path)
        assert found.score > 2 * max(found.clean_scores)
    found = scored(AdapterSpectrum(statistic="kurtosis"), concentrated(), tmp_path, bank=thin)
    assert math.isfinite(found.score)


def test_a_model_that_was_never_tuned_is_an_error(tmp_path):
    with pytest.raises(StageError, match="layer in common"):
        scored(AdapterSpectrum(), START, tmp_path)


def test_the_inspected_model_and_the_bank_are_left_alone(tmp_path):
    odd = concentrated()
    before = [whole(model) for model in (START, odd, *BANK.values())]
    scored(AdapterSpectrum(), odd, tmp_path)
    assert odd.has_adapter
    after = [whole(model) for model in (START, odd, *BANK.values())]
    for old, new in zip(before, after, strict=True):
        assert all(np.array_equal(new[name], weight) for name, weight in old.items())


def test_parameters_outside_their_range_are_faults():
    for name, value in (("bank", 3), ("share", 0.0), ("share", 1.1), ("share", float("nan"))):
        assert [fault[0] for fault in AdapterSpectrum(**{name: value}).check()] == [name]
    assert AdapterSpectrum(bank=4, share=1e-3).check() == []
