"""The verbs that read the results of a sweep: report, archive, audit and claims."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ftsec_ray.cli.completion import judges as judge_names
from ftsec_ray.cli.options import (
    DEFAULT_RESULTS,
    DEFAULT_STORE,
    Json,
    ResultsDir,
    ResultsPlace,
    Store,
    Sweep,
)


class Correction(StrEnum):
    """How p values are corrected for multiple comparisons."""

    bh = "bh"
    holm = "holm"


def report(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsDir = DEFAULT_RESULTS,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Print the attack x defense table and the answer, as Markdown."
        ),
    ] = False,
    correction: Annotated[
        Correction,
        typer.Option(
            help=(
                "Correction for multiple comparisons: bh (Benjamini-Hochberg, false discovery"
                " rate) or holm (family-wise error rate)."
            ),
        ),
    ] = Correction.bh,
) -> None:
    """Write the report of a sweep, finished or not.

    Collects what the store holds of it; cells that have not run are shown as pending.
    """
    from ftsec_ray.cli.run_sweep import report_sweep

    report_sweep(
        sweep, store=store, results=results, as_markdown=markdown, correction=correction.value
    )


def export(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsPlace = str(DEFAULT_RESULTS),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The archive. Default: <sweep name>-<plan>.zip."
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            "--sign",
            metavar="KEY",
            help="Sign it with a private SSH key (Ed25519), such as ~/.ssh/id_ed25519.",
        ),
    ] = None,
) -> None:
    """Pack a finished run into one archive for `ftsec verify`.

    The archive holds the sweep, its plan, versions, tables and report.
    """
    from ftsec_ray.cli.export_verify import export_sweep

    export_sweep(sweep, store=store, results=results, out=out, sign=sign)


def verify(
    archive: Annotated[
        Path,
        typer.Argument(
            metavar="ARCHIVE", help="The archive that `ftsec export` wrote.", show_default=False
        ),
    ],
    base: Annotated[
        Path,
        typer.Option(
            "--base", metavar="DIR", help="The folder at which relative paths of its sweep start."
        ),
    ] = Path(),
    store: Store = DEFAULT_STORE,
    inside: Annotated[
        Path | None,
        typer.Option(
            "--inside",
            metavar="DIR",
            help="Open no file outside of this folder for the archive. Default: --base.",
            show_default=False,
        ),
    ] = None,
    signer: Annotated[
        Path | None,
        typer.Option(
            "--signer",
            metavar="PUBKEY",
            help="A file of public SSH keys, one of which must have signed the archive.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Check an archive by computing its results again.

    Plans its sweep, and makes metrics, comparisons and report from its answers. Prints what differs
    and what cannot be checked. Exit codes: 0 all that was checked agrees, 1 something differs,
    2 not an archive.
    """
    from ftsec_ray.cli.export_verify import verify_archive

    raise typer.Exit(
        verify_archive(
            archive, base=base, store=store, inside=inside, signer=signer, as_json=as_json
        )
    )


def judge_audit(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS",
            help="A results folder, such as results/quickstart.",
            show_default=False,
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help=(
                "A table of true verdicts: column truth, and prompt_id or completion_sha256;"
                " optional columns cell and probe."
            ),
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Take the verdicts of the microworld's exact judge as true."),
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="NAME",
            help="Also let this judge read the answers to requests. Can be repeated.",
            autocompletion=judge_names,
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Show the error rates of judges, and how far they agree.

    Every rate is shown as measured, and corrected for the errors of its judge.
    """
    from ftsec_ray.cli.print_audit import audit

    audit(results, labels=labels, exact=exact, judges=judge or (), as_json=as_json)


def claims(
    results: Annotated[
        Path | None,
        typer.Argument(
            metavar="RESULTS",
            help="A results folder, such as results/claims_ladder.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002
    explain: Annotated[
        bool, typer.Option("--explain", help="Also print the rules, the controls and the queries.")
    ] = False,  # noqa: FBT002
) -> None:
    """Test the survey's five findings on the results of a sweep.

    The exit code is 0 whatever the verdicts are.
    """
    from ftsec_ray.cli.print_claims import print_claims

    print_claims(results, as_json=as_json, explain=explain)
