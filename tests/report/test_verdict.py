"""Sentences and tables against grids whose answer is known by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from ftsec_ray import schema
from ftsec_ray.measured import Measured, null_text, wilson
from ftsec_ray.report import charts, figures, sections, tables
from ftsec_ray.report.grid import Grid, build_grid
from ftsec_ray.report.page import write_report
from ftsec_ray.report.took_effect import difference
from ftsec_ray.report.verdict import effects_of, judge
from ftsec_ray.results.points import SUCCESS
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from tests.results.toy import whole

from .grids import BASE, SUCCESS_OF


def test_attack_success_is_asr_for_backdoors_and_the_harmful_rate_otherwise(
    grid_of: Callable[..., Grid],
) -> None:
    grid = grid_of(BASE)
    values = {attack: grid.value(("m", "t", attack, "none")) for attack in SUCCESS_OF}
    assert {attack: e.value for attack, e in values.items() if e} == {
        "none": 0.02,
        "poison": 0.9,
        "jailbreak": 0.8,
    }


def test_an_attack_that_does_nothing_undefended_proves_no_defense(
    grid_of: Callable[..., Grid],
) -> None:
    measured = {
        **BASE,
        ("poison", "none"): {
            "asr": 0.06,
            "asr_no_trigger": 0.05,
            "harmful_rate": 0.02,
            "cacc": 0.9,
        },
    }
    grid = grid_of(measured)
    assert {e.attack for e in effects_of(grid)} == {"jailbreak"}
    assert dict((attack.label, best) for attack, best in judge(grid).best)["poison"] is None


def test_gibberish_is_not_a_defense(grid_of: Callable[..., Grid]) -> None:
    measured = {
        key: {**own, "coherent_rate": 0.3 if key[1] == "guard" else 0.95}
        for key, own in BASE.items()
    }
    grid = grid_of(measured)
    assert {e.defense for e in effects_of(grid)} == {"weak"}
    rows = {row.defense: row for trade in charts.trades(grid) for row in trade.rows}
    assert rows["guard"].incoherent
    assert not rows["guard"].on_front


def test_a_detector_alone_is_no_defense_of_the_model(grid_of: Callable[..., Grid]) -> None:
    grid = grid_of(BASE, hooks={"weak": ["inspect"], "guard": ["revise_model"]})
    assert {e.defense for e in effects_of(grid)} == {"guard"}
    assert "weak" not in {row.defense for trade in charts.trades(grid) for row in trade.rows}


def test_detectors_are_not_judged_by_attacks_that_act_after_them(
    grid_of: Callable[..., Grid],
) -> None:
    found = {"detect_auroc": 0.5, "detect_score": 0.1, "detect_raw": 0.2}
    grid = grid_of(
        {(attack, "weak"): found for attack in ("none", "poison", "jailbreak")},
        hooks={"weak": ["inspect"]},
        phases={"poison": "during", "jailbreak": "post"},
    )
    assert [row["attack"] for row in tables.detections(grid)] == ["none", "poison"]
    assert [row["attack"] for row in tables.sweep_detections(grid)] == ["poison"]


def test_a_drop_within_the_noise_is_not_called_clear(grid_of: Callable[..., Grid]) -> None:
    few = grid_of(
        {**BASE, ("jailbreak", "guard"): {"asr": 0.7, "harmful_rate": 0.7, "cacc": 0.88}}, n=20
    )
    clear = {(e.attack, e.defense): e.clear for e in effects_of(few)}
    assert clear["jailbreak", "guard"] == 0
    assert clear["poison", "guard"] == 1


def test_the_interval_of_a_difference_is_newcombes() -> None:
    one, two = (
        Measured(value=hits / n, n=n, prompts=wilson(hits / n, n))
        for hits, n in ((56, 70), (48, 80))
    )
    drop, low, high = difference(one, two)
    assert drop == pytest.approx(0.2)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)  # Newcombe 1998, table II, method 10


def test_the_front_holds_exactly_the_defenses_that_none_beats_on_both_sides(
    grid_of: Callable[..., Grid],
) -> None:
    (trade,) = charts.trades(grid_of(BASE))
    rows = {row.defense: row for row in trade.rows}
    assert {name for name, row in rows.items() if row.on_front} == {"guard", "weak"}
    assert (rows["guard"].utility, rows["guard"].safety) == (
        pytest.approx(0.88),
        pytest.approx(0.75),
    )
    assert (rows["guard"].worst, rows["guard"].worst_attack) == (pytest.approx(0.7), "poison")


def _costs(**seconds: float) -> dict[tuple[str, str], list[float]]:
    return {
        (attack, defense): [0.0, cost] for defense, cost in seconds.items() for attack in SUCCESS_OF
    }


def test_cost_is_the_third_aim_of_the_front(grid_of: Callable[..., Grid]) -> None:
    (trade,) = charts.trades(grid_of(BASE, spent=_costs(none=3600, weak=7200, guard=7200)))
    rows = {row.defense: row for row in trade.rows}
    assert {name: row.hours for name, row in rows.items()} == {
        "none": 1.0,
        "weak": 2.0,
        "guard": 2.0,
    }
    assert all(row.on_front for row in rows.values())  # undefended is the cheapest by far
    (trade,) = charts.trades(grid_of(BASE, spent=_costs(none=7100, weak=7200, guard=7300)))
    assert {row.defense for row in trade.rows if row.on_front} == {
        "guard",
        "weak",
    }  # as cheap as makes no difference
    assert "CPU-hours per cell" in trade.svg
    (trade,) = charts.trades(grid_of(BASE))
    assert "hours" not in trade.svg


def test_cost_is_in_gpu_hours_where_a_gpu_was_used(grid_of: Callable[..., Grid]) -> None:
    grid = grid_of(
        BASE, spent={**_costs(none=10, weak=10, guard=10), ("poison", "guard"): [1800.0, 9.0]}
    )
    assert grid.cost_unit == "GPU-hours"
    assert grid.hours(("m", "t", "poison", "guard")) == 0.5
    assert grid.hours(("m", "t", "poison", "weak")) == 0
    assert grid_of(BASE).hours(("m", "t", "poison", "weak")) is None


def test_null_verdicts_are_counted_from_the_answers_where_the_metrics_do_not_tell_them(
    grid_of: Callable[..., Grid],
) -> None:
    grid = grid_of(
        BASE,
        n=6,
        verdicts={
            ("jailbreak", "none"): ["complied"] * 6 + [None] * 2,
            ("jailbreak", "guard"): ["refused"] * 8,
        },
    )
    told = {
        defense: grid.value(("m", "t", "jailbreak", defense))
        for defense in ("none", "guard", "weak")
    }
    assert {name: one and (one.nulls, one.null_text) for name, one in told.items()} == {
        "none": ((2, 8), "25 % null"),
        "guard": ((0, 6), "0 % null"),
        "weak": (None, "? null"),
    }
    assert grid.value(("m", "t", "jailbreak", "none"), "cacc").nulls is None  # type: ignore[union-attr]
    assert null_text((1, 1000)) == "< 1 % null"  # never rounded away


def test_a_metric_of_which_no_prompt_could_be_judged_says_so(
    grid_of: Callable[..., Grid], tmp_path: Path
) -> None:
    grid_of(BASE, verdicts={("none", "weak"): [None] * 5})
    results = Results.open(tmp_path / "r")
    rows = [
        (
            {**row, "value": None, "n": 0, "ci_low": None, "ci_high": None}
            if (row["cell"], row["metric"]) == ("none/weak/0", "harmful_rate")
            else row
        )
        for row in results.metrics.to_pylist()
    ]
    changed = {
        "cells": results.cells,
        "metrics": pa.Table.from_pylist(rows, schema.metrics()),
        "generations": results.generations,
        "stages": results.stages,
    }
    grid = build_grid(
        Results.open(
            write_results(tmp_path / "r", tables=whole(changed, results.meta), meta=results.meta)
        )
    )
    heat = tables.heat(grid)
    assert heat.data["harmful_rate"][heat.keys.index(("m", "t", "none", "weak"))] == [
        -1,
        "not judged",
        "",
        0,
        "100 % null",
        1,
        "",
    ]


def test_a_section_of_its_own_needs_one_entry(
    make_results: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extra(grid: Grid, results: Results) -> sections.Section:
        return sections.Section(
            anchor="extra",
            title="Extra <b>",
            template="filters.html.j2",
            values={"rows": tables.filters(grid)},
        )

    monkeypatch.setattr(sections, "EXTRA", (*sections.EXTRA, extra, lambda grid, results: None))
    text = write_report(make_results()).read_text(encoding="utf-8")
    assert '<a href="#extra">Extra &lt;b&gt;</a>' in text
    assert "<table" in text[text.index('<section id="extra">') : text.index('<section id="cost">')]


def test_a_defense_without_every_attack_is_left_out_of_the_means_and_named(
    grid_of: Callable[..., Grid],
) -> None:
    (trade,) = charts.trades(
        grid_of({key: own for key, own in BASE.items() if key != ("poison", "weak")})
    )
    assert trade.left_out == ["weak"]
    assert {row.defense for row in trade.rows} == {"none", "guard"}


def test_several_seeds_widen_the_interval_by_how_much_they_differ(
    grid_of: Callable[..., Grid],
) -> None:
    seeds = [{("jailbreak", "none"): {"harmful_rate": value}} for value in (0.2, 0.5, 0.8)]
    found = grid_of({}, seeds=seeds).value(("m", "t", "jailbreak", "none"), SUCCESS)
    assert found is not None
    assert (found.value, found.seeds, found.n) == (pytest.approx(0.5), 3, 200)
    half = 4.302653 * 0.3 / 3**0.5  # t(0.975, 2) x sd / sqrt(3)
    assert (found.low, found.high) == (
        pytest.approx(max(0, 0.5 - half), abs=1e-5),
        pytest.approx(min(1, 0.5 + half), abs=1e-5),
    )
    same = grid_of({}, seeds=[{("jailbreak", "none"): {"harmful_rate": 0.5}}] * 3).value(
        ("m", "t", "jailbreak", "none")
    )
    assert same is not None
    assert (same.low, same.high) == (
        pytest.approx(wilson(0.5, 200)[0]),
        pytest.approx(wilson(0.5, 200)[1]),
    )


def test_labels_name_the_parameters_that_differ_and_no_others(
    make_results: Callable[..., Path],
) -> None:
    results = Results.open(make_results())
    cells = results.cells.to_pylist()
    turn = 0
    for cell in cells:
        if cell["attack"] == "badnets":
            turn += 1
            cell["attack_params"] = json.dumps({"rate": 0.1, "trigger": "cf" if turn % 2 else "mn"})
    changed = {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        "metrics": results.metrics,
        "generations": results.generations,
        "stages": results.stages,
    }
    grid = build_grid(
        Results.open(
            write_results(results.folder, tables=whole(changed, results.meta), meta=results.meta)
        )
    )
    labels = [attack.label for attack in grid.attacks]
    assert labels[0] == "none"
    assert [label for label in labels if label.startswith("badnets")] == [
        "badnets (trigger cf)",
        "badnets (trigger mn)",
    ]
    assert "badedit" in labels


def test_text_is_readable_on_every_colour_of_the_heatmap() -> None:
    colours = figures.heat_colours()
    assert len(set(colours)) == figures.HEAT_STEPS
    assert min(figures.contrast(back, figures.HEAT_TEXT) for back in colours) >= 4.5
    assert figures.contrast("#000000", "#ffffff") == pytest.approx(21)


MACHADO = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}
"""Linear RGB as people with each colour blindness see it (Machado, Oliveira and Fernandes 2009,
severity 1).
"""


@pytest.mark.parametrize("kind", MACHADO)
def test_every_colour_of_the_heatmap_is_darker_than_the_one_before_in_every_colour_blindness(
    kind: str,
) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        seen = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in MACHADO[kind]]
        return 0.2126 * seen[0] + 0.7152 * seen[1] + 0.0722 * seen[2]

    light = [luminance(one) for one in figures.heat_colours()]
    assert all(a - b > 0.015 for a, b in pairwise(light))


def test_sharing_is_counted_as_what_every_cell_alone_would_have_done(
    make_results: Callable[..., Path],
) -> None:
    results = Results.open(make_results())
    cost = tables.cost(results)
    rows = results.stages.to_pylist()
    assert cost["total"] == pytest.approx(sum(r["wall_s"] for r in rows))
    assert cost["unshared"] == pytest.approx(sum(r["wall_s"] * r["cells_served"] for r in rows))
    assert sum(kind["share"] for kind in cost["kinds"]) == pytest.approx(1)


def test_labels_beside_dots_keep_their_distance() -> None:
    placed = figures._spread([50, 50.5, 51, 180], gap=12, low=10, high=190)
    assert all(b - a >= 12 - 1e-9 for a, b in pairwise(placed))
    assert all(10 <= y <= 190 for y in placed)
