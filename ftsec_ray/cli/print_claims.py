"""`ftsec claims`: the verdicts on the survey's findings, as text and as JSON."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import typer

from ftsec_ray import api
from ftsec_ray.claims import findings as rules
from ftsec_ray.claims.contrast import Contrast
from ftsec_ray.claims.findings import CLAIMS, Finding
from ftsec_ray.cli.console import say, say_json, table
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.measured import UNKNOWN, UTILITY_NAMES

BAD_INPUT = 2
_WIDTH = 120
_STYLES = {"supported": "green", "contradicted": "red", "undecided": "yellow"}


def print_claims(folder: Path | None, *, as_json: bool, explain: bool) -> None:
    """Print the verdicts on the results in a folder; with `explain` the rules first, and no folder
    is needed.
    """
    if explain and not as_json:
        _print_rules()
    if folder is None:
        if not explain:
            raise SpecError(
                "no results given",
                folder,
                "RESULTS: a folder that `ftsec run` wrote, such as results/claims_ladder",
                "or --explain, which prints the rules and needs no results",
            )
        found = None
    else:
        try:
            found = api.check_claims(folder)
        except DataError as fault:  # here the argument is wrong, not a stage
            say(str(fault), err=True)
            raise typer.Exit(BAD_INPUT) from None
    if as_json:
        rows = (
            [
                {name: getattr(one, name) for name in ("id", "statement", "rule", "gate", "query")}
                for one in CLAIMS
            ]
            if found is None
            else [asdict(one) for one in found]
        )
        say_json(rows)
    elif found is not None:
        _print_findings(found, folder)


def _print_rules() -> None:
    say(textwrap.dedent(str(rules.__doc__)).strip())
    for claim in CLAIMS:
        say(f"\n{claim.id}: {claim.statement}", style="bold")
        say(
            textwrap.fill(
                f"{claim.rule} Control: {claim.gate}.",
                _WIDTH,
                initial_indent="  ",
                subsequent_indent="  ",
            )
        )
        say(textwrap.indent(claim.query, "    "))
    say()


def _print_findings(found: list[Finding], folder: Path | None) -> None:
    table(
        f"claims on {folder}",
        ("claim", "verdict", "statement"),
        ((one.id, one.verdict, one.statement) for one in found),
    )
    for one in found:
        say(
            f"\n{one.id}: {one.verdict}",
            style=_STYLES.get(one.verdict, "") if sys.stdout.isatty() else None,
        )
        say(textwrap.fill(one.why, _WIDTH, initial_indent="  ", subsequent_indent="  "))
        for title, rows in (("control", one.control), ("test", one.tests)):
            for row in rows:
                say(f"  {title:8}{_line(row)}")
        for text in one.decide:
            say(f"  needed to decide: {text}")
    say(f"\nutility: {UTILITY_NAMES}, of both sides, or once where both are of one cell")
    say("`--explain` prints the rules and the queries")


def _line(one: Contrast) -> str:
    if one.estimate is None:
        return f"{one.what}: not measured"
    sides = (
        f" ({one.more:.2f} and {one.less:.2f})"
        if one.more is not None and one.less is not None
        else ""
    )
    interval = (
        f" [{one.low:.2f}, {one.high:.2f}]" if one.low is not None and one.high is not None else ""
    )
    counts = f"{one.runs} run{'s' * (one.runs != 1)}" + (
        f" x {one.prompts} prompts" if one.prompts is not None else ""
    )
    if one.null_frac:
        counts += f", {one.null_frac:.1%} of the answers not judged"
    utility = " and ".join(
        dict.fromkeys(side.text for side in (one.utility_more, one.utility_less) if side != UNKNOWN)
    )
    side = {"above": f"above {one.bound:.2g}", "below": f"below {one.bound:.2g}", "open": "open"}[
        one.side
    ]
    return (
        f"{one.what}: {one.estimate:+.2f}{interval}{sides}, {counts}, utility"
        f" {utility or 'not measured'}: {side}"
    )
