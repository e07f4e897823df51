"""Checks whether the tables and the page of an archive follow from its plan and its verdicts: each
is recomputed with the code that made it, and compared.

Checksums also match forged content. What is recomputed here must be consistent, so that no single
number can be edited. What cannot be derived from an archive is listed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.search_rounds import nothing_known
from ftsec_ray.results.archive import Archive, PackedPlan
from ftsec_ray.results.archive_limits import check_table
from ftsec_ray.results.archive_zip import PAGE
from ftsec_ray.results.metrics_again import cell_words, metrics_again
from ftsec_ray.results.paired import Correction
from ftsec_ray.results.planned_columns import (
    cell_columns,
    facts_that_differ,
    stage_columns,
)
from ftsec_ray.results.read import Results
from ftsec_ray.results.search_results import look_at_results, search_row
from ftsec_ray.results.stage_warnings import StageWarning
from ftsec_ray.results.verify_code import listed
from ftsec_ray.results.verify_findings import HOSTILE, NOT_OF_THE_ARCHIVE, Findings
from ftsec_ray.results.write import PART, RUN_FILE, TABLES, table_schema

if TYPE_CHECKING:
    import pyarrow as pa

Render = Callable[[Results], str]
"""Makes the report page of results."""
_TOLERANCE = 1e-6
"""Relative; p-values of another scipy version differ by less."""
_SHOWN = 3
_ALWAYS_UNCHECKED = (
    "completions and verdicts: whether these models gave these answers, and the judges these"
    " verdicts",
    "weights: an archive holds none",
    "stages: their durations, tokens, hosts, errors and warnings, and the recorded package"
    " versions",
)


@dataclass(frozen=True, kw_only=True)
class RunMeta:
    """The content of `run.json` as this version writes it."""

    schema: str
    rows: dict[str, int]
    sweep: str
    question: str | None
    plan: str
    versions: dict[str, str]
    counts: dict[str, int]
    defense_hooks: dict[str, list[str]]
    controls: list[str]
    own_controls: dict[str, dict[str, Any]]
    correction: Correction
    warnings: list[StageWarning]
    spent: dict[str, list[float]]
    sweep_text: str


def look_at_tables(
    found: Findings,
    archive: Archive,
    packed: PackedPlan,
    plan: Plan | None,
    results: Results,
    render: Render,
) -> None:
    """Record everything in the tables and the page that does not follow from the plan and the
    verdicts.

    Args:
        found: Receives the findings.
        archive: The opened archive, with its checksums checked.
        packed: Its plan.
        plan: The same plan as this machine makes it; None if it makes another one.
        results: Its tables, from `open_tables`.
        render: Makes a report page.
    """
    meta = archive.read(f"results/{RUN_FILE}", RunMeta)
    if (
        meta is None
        or set(results.meta) != set(RunMeta.__annotations__)
        or set(meta.rows) != set(TABLES)
    ):
        found.add("tables", [f"{RUN_FILE} is not a file that ftsec writes for schema {_NOW}"])
        found.unchecked.append("metrics, comparisons and report: not of this schema")
        return
    is_of_plan = searched = False
    with found.hostile("tables", "the tables"):
        is_of_plan = _is_of_plan(found, archive, packed, results)
        searched = bool(results.table("searches").num_rows or (plan and plan.searches))
    if not is_of_plan:
        return
    with found.hostile("tables", "the tables of cells and stages"):
        _look_at_plan(found, results, meta, archive, plan)
    with found.hostile("metrics", "metrics"):
        _look_at_metrics(found, results)
    with found.hostile("comparisons", "comparisons"):
        _look_at_comparisons(found, results, meta)
    if searched:
        with found.hostile("searches", "searches"):
            _look_at_searches(found, results, plan)
    with found.hostile("report", "report.html"):
        _look_at_page(found, archive, results, render)


_NOW = schema.SCHEMA_VERSION


def open_tables(found: Findings, archive: Archive, folder: Path) -> Results | None:
    """The results in an archive, unpacked into a folder; None if they cannot be opened, and
    ArchiveError if they exceed the limits.
    """
    found.unchecked += _ALWAYS_UNCHECKED
    try:
        archive.read(f"results/{RUN_FILE}", dict)  # checks the limits of JSON
        archive.unpack("results", folder)
        for name in TABLES:
            if (folder / name / PART).is_file():
                where = f"results/{name}/{PART}"
                check_table(folder / name / PART, where, table_schema(name))
        return Results.open(folder)
    except NOT_OF_THE_ARCHIVE:
        raise
    except HOSTILE as fault:
        if not any(name.startswith("results/") for name in archive.damage):  # already reported
            reason = str(getattr(fault, "what", fault)).replace(str(folder), "results")
            found.add("tables", [f"they cannot be opened: {reason}"])
        found.unchecked.append("tables and report: they cannot be opened")
        return None


def _is_of_plan(found: Findings, archive: Archive, packed: PackedPlan, results: Results) -> bool:
    """Whether the tables belong to the plan; then the plan limits their size."""
    words = []
    if results.meta.get("plan") != archive.manifest.plan:
        words.append("they belong to another plan than the archive")
    for name, column, wanted in (
        ("cells", "cell", [cell.cell for cell in packed.cells]),
        ("stages", "digest", [stage.digest for stage in packed.stages]),
    ):
        if sorted(map(str, results.table(name, trials=True)[column].to_pylist())) != sorted(wanted):
            words.append(f"the table {name} does not hold the {name} of the plan")
    found.add("tables", words)
    if words:
        found.unchecked.append("metrics, comparisons and report: they belong to another plan")
    return not words


# What the plan decides.


def _look_at_plan(
    found: Findings, results: Results, meta: RunMeta, archive: Archive, plan: Plan | None
) -> None:
    cells = results.table("cells", trials=True).to_pylist()
    statuses = [row["status"] for row in cells]
    counts = {status: statuses.count(status) for status in schema.STATUSES}
    if meta.counts != counts or set(statuses) - set(schema.STATUSES):
        found.add("tables", [f"{RUN_FILE}: counts {meta.counts}, but the cells give {counts}"])
    if plan is None:
        found.unchecked.append("cells and stages against the plan: this machine makes another plan")
        return
    stages = results.stages.to_pylist()
    words = list(_cells_differ(plan, cells)) + list(_stages_differ(plan, stages))
    words += _statuses_differ(plan, cells, stages)
    wrong = facts_that_differ(plan, results.meta, archive.text(archive.manifest.file) or "")
    words += [f"{RUN_FILE}: differs from the sweep: {', '.join(wrong)}"] * bool(wrong)
    found.add("tables", words)
    if not words:
        found.checked.append(f"{len(cells)} cells and {len(stages)} stages agree with the plan")


def _cells_differ(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    planned = {cell.digest: cell_columns(plan.spec.name, cell) for cell in plan.cells}
    wrong = [
        f"{cell_words(planned[row['cell']])}: {name} {row[name]!r}, planned {value!r}"
        for row in rows
        for name, value in planned[row["cell"]].items()
        if row[name] != value
    ]
    if wrong:
        yield f"cells: {len(wrong)} values differ from the plan: {_first(wrong)}"


def _stages_differ(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wrong = [
        f"{row['digest']}: {name} {row[name]!r}, planned {value!r}"
        for row in rows
        for name, value in stage_columns(plan, row["digest"]).items()
        if row[name] != value
    ]
    if wrong:
        yield f"stages: {len(wrong)} values differ from the plan: {_first(wrong)}"


def _statuses_differ(
    plan: Plan, cells: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Cells whose status does not follow from their stages: a cell is done when all of them are."""
    done = {row["digest"] for row in stages if row["status"] == "done"}
    answers = {cell.digest: cell.answers for cell in plan.cells}
    wrong = [
        f"{cell_words(row)} is {row['status']}"
        for row in cells
        if (row["status"] == "done") != done.issuperset(answers[row["cell"]])
    ]
    return [f"cells: {len(wrong)} have a status unlike their stages: {_first(wrong)}"] * bool(wrong)


# What the verdicts decide.


def _look_at_metrics(found: Findings, results: Results) -> None:
    cells, metrics, generations = (
        results.table(name, trials=True) for name in ("cells", "metrics", "generations")
    )
    again = metrics_again(cells, metrics, generations)
    if again.differ:
        found.add(
            "metrics",
            [
                f"{len(again.differ)} do not follow from the verdicts in `generations`:"
                f" {_first(again.differ)}"
            ],
        )
    if again.agree:
        found.checked.append(
            f"{again.agree} metrics follow from the verdicts on {again.answers} answers"
        )
    if again.unchecked:
        names = schema.in_order(again.unchecked)
        found.unchecked.append(f"metrics that do not follow from verdicts: {listed(names)}")
    if generations.num_rows and generations["completion"].null_count == generations.num_rows:
        found.unchecked.append("texts of answers: not stored (keep_generations: false)")
    if results.table("lengths", trials=True).num_rows:
        found.unchecked.append(
            "success by answer length: the verdicts on shorter answers are not stored"
        )


def _look_at_comparisons(found: Findings, results: Results, meta: RunMeta) -> None:
    stored, made = results.table("comparisons"), results.compared(meta.correction)
    wrong = list(_rows_differ(stored, made, ("model", "attack", "defenses", "kind", "metric")))
    if wrong:
        found.add("comparisons", [f"{len(wrong)} do not follow from the tables: {_first(wrong)}"])
    else:
        found.checked.append(f"{stored.num_rows} comparisons follow from metrics and verdicts")


def _look_at_searches(found: Findings, results: Results, plan: Plan | None) -> None:
    if plan is None:
        found.unchecked.append("searches: this machine makes another plan")
        return
    import pyarrow as pa

    stored = results.table("searches")
    look = look_at_results(results) if plan.searches else nothing_known
    rows = [search_row(search, look) for search in plan.searches]
    made = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["search"])), schema.searches())
    # For a chosen setting, the tables hold only the answers of the reporting half.
    unknown = {name for name in made.column_names if name.startswith("choose_")}
    wrong = list(_rows_differ(stored, made, ("model", "attack", "defenses"), unknown))
    if wrong:
        found.add("searches", [f"{len(wrong)} do not follow from the tables: {_first(wrong)}"])
    else:
        found.checked.append(f"{stored.num_rows} searches follow from the answers to their trials")
    found.unchecked.append("searches: what the chosen settings measured on the choosing half")


def _rows_differ(
    stored: pa.Table,
    made: pa.Table,
    names: Sequence[str],
    unknown: set[str] = frozenset(),  # type: ignore[assignment]
) -> Iterator[str]:
    """Descriptions of rows that differ between two sorted tables, with these columns as names."""
    if stored.equals(made):
        return
    if stored.num_rows != made.num_rows:
        yield f"{stored.num_rows} rows stored, {made.num_rows} computed from the tables"
        return
    for old, new in zip_longest(stored.to_pylist(), made.to_pylist()):
        columns = [key for key in new if key not in unknown and not _is_close(old[key], new[key])]
        if columns:
            key = columns[0]
            yield (
                f"{' x '.join(_plain(new[name]) for name in names)}: {key} {_plain(old[key])}"
                f" stored, {_plain(new[key])} computed from the tables"
            )


def _is_close(first: object, second: object) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        both_nan = math.isnan(first) and math.isnan(second)
        return both_nan or math.isclose(first, second, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return first == second


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _first(words: Sequence[str]) -> str:
    more = f"; and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return "; ".join(words[:_SHOWN]) + more


# The page.

_PART_NAMES = re.compile(r'<(?:section|div|header|footer)[^>]* id="([\w-]+)"|<(style|script|h2)\b')


def _look_at_page(found: Findings, archive: Archive, results: Results, render: Render) -> None:
    stored = archive.text(PAGE)
    if stored is None:
        if PAGE not in archive.damage:
            found.add("report", ["there is none in the archive"])
        return
    made = render(results)
    if stored == made:
        found.checked.append("report.html follows from the tables, byte for byte")
        return
    found.add("report", [f"report.html is not the page of its tables: {_page_words(stored, made)}"])


def _page_words(stored: str, made: str) -> str:
    """Where two pages begin to differ."""
    ours, theirs = made.splitlines(), stored.splitlines()
    pairs = enumerate(zip_longest(theirs, ours), start=1)
    line = next((number for number, (old, new) in pairs if old != new), len(ours))
    parts = [
        next(filter(None, match.groups()))
        for match in _PART_NAMES.finditer("\n".join(ours[: line - 1]))
    ]
    same = len(set(theirs) & set(ours))
    where = f"from line {line} on" + (f", in the part `{parts[-1]}`" if parts else "")
    return f"it differs {where}; {same} of its {len(theirs)} lines are the same"
