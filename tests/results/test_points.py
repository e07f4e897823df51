"""Points of the grid: which cells are one point, what is pooled, and how methods are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftsec_ray.errors import DataError
from ftsec_ray.measured import Measured, pooled, t_interval, wilson
from ftsec_ray.report.grid import build_grid
from ftsec_ray.results.points import attack_name, method_names, points_of
from ftsec_ray.results.write import write_results
from tests.results.toy import META, Results, metric_row, tables_of, whole


def cell(name: str, attack: str = "poison", **changes: Any) -> dict[str, Any]:
    params = changes.pop("params", {})
    stack = changes.pop("stack", ())
    return {
        "cell": name,
        "model": "m",
        "family": "f",
        "model_params": 10,
        "task": "t",
        "attack": attack,
        "attack_params": json.dumps(params),
        "success_metric": "cacc",
        "defenses": [one for one, _ in stack],
        "defense_params": json.dumps([own for _, own in stack]),
        "seed": 0,
        "status": "done",
        **changes,
    }


def test_seeds_of_one_place_are_one_point_with_every_metric_over_those_that_have_it() -> None:
    cells = [cell("a", seed=3), cell("b", seed=5), cell("c", seed=5, task="u")]
    metrics = [
        metric_row("a", "cacc", 10, 40, 2),
        metric_row("b", "cacc", 30, 40, 0),
        metric_row("b", "asr", 0, 0, 7),
        metric_row("elsewhere", "cacc", 1, 2, 0),
    ]
    point, other = points_of(cells, metrics)
    assert (point.seeds, other.seeds) == ({"a": 3, "b": 5}, {"c": 5})
    assert {seed: one.value for seed, one in point.runs("cacc").items()} == {3: 0.25, 5: 0.75}
    whole = point.value("cacc")
    assert whole is not None
    low, high = t_interval([0.25, 0.75])
    assert (whole.value, whole.n, whole.n_null, whole.seeds) == (0.5, 40, 2, 2)
    assert whole.nulls == (2, 82)
    assert whole.prompts == wilson(0.5, 40)
    assert whole.over_seeds == (max(0.0, low), min(1.0, high))
    assert point.unjudged == {"asr": 7}
    assert point.value("asr") is None
    assert point.nulls("asr") == (7, 7)
    assert other.value("cacc") is None


def test_the_success_of_an_attack_that_drives_a_metric_down_is_what_is_left_of_one() -> None:
    (point,) = points_of([cell("a")], [metric_row("a", "cacc", 10, 40, 0)])
    success, accuracy = point.value(), point.value("cacc")
    assert success is not None
    assert accuracy is not None
    assert success.value == 0.75
    assert success.span == pytest.approx((1 - accuracy.high, 1 - accuracy.low))  # type: ignore[operator]
    assert point.successes[0] == success


def test_one_seed_is_its_own_mean_and_two_bring_a_spread_over_seeds() -> None:
    run = Measured(value=0.5, n=8, prompts=wilson(0.5, 8))
    assert pooled([run], is_share=True) is run
    assert run.over_seeds is None
    assert pooled([run, run], is_share=True).over_seeds == (0.5, 0.5)


def test_a_method_is_named_with_those_of_its_parameters_that_differ() -> None:
    cells = [
        cell("a", params={"rate": 0.1, "mode": "x"}, stack=[("guard", {"k": 1}), ("look", {})]),
        cell("b", params={"rate": 0.2, "mode": "x"}, stack=[("guard", {"k": 2})]),
        cell("c", "other", params={"rate": 0.2}),
    ]
    assert method_names(cells) == {
        "a": ("poison (rate 0.1)", "guard (k 1) + look"),
        "b": ("poison (rate 0.2)", "guard (k 2)"),
        "c": ("other", "none"),
    }
    points = points_of(cells, [])
    assert [attack_name(one, points) for one in points] == [
        "poison (rate 0.1)",
        "poison (rate 0.2)",
        "other",
    ]


def test_two_points_that_no_name_tells_apart_are_an_error_and_not_one_of_them(tmp_path) -> None:
    tables = tables_of({("poison", "none", seed): {"asr": "1100"} for seed in (0, 1)})
    cells = tables["cells"]
    place = cells.schema.get_field_index("attack_params")
    tables["cells"] = cells.set_column(place, cells.schema.field(place), [["{}", None]])
    results = Results.open(write_results(tmp_path, tables=whole(tables, META), meta=META))
    with pytest.raises(DataError, match="no name tells apart"):
        build_grid(results)
