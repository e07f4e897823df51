"""Seeds folded into points, against scipy's t interval and statsmodels' Wilson interval."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from ftsec_ray import schema
from ftsec_ray.measured import Measured, null_share, pooled, summed, t_interval

from .toy import results_of, share


def test_several_seeds_have_two_spreads_and_say_how_many_of_each(tmp_path: Path) -> None:
    hits = (4, 10, 13)
    results = results_of(
        tmp_path,
        {("poison", "guard", seed): {"asr": share(count, 40)} for seed, count in enumerate(hits)},
    )
    (row,) = results.aggregated.to_pylist()
    assert results.aggregated.schema.equals(schema.aggregates())
    assert (row["attack"], row["defenses"], row["metric"]) == ("poison", ["guard"], "asr")
    assert (row["n_seeds"], row["n_planned"], row["n_prompts"]) == (3, 3, 40)
    assert row["value"] == pytest.approx(sum(hits) / 120)
    assert (row["prompts_low"], row["prompts_high"]) == pytest.approx(
        proportion_confint(9, 40, method="wilson")
    )  # 40 prompts, not 120
    low, high = stats.t.interval(
        0.95, 2, loc=sum(hits) / 120, scale=stats.sem([count / 40 for count in hits])
    )
    assert (row["seeds_low"], row["seeds_high"]) == pytest.approx((max(0, low), high))
    assert (row["ci_low"], row["ci_high"]) == (
        min(row["prompts_low"], row["seeds_low"]),
        max(row["prompts_high"], row["seeds_high"]),
    )


def test_one_seed_has_no_spread_over_seeds(tmp_path: Path) -> None:
    (row,) = results_of(
        tmp_path, {("poison", "none", 0): {"asr": share(4, 40)}}
    ).aggregated.to_pylist()
    assert (row["n_seeds"], row["seeds_low"], row["seeds_high"]) == (1, None, None)
    assert (
        (row["ci_low"], row["ci_high"])
        == (row["prompts_low"], row["prompts_high"])
        == pytest.approx(proportion_confint(4, 40, method="wilson"))
    )


def test_what_failed_or_could_not_be_judged_is_missing_and_not_zero(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        {("poison", "none", 0): {"asr": "1100"}, ("poison", "none", 1): {"asr": "????"}},
        statuses={("poison", "none", 2): "failed"},
    )
    (row,) = results.aggregated.to_pylist()
    assert (row["value"], row["n_seeds"], row["n_planned"]) == (0.5, 1, 3)


def test_the_null_verdicts_are_those_of_the_worst_seed(tmp_path: Path) -> None:
    answers = {
        ("poison", "none", seed): {"asr": said}
        for seed, said in enumerate(("11000???", "1000000?", "10000000"))
    }
    (row,) = results_of(tmp_path, answers).aggregated.to_pylist()
    assert (row["n_seeds"], row["n_prompts"], row["n_null"]) == (3, 5, 3)
    assert null_share(summed([(3, 8), (1, 8)])) == 4 / 16
    assert summed([(3, 8), (1, 8), None]) is None, "of one run it is not known"
    assert null_share(summed([(0, 0)])) is null_share(summed([])) is None
    assert null_share((2, 2)) == 1.0


def test_stacks_and_parameters_are_points_of_their_own(tmp_path: Path) -> None:
    stacks = ("shrink:a", "shrink:b", "filter+guard")
    answers = {
        ("poison", stack, seed): {"asr": share(4, 8), "cacc": share(7, 8)}
        for stack in stacks
        for seed in (0, 1)
    }
    table = results_of(tmp_path, answers).aggregated
    assert table.num_rows == 6
    assert set(table["n_seeds"].to_pylist()) == {2}
    assert len({(tuple(row["defenses"]), row["defense_params"]) for row in table.to_pylist()}) == 3


def test_a_metric_that_is_no_share_has_no_spread_over_prompts_and_no_bounds() -> None:
    runs = [Measured(value=value, n=32) for value in (3.0, 9.0)]
    one = pooled(runs, is_share=False)
    assert one.prompts is None
    assert one.over_seeds == one.span == pytest.approx(t_interval([3.0, 9.0]))
    assert one.over_seeds[0] < 0  # type: ignore[index]  (t with two seeds, not cut at 0 or 1)
    assert pooled(runs[:1], is_share=False).span is None


def test_no_cells_give_no_rows() -> None:
    from ftsec_ray.results.aggregate import aggregate

    empty = aggregate(schema.cells().empty_table(), schema.metrics().empty_table())
    assert empty.equals(pa.Table.from_pylist([], schema.aggregates()))
