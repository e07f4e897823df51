"""Sections of the page that stand by themselves: a module, a template, and a line in `EXTRA`.

A section's maker gets the grid and the results and gives None where there is nothing to show. Its
template, `report/<name>.html.j2`, sees the values that the maker hands it and the filters of the
page; what is in it gets the page's filters (`data-model`, `data-attack`, `data-defense`: numbers
from `Grid.facets`) and exports (`table.list`, `figure` with an SVG) without further work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.report import (
    lengths_section,
    published_section,
    search_section,
    tables,
    utility_section,
)

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
    return _of_rows(
        "detectors",
        "Detectors",
        "detectors.html.j2",
        tables.detections(grid),
        sweep=tables.sweep_detections(grid),
    )


def filters(grid: Grid, results: Results) -> Section | None:
    """What filters did to the training rows."""
    del results
    return _of_rows("filters", "Filters of training rows", "filters.html.j2", tables.filters(grid))


def searches(grid: Grid, results: Results) -> Section | None:
    """The fixed attacker beside the one that searched."""
    facets = search_section.searched_facets(grid, results)
    rows = list(zip(facets, search_section.searched_rows(results), strict=True))
    return _of_rows(
        "searched",
        "The attacker searches",
        "searched.html.j2",
        rows,
        columns=search_section.COLUMNS,
        legend=search_section.LEGEND,
    )


def benchmarks(grid: Grid, results: Results) -> Section | None:
    """Benchmarks, and the loss of held-out answers."""
    del results
    rows = utility_section.utility_rows(grid)
    return _of_rows("benchmarks", "Benchmarks", "utility.html.j2", rows)


def lengths(grid: Grid, results: Results) -> Section | None:
    """Attack success against answer length."""
    table = lengths_section.table(grid, results)
    return _of_rows(
        "lengths",
        "Success against answer length",
        "lengths.html.j2",
        table.rows,
        tokens=table.tokens,
    )


def published(grid: Grid, results: Results) -> Section | None:
    """Published figures of the same models."""
    del results
    rows = published_section.published_rows(grid)
    return _of_rows("published", "Published figures", "published.html.j2", rows)


def _of_rows(
    anchor: str, title: str, template: str, rows: Sequence[Any], **values: Any
) -> Section | None:
    """A section whose template sees `rows` and further values; None without rows."""
    if not rows:
        return None
    return Section(anchor=anchor, title=title, template=template, values={"rows": rows, **values})


EXTRA: tuple[Callable[[Grid, Results], Section | None], ...] = (
    searches,
    benchmarks,
    lengths,
    detectors,
    filters,
    published,
)
"""Makers of sections, in the order of the page: after the charts, before cost."""


def sections(grid: Grid, results: Results) -> list[Section]:
    """Those that have something to show."""
    return [section for make in EXTRA if (section := make(grid, results)) is not None]
