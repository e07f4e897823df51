"""Sections of the page that stand by themselves: a module, a template, and a line in `EXTRA`.

A section's maker gets the grid and the results and gives None where there is nothing to show. Its
template, `report/<name>.html.j2`, sees the values that the maker hands it and the filters of the
page; what is in it gets the page's filters (`data-model`, `data-attack`, `data-defense`: numbers
from `Grid.facets`) and exports (`table.list`, `figure` with an SVG) without further work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.report import lengths_section, search_section, tables, utility_section

if TYPE_CHECKING:
    from ftsec_ray.report.grid import Grid
    from ftsec_ray.results.read import Results


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page."""

    anchor: str
    """Its id, and what links lead to."""
    title: str
    template: str
    """A file of this package."""
    values: Mapping[str, Any]
    """What the template sees beside the page's own values."""


def detectors(grid: Grid, results: Results) -> Section | None:
    """What detectors say of the models."""
    del results
    rows = tables.detections(grid)
    return (
        Section(
            anchor="detectors",
            title="Detectors",
            template="detectors.html.j2",
            values={"detections": rows},
        )
        if rows
        else None
    )


def filters(grid: Grid, results: Results) -> Section | None:
    """What filters did to the training rows."""
    del results
    rows = tables.filters(grid)
    return (
        Section(
            anchor="filters",
            title="Filters of training rows",
            template="filters.html.j2",
            values={"rows": rows},
        )
        if rows
        else None
    )


def searches(grid: Grid, results: Results) -> Section | None:
    """The fixed attacker beside the one that searched."""
    rows = list(
        zip(
            search_section.searched_facets(grid, results),
            search_section.searched_rows(results),
            strict=True,
        )
    )
    values = {"columns": search_section.COLUMNS, "rows": rows, "legend": search_section.LEGEND}
    return (
        Section(
            anchor="searched",
            title="The attacker searches",
            template="searched.html.j2",
            values=values,
        )
        if rows
        else None
    )


def benchmarks(grid: Grid, results: Results) -> Section | None:
    """Benchmarks, and the loss of held-out answers."""
    del results
    rows = utility_section.utility_rows(grid)
    return (
        Section(
            anchor="benchmarks",
            title="Benchmarks",
            template="utility.html.j2",
            values={"rows": rows},
        )
        if rows
        else None
    )


def lengths(grid: Grid, results: Results) -> Section | None:
    """Attack success against answer length."""
    found = lengths_section.table(grid, results)
    return (
        Section(
            anchor="lengths",
            title="Success against answer length",
            template="lengths.html.j2",
            values={"tokens": found.tokens, "rows": found.rows},
        )
        if found.rows
        else None
    )


EXTRA: tuple[Callable[[Grid, Results], Section | None], ...] = (
    searches,
    benchmarks,
    lengths,
    detectors,
    filters,
)
"""Makers of sections, in the order of the page: after the charts, before cost."""


def sections(grid: Grid, results: Results) -> list[Section]:
    """Those that have something to show."""
    return [section for make in EXTRA if (section := make(grid, results)) is not None]
