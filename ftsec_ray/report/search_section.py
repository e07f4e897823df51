"""Fixed and searched attacker side by side, as a section of the page and as Markdown.

Both are measured on the half of the prompts that did not choose the setting, so that the choice
favours neither of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftsec_ray.identity import canonical
from ftsec_ray.report.grid import seeds_text
from ftsec_ray.report.markdown_table import markdown_table
from ftsec_ray.report.number_text import share, signed
from ftsec_ray.results.points import place_of

if TYPE_CHECKING:
    from ftsec_ray.report.grid import Grid
    from ftsec_ray.results.read import Results

Row = Mapping[str, Any]
COLUMNS = (
    "model",
    "attack",
    "defenses",
    "metric",
    "fixed",
    "searched",
    "clean accuracy lost (fixed; searched)",
    "over-refusal (fixed; searched)",
    "coherent (fixed; searched)",
    "seeds (fixed; searched)",
    "trials within the bound",
    "chosen setting",
)
LEGEND = (
    "Fixed: the attack with its own parameters. Searched: the strongest trial whose loss of clean"
    " accuracy stayed within the bound. The trial is chosen on one half of the prompts; all numbers"
    " are from the other half (95 % interval)."
)


def searches_markdown(results: Results) -> str:
    """The same as a Markdown table; empty without a search."""
    rows = searched_rows(results)
    if not rows:
        return ""
    return markdown_table(COLUMNS, rows, LEGEND)


def searched_rows(results: Results) -> list[tuple[str, ...]]:
    """Every search of a run under `COLUMNS`."""
    found = _in_order(results)
    several = len({row["task"] for row in found}) > 1
    return [
        (
            f"{row['model']}, {row['task']}" if several else row["model"],
            row["attack"].partition(" ")[2],
            "+".join(row["defenses"]) or "none",
            row["metric"],
            _value(row, "fixed_"),
            _value(row, "") if row["status"] == "chosen" else row["status"],
            (
                f"{signed(row['fixed_report_utility_loss'])};"
                f" {signed(row['report_utility_loss'])} (bound {row['max_utility_loss']:g})"
            ),
            (
                f"{share(row['fixed_report_over_refusal_rate'])};"
                f" {share(row['report_over_refusal_rate'])}"
            ),
            f"{share(row['fixed_report_coherent_rate'])}; {share(row['report_coherent_rate'])}",
            _seeds(row),
            f"{row['n_within']} of {row['n_done']}"
            + (f", {row['n_failed']} failed" if row["n_failed"] else ""),
            _setting(row),
        )
        for row in found
    ]


def searched_facets(grid: Grid, results: Results) -> list[tuple[int, int, int] | None]:
    """Where each of those rows stands in the axes of the page: at the searched attacker, or at the
    fixed one where nothing was chosen.
    """
    key_of = {place_of(cell): grid.place[cell["cell"]] for cell in results.cells.to_pylist()}
    keys = [
        key_of.get(place_of(row)) or key_of.get(_fixed_place(row)) for row in _in_order(results)
    ]
    return [None if key is None else grid.facets(key) for key in keys]


def _in_order(results: Results) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results.searches.to_pylist()
    return sorted(
        found,
        key=lambda row: (
            *(row[name] or "" for name in ("model", "task", "attack", "attack_params")),
            len(row["defenses"]),
            row["defenses"],
        ),
    )


def _fixed_place(row: Row) -> tuple[Any, ...]:
    """Where the cells of the attack without its search stand."""
    own = {
        name: value
        for name, value in json.loads(row["attack_params"] or "{}").items()
        if name != "search"
    }
    return place_of(
        {**row, "attack": row["attack"].partition(" ")[2], "attack_params": canonical(own)}
    )


def _seeds(row: Row) -> str:
    """The seeds measured of both attackers; without a chosen trial there is only one."""
    return (
        f"{seeds_text(row['fixed_n_seeds'])};"
        f" {seeds_text(row['n_seeds']) if row['status'] == 'chosen' else '–'}"
    )


def _value(row: Row, side: str) -> str:
    value, low, high, n = (row[f"{side}report_{name}"] for name in ("value", "low", "high", "n"))
    null = row[f"{side}report_n_null"] or 0
    return (
        "not measured"
        if value is None
        else f"{value:.2f} ({low:.2f}–{high:.2f}), n {n}"
        + (f" [{null / (null + n):.0%} null]" if null else "")
    )


def _setting(row: Row) -> str:
    """The searched parameters of the chosen trial, or why there is none."""
    if row["trial"] is None:
        return str(row["note"] or "")
    own, tune = json.loads(row["params"]), json.loads(row["training"])
    names = [one["name"] for one in json.loads(row["attack_params"])["search"]["ranges"]]
    values = {
        name: tune[name.partition(".")[2]] if name.startswith("training.") else own[name]
        for name in names
    }
    setting = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
    return f"{setting} (trial {row['trial']})"
