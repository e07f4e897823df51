"""`ftsec run` and `ftsec report`: plan, run, collect and report, with progress on the way."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from ftsec_ray import api
from ftsec_ray.cli.console import say, stdout
from ftsec_ray.cli.failure_text import Failure, show_failures
from ftsec_ray.cli.overview import (
    costs_of,
    made_by_other_code,
    other_code_line,
    other_plan_line,
)
from ftsec_ray.cli.progress import LiveProgress, Tally
from ftsec_ray.plan.cost_estimate import spent
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.show import render, summarize
from ftsec_ray.plan.stage import cell_text
from ftsec_ray.results.paired import Correction
from ftsec_ray.results.read import Results
from ftsec_ray.results.remote_results import local_results, send_results
from ftsec_ray.results.stage_warnings import lines_of, warnings_in
from ftsec_ray.schedule.job_paths import is_uri
from ftsec_ray.store.artifact_store import Store

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the processes of a submitted job."""


def run_sweep(
    sweep: Path,
    *,
    store: str,
    results: str,
    executor: str,
    address: str | None,
    workers: int | None,
    limit: int | None,
) -> int:
    """Run a sweep and return the exit code: 0 when every cell asked for is done, 1 otherwise.

    BudgetError (exit 2) when what is left would take more than the sweep's budget.
    """
    _warn_of_job_folder(store=store, results=results)
    # Deprecation warnings of libraries would break up the progress bar.
    warnings.filterwarnings("ignore", category=FutureWarning)
    held = Store.open(store)
    whole = api.make_plan(sweep, held)
    part = api.limited(whole, limit)
    done, records = held.sound(part.kinds)
    costs = costs_of(part, held, done)
    folder = api.results_folder(local_results(results), whole.spec.name)
    other = made_by_other_code(part, records)
    if other:
        say(other_code_line(other, len(records)), err=True)
    warning = other_plan_line(whole, folder, api.text_of(sweep))
    if warning:
        say(warning, err=True)
    if part.needed(done):
        took = spent(part, records, held.failures()) if part.spec.budget else None
        say(render(summarize(part, done, costs=costs, spent=took)), err=True)
        with LiveProgress(Tally(part, done, costs)) as shown:

            def follow(left: Plan) -> None:
                done = held.done()
                shown.follow(Tally(left, done, costs_of(left, held, done)))

            outcome = api.run_plan(
                whole,
                held,
                folder,
                executor=executor,
                address=address,
                workers=workers,
                limit=limit,
                on_event=shown.on_event,
                sweep_text=api.text_of(sweep),
                on_round=follow,
            )
    else:
        outcome = api.run_plan(
            whole, held, folder, executor=executor, limit=limit, sweep_text=api.text_of(sweep)
        )
        say(
            f"{whole.spec.name}: the store already holds all stages of {len(part.cells)} cells,"
            " nothing to run",
            err=True,
        )
    _print_outcome(
        outcome.results,
        outcome.page,
        replaced=warning is not None,
        sent_to=send_results(folder, results) if is_uri(results) else None,
    )
    return exit_code(outcome.results, api.limited(outcome.plan, limit))


def _warn_of_job_folder(**places: str) -> None:
    """Inside a Ray job, warn of places that are deleted with the job's own folder."""
    lost = [
        f"--{name} {place}"
        for name, place in places.items()
        if not is_uri(place) and Path(place).absolute().is_relative_to(Path.cwd())
    ]
    if lost and JOB_VARIABLE in os.environ:
        verb = "is" if len(lost) == 1 else "are"
        say(
            f"note: {' and '.join(lost)} {verb} in the working folder of this Ray job, which Ray"
            " deletes after the job. To keep the files, give an absolute path on a disk that all"
            " nodes mount, or a URI such as s3://BUCKET/PREFIX",
            err=True,
        )


def report_sweep(
    sweep: Path,
    *,
    store: str,
    results: Path,
    as_markdown: bool = False,
    correction: Correction = "bh",
) -> None:
    """Collect what the store holds of a sweep, write its report, and print its path, or the grid
    as Markdown.
    """
    from ftsec_ray.report.answer_text import answer_markdown
    from ftsec_ray.report.controls_markdown import controls_table
    from ftsec_ray.report.detectors_markdown import detectors_table
    from ftsec_ray.report.grid import build_grid
    from ftsec_ray.report.markdown import grid_markdown
    from ftsec_ray.report.members_markdown import members_table
    from ftsec_ray.report.page import write_report
    from ftsec_ray.report.search_section import searches_markdown

    held = Store.open(store)
    whole = api.make_plan(sweep, held)
    folder = api.results_folder(results, whole.spec.name)
    api.collect_plan(
        whole, held, None, folder, sweep_text=api.text_of(sweep), correction=correction
    )
    found, page = api.open_results(folder), write_report(folder)
    if as_markdown:
        grid = build_grid(found)
        sections = (
            grid_markdown(found),
            controls_table(grid),
            members_table(grid),
            detectors_table(grid),
            searches_markdown(found),
            answer_markdown(grid),
        )
        say("\n\n".join(filter(None, sections)))
    else:
        _print_outcome(found, page)


def exit_code(results: Results, part: Plan) -> int:
    """0 when all cells of `part` are done and all its searches have ended, 1 otherwise; failed
    trials are counted in `searches`.
    """
    if any(search.is_open for search in part.searches):
        return 1
    wanted = {cell.digest for cell in part.cells}
    statuses = zip(
        results.cells["cell"].to_pylist(), results.cells["status"].to_pylist(), strict=True
    )
    return 0 if all(status == "done" for cell, status in statuses if cell in wanted) else 1


def _print_outcome(
    results: Results, page: Path, *, replaced: bool = False, sent_to: str | None = None
) -> None:
    from ftsec_ray.report.answer_text import answer_lines
    from ftsec_ray.results.points import method_names

    rows = results.cells.to_pylist()
    counts = Counter(row["status"] for row in rows)
    broken = [row for row in rows if row["status"] == "failed"]
    if broken:
        names = method_names(rows)
        show_failures(
            (_failure(row, *names[row["cell"]]) for row in broken), more="see the table `cells`"
        )
    parts = [f"{counts['done']} of {len(rows)} cells done"] + [
        f"{counts[s]} {s}" for s in ("failed", "pending") if counts[s]
    ]
    say(", ".join(parts))
    ended = Counter(results.searches["status"].to_pylist())
    if ended:
        failed = sum(results.searches["n_failed"].to_pylist())
        counts_text = ", ".join(f"{count} {status}" for status, count in sorted(ended.items()))
        say(f"searches: {counts_text}" + (f"; {failed} trials failed" if failed else ""))
    for why in sorted(
        {
            row["error"]
            for row in rows
            if row["status"] == "pending" and row["error_code"] == "budget"
        }
    ):
        say(f"pending: {why}; raise `budget` to continue")
    for line in lines_of(warnings_in(results.meta)):
        say(line)
    if counts["done"]:
        say("\n".join(answer_lines(results, stdout().width)))
    place = " (replaced those of another plan)" if replaced else ""
    say(f"tables: {sent_to or results.folder}{place}")
    say(f"report: {f'{sent_to}/{page.name}' if sent_to else page}")


def _failure(row: dict[str, Any], attack: str, stack: str) -> Failure:
    """A failed cell of the table `cells`; its error follows the name of its stage."""
    stage, _, error = str(row["error"] or "").partition(": ")
    name = cell_text(row["model"], row["task"], attack, [stack], row["seed"])
    return Failure(cell=name, stage=stage, error=error or str(row["error_code"]))
