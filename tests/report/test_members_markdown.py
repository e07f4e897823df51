"""Every stack beside its best member, in Markdown."""

from __future__ import annotations

from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.members_markdown import members_table
from ftsec_ray.results.read import Results

from .grids import BASE, Shares
from .test_answer import Make, row, with_rows

STACKED: Shares = {
    **BASE,
    **{
        (attack, "guard+weak"): {**own, "asr": 0.1, "harmful_rate": 0.1}
        for (attack, defense), own in BASE.items()
        if defense == "guard"
    },
}


def test_a_cell_is_the_success_of_stack_and_best_member_and_what_was_concluded(
    grid_of: Make,
) -> None:
    best = {
        ("poison", "guard + weak", "guard", "asr"): row(
            "better", 0.3, 0.1, "member", ci_low=-0.31, ci_high=-0.08
        ),
        ("jailbreak", "guard + weak", "guard", "harmful_rate"): row(
            "not tested", 0.2, 0.1, "member"
        ),
        ("poison", "guard + weak", "none", "asr"): row("better", 0.9, 0.1, "none"),
    }
    assert members_table(with_rows(grid_of(STACKED), best)).splitlines() == [
        "| model | stack | jailbreak | poison | utility |",
        "|---|---|---|---|---|",
        "| m | guard + weak | 0.10 / 0.20 guard: −0.10 not tested |"
        " 0.10 / 0.30 guard: −0.20 (−0.31 to −0.08) better | 0.88 · – · – |",
        "",
        "Attack success with the stack / with the best of its members that the sweep has alone,"
        " which is named, on the seeds and prompts that both have; their difference with its 95 %"
        " interval, below 0 where the stack does better; what the corrected comparison says. Last"
        " column: cacc · over_refusal_rate · coherent_rate without an attack.",
    ]


def test_a_stack_that_is_a_control_alone_has_no_row(grid_of: Make) -> None:
    control = ("poison", "guard + weak", "guard", "asr")
    rows = {
        control: row("better", 0.3, 0.1, "member"),
        ("poison", "guard", "guard + weak", "asr"): row("worse", 0.1, 0.3),
    }
    assert members_table(with_rows(grid_of(STACKED), rows)) == ""


def test_a_sweep_without_stacks_has_no_such_table(grid_of: Make, make_results) -> None:
    assert members_table(grid_of(BASE)) == ""
    assert members_table(build_grid(Results.open(make_results()))) == ""
