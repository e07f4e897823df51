"""What detectors found among the models of the sweep, in Markdown."""

from __future__ import annotations

from ftsec_ray.report.detectors_markdown import detectors_table
from ftsec_ray.report.grid import build_grid
from ftsec_ray.results.read import Results

from .grids import BASE
from .test_answer import Make


def seed(clean: float, attacked: float) -> dict:
    """The detector's scores of one seed's models."""
    scores = {"none": clean, "poison": attacked}
    return {
        (attack, "look"): {"detect_raw": score, "detect_score": score}
        for attack, score in scores.items()
    }


def test_a_row_counts_pairs_of_models_and_those_above_all_unattacked_ones(grid_of: Make) -> None:
    seeds = [seed(0.1, 0.9), seed(0.2, 0.15), seed(0.3, 0.8), seed(0.4, 0.7)]
    grid = grid_of({}, hooks={"look": ["inspect"]}, phases={"poison": "pre"}, seeds=seeds)
    # 0.9, 0.8 and 0.7 are above all four unattacked models, 0.15 above one of them
    assert detectors_table(grid).splitlines()[:3] == [
        "| detector | attack | AUROC | found | models |",
        "|---|---|---|---|---|",
        "| look | poison | 0.81 | 0.75 (0.30–0.95) | 4 attacked, 4 not |",
    ]


def test_a_sweep_without_detectors_has_no_such_table(grid_of: Make, make_results) -> None:
    assert detectors_table(grid_of(BASE)) == ""
    assert detectors_table(build_grid(Results.open(make_results()))) == ""
