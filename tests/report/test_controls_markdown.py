"""Every defense beside its own control, in Markdown."""

from __future__ import annotations

from ftsec_ray.report.controls_markdown import controls_table
from ftsec_ray.report.grid import build_grid
from ftsec_ray.results.read import Results

from .grids import BASE, Shares
from .test_answer import PLACEBO, Make, compared, row


def lines_of(text: str) -> list[str]:
    return text.splitlines()


def test_a_row_is_a_defense_and_a_cell_its_success_that_of_its_control_and_the_conclusion(
    grid_of: Make,
) -> None:
    grid = compared(
        grid_of({**BASE, **PLACEBO}),
        {("poison", "guard"): "better", ("jailbreak", "guard"): "no difference shown"},
    )
    assert lines_of(controls_table(grid)) == [
        "| model | defense | jailbreak | poison | utility |",
        "|---|---|---|---|---|",
        "| m | none | 0.80 | 0.90 | 0.90 · – · – |",
        "| m | guard | 0.20 / 0.80 no difference | 0.30 / 0.90 better | 0.88 · – · – |",
        "",
        "Attack success with the defense / with its control, of several controls with the one that"
        " leaves least, and what the corrected comparison of the two says. Last column: cacc ·"
        " over_refusal_rate · coherent_rate without an attack.",
    ]


def test_of_several_controls_the_one_that_leaves_least_stands_beside_the_defense(
    grid_of: Make,
) -> None:
    strong: Shares = {
        (attack, "sham"): {**own, "asr": 0.25} if attack == "poison" else own
        for (attack, _), own in PLACEBO.items()
    }
    more = {("poison", "guard", "sham", "asr"): row("worse", 0.25, 0.3)}
    grid = compared(
        grid_of({**BASE, **PLACEBO, **strong}), {("poison", "guard"): "better"}, more=more
    )
    assert "| m | guard | 0.20 | 0.30 / 0.25 worse | 0.88 · – · – |" in controls_table(grid)


def test_a_sweep_without_controls_has_no_such_table(grid_of: Make, make_results) -> None:
    assert controls_table(grid_of(BASE)) == ""
    assert controls_table(build_grid(Results.open(make_results()))) == ""
