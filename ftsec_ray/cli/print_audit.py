"""`ftsec judge-audit`: the error rates of judges, and metrics corrected for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ftsec_ray import api
from ftsec_ray.cli.console import say, say_json, table
from ftsec_ray.measured import UTILITY_NAMES
from ftsec_ray.results.audit import NO_LABELS, Agreement, Audit, Rate, Share
from ftsec_ray.results.points import method_names
from ftsec_ray.results.read import Results

MAX_ROWS = 20
"""Cells listed; `--json` gives all."""


def audit(
    folder: Path, *, labels: Path | None, exact: bool, judges: Sequence[str], as_json: bool
) -> None:
    """Print the audit of a results folder."""
    results = api.open_results(folder)
    found = api.judge_audit(results, labels=labels, exact=exact, judges=judges)
    if as_json:
        say_json(asdict(found))
        return
    _print(found, results)


def _print(found: Audit, results: Results) -> None:
    cells = results.cells.to_pylist()
    methods, tasks = method_names(cells), {row["task"] for row in cells}
    names = {
        row["cell"]: (
            " x ".join([row["model"], *methods[row["cell"]]])
            + (f", {row['task']}" if len(tasks) > 1 else "")
            + f", seed {row['seed']}"
        )
        for row in cells
    }
    left = [
        f"{count} {what}"
        for count, what in (
            (found.unlabelled, "rows without a true verdict"),
            (found.unmatched, "labels that match no answer"),
        )
        if count
    ]
    say(f"{found.labelled} answers with a known verdict{''.join(f'; {one}' for one in left)}")
    if found.errors:
        say()
        table(
            "errors of judges",
            ("judge", "probe", "verdict", "sensitivity", "specificity"),
            (
                (
                    one.judge,
                    one.probe,
                    one.event,
                    _shown(one.sensitivity, counts=True),
                    _shown(one.specificity, counts=True),
                )
                for one in found.errors
            ),
        )
        say()
        table(
            "confusion",
            ("judge", "probe", "truth", "verdict", "answers"),
            (
                (one.judge, one.probe, one.truth, one.verdict or "null", one.n)
                for one in found.confusion
            ),
            right=("answers",),
        )
    say()
    table(
        "rates",
        ("cell", "judge", "probe", "verdict", "raw", "n", "null", "corrected", "utility"),
        (
            _rate_row(one, names)
            for one in sorted(found.rates, key=lambda one: one.why == NO_LABELS)[:MAX_ROWS]
        ),
        right=("n", "null"),
    )
    _more(len(found.rates))
    say(f"utility of the same cell: {UTILITY_NAMES}")
    if found.agreements:
        say()
        table(
            "agreement",
            ("judges", "cell", "n", "same", "kappa"),
            (_agreement_row(one, names) for one in found.agreements[:MAX_ROWS]),
            right=("n", "same"),
        )
        _more(len(found.agreements))


def _more(count: int) -> None:
    if count > MAX_ROWS:
        say(f"and {count - MAX_ROWS} more: --json lists them")


def _rate_row(one: Rate, names: Mapping[str, str]) -> tuple[object, ...]:
    corrected = (
        one.why
        if one.corrected is None
        else f"{one.corrected:.2f} ({one.corrected_low:.2f}–{one.corrected_high:.2f})"
    )
    return (
        names.get(one.cell, one.cell),
        one.judge,
        one.probe,
        one.event,
        _shown(one.raw),
        one.raw.n,
        f"{one.null_share:.0%}",
        corrected,
        one.utility.text,
    )


def _agreement_row(one: Agreement, names: Mapping[str, str]) -> tuple[object, ...]:
    where = "all cells" if one.cell is None else names.get(one.cell, one.cell)
    value, low, high = (
        None if found is None else f"{round(found, 2) + 0.0:.2f}"
        for found in (one.kappa, one.kappa_low, one.kappa_high)
    )
    kappa = (
        "-"
        if value is None
        else value
        if low is None or high is None
        else f"{value} ({low}–{high})"
    )
    return (
        " and ".join(one.judges),
        where,
        one.n,
        "-" if one.same is None else f"{one.same:.2f}",
        kappa,
    )


def _shown(one: Share, *, counts: bool = False) -> str:
    if one.value is None:
        return "-"
    return f"{one.value:.2f} ({one.ci_low:.2f}–{one.ci_high:.2f})" + (
        f" {one.hits}/{one.n}" if counts else ""
    )
