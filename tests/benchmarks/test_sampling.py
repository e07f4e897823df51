"""The sample of cells is spread evenly, and its total is honest about what it does not know."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.plan import build_plan
from tests.benchmarks.sampling import Ran, attack_of, draw, estimate, model_of, stack_of


@pytest.fixture(scope="module")
def cells():
    return build_plan(
        load_sweep(
            {
                "name": "s",
                "models": ["ladder:0.2m", "ladder:1m"],
                "task": "microworld",
                "attacks": ["none", "badnets", "harmful_tuning"],
                "defenses": ["none", "onion", "shrink", "random_mask"],
            }
        )
    ).cells


def seconds_of(cell):
    """A model that is ten times slower, and an attack that adds a little."""
    return (10.0 if model_of(cell) == "ladder:1m" else 1.0) * (
        1.1 if attack_of(cell) == "badnets" else 1.0
    )


def ran(cells):
    parts = {"process": 0.0, "import": 0.25}
    return [Ran(cell=cell, wall_s=seconds_of(cell), parts=parts, metrics={}) for cell in cells]


def test_a_sample_of_one_per_pair_meets_every_attack_with_every_stack_once_and_every_model_equally(
    cells,
):
    chosen = draw(cells, 12, seed=3)
    pairs = Counter((attack_of(c), stack_of(c)) for c in chosen)
    assert pairs == {(attack_of(c), stack_of(c)): 1 for c in cells}
    assert Counter(map(model_of, chosen)) == {"ladder:0.2m": 6, "ladder:1m": 6}


def test_the_same_seed_draws_the_same_cells_and_zero_draws_all(cells):
    assert [c.digest for c in draw(cells, 7, seed=1)] == [c.digest for c in draw(cells, 7, seed=1)]
    assert {c.digest for c in draw(cells, 0, seed=1)} == {c.digest for c in cells}


def test_with_all_cells_measured_the_total_is_their_sum_over_the_slots_without_an_interval(cells):
    found = estimate(cells, ran(cells), seconds=Ran.whole, slots=2)
    assert found.total == pytest.approx(sum(map(seconds_of, cells)) / 2)
    assert found.low == pytest.approx(found.high) == pytest.approx(found.total)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_the_interval_of_a_sample_holds_the_true_total_and_never_starts_below_what_was_measured(
    cells, count
):
    measured = ran(draw(cells, count, seed=0))
    found = estimate(cells, measured, seconds=Ran.whole, slots=2)
    assert max(found.low, sum(one.wall_s for one in measured) / 2) == found.low
    assert found.low <= sum(map(seconds_of, cells)) / 2 <= found.high < math.inf


def test_one_measured_cell_leaves_the_total_open_above(cells):
    found = estimate(cells, ran(cells[:1]), seconds=Ran.whole, slots=1)
    assert found.high == math.inf
    assert found.total == pytest.approx(len(cells) * seconds_of(cells[0]))


def test_work_leaves_out_the_start_and_the_imports(cells):
    assert ran(cells[:1])[0].work() == pytest.approx(seconds_of(cells[0]) - 0.25)
