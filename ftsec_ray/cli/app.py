"""The verbs of `ftsec`. Each imports what it needs when it runs, so that `list`, `show` and `plan`
answer at once.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ftsec_ray.cli.console import guarded, say, say_json
from ftsec_ray.schedule.executors import DEFAULT, EXECUTORS, help_text

app = typer.Typer(
    name="ftsec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Sweeps over attack x defense x model size for the security of fine-tuning.\n\nExit codes:"
        " 0 all cells done, 1 some cells failed or the budget stopped the run, 2 the sweep file is"
        " wrong or its budget too small to start, 3 the environment is wrong."
    ),
)


Executor = StrEnum("Executor", {name: name for name in EXECUTORS})  # type: ignore[misc]
_DEFAULT_EXECUTOR = Executor(DEFAULT)


class Correction(StrEnum):
    """How p values are corrected for their number."""

    bh = "bh"
    holm = "holm"


Sweep = Annotated[
    Path,
    typer.Argument(
        metavar="SWEEP", help="A sweep file, such as sweeps/quickstart.yaml.", show_default=False
    ),
]
Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Where artifacts are kept and found again: a folder, s3://... or gs://...",
    ),
]
ResultsDir = Annotated[
    Path, typer.Option("--results", metavar="DIR", help="Tables and report go to DIR/<sweep name>.")
]
ResultsPlace = Annotated[
    str,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Tables and report go to DIR/<sweep name>; also s3://... or gs://...",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="A running Ray cluster (host:port, auto); default: this machine.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
DEFAULT_STORE = ".ftsec/store"
DEFAULT_RESULTS = Path("results")
DASHBOARD = "http://127.0.0.1:8265"


def _version(wanted: bool) -> None:  # noqa: FBT001 (a callback of typer)
    if wanted:
        from ftsec_ray import __version__

        say(f"ftsec_ray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:  # noqa: FBT002
    """Nothing by itself."""


@app.command()
@guarded
def run(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsPlace = str(DEFAULT_RESULTS),
    executor: Annotated[
        Executor, typer.Option(help=f"How stages run. {help_text()}.")
    ] = _DEFAULT_EXECUTOR,
    address: Address = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stages at a time; default: as many as fit."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Run the first N cells only.")
    ] = None,
) -> None:
    """Plan a sweep, run what the store lacks, collect the tables and write the report."""
    from ftsec_ray.cli.run_sweep import run_sweep

    code = run_sweep(
        sweep,
        store=store,
        results=results,
        executor=executor.value,
        address=address,
        workers=workers,
        limit=limit,
    )
    raise typer.Exit(code)


@app.command()
@guarded
def submit(
    sweep: Sweep,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="URL",
            help=(
                "The cluster's dashboard; default: that of RAY_API_SERVER_ADDRESS, else"
                f" {DASHBOARD}."
            ),
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="URI",
            help=(
                "Where the job keeps artifacts: s3://... or gs://...; a folder only where all nodes"
                " are this machine (default then: .ftsec/store) "
                "or mount it (--shared-disk)."
            ),
        ),
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(
            "--results",
            metavar="URI",
            help=(
                "Tables and report go to URI/<sweep name>; default: STORE/results, or results where"
                " all nodes are this machine."
            ),
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stages at a time; default: as many as fit."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Run the first N cells only.")
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help="Show the job's log until it ends, and leave with its exit code.",
        ),
    ] = False,
    submission_id: Annotated[
        str | None,
        typer.Option(
            "--submission-id", metavar="ID", help="The job's id; default: of sweep and time."
        ),
    ] = None,
    package: Annotated[
        bool | None,
        typer.Option(
            "--package/--no-package",
            show_default=False,
            help=(
                "Send this machine's ftsec_ray along, or use the one installed on the cluster;"
                " default: send it when it is a checkout or an "
                "editable install."
            ),
        ),
    ] = None,
    shared_disk: Annotated[
        bool,
        typer.Option(
            "--shared-disk", help="All nodes mount this machine's absolute paths at the same place."
        ),
    ] = False,
) -> None:
    """Run a sweep as a job on a Ray cluster; its files that are named by relative path go along.

    The job is `ftsec run` there: what the store holds is not repeated, so a job that was lost is
        submitted again. Tokens and cloud keys are
    never sent: the cluster's nodes have their own. Prints the job's id, and how to follow and to
        stop it.
    """
    from ftsec_ray.cli.submit import submit_sweep

    code = submit_sweep(
        sweep,
        wait=wait,
        address=address,
        store=store,
        results=results,
        workers=workers,
        limit=limit,
        submission_id=submission_id,
        package=package,
        shared_disk=shared_disk,
    )
    raise typer.Exit(code)


@app.command()
@guarded
def plan(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsPlace = str(DEFAULT_RESULTS),
    as_json: Json = False,  # noqa: FBT002
    gpu_price: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="PRICE", help="Price of one GPU hour, for the cost."),
    ] = None,
) -> None:
    """Show cells, stages, what is done, what sharing saves and how long the rest takes."""
    from ftsec_ray.cli.overview import print_plan

    print_plan(sweep, store=store, results=results, as_json=as_json, gpu_price=gpu_price)


@app.command()
@guarded
def status(sweep: Sweep, store: Store = DEFAULT_STORE, as_json: Json = False) -> None:  # noqa: FBT002
    """Show which cells are done, failed or pending."""
    from ftsec_ray.cli.overview import print_status

    print_status(sweep, store=store, as_json=as_json)


@app.command()
@guarded
def report(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsDir = DEFAULT_RESULTS,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Print the attack x defense table as Markdown and nothing else."
        ),
    ] = False,
    correction: Annotated[
        Correction,
        typer.Option(
            help=(
                "How comparisons are corrected for their number: bh (Benjamini-Hochberg, share of"
                " false findings) or holm (any false finding)."
            ),
        ),
    ] = Correction.bh,
) -> None:
    """Collect what the store holds of a sweep, finished or not, and write its report."""
    from ftsec_ray.cli.run_sweep import report_sweep

    report_sweep(
        sweep, store=store, results=results, as_markdown=markdown, correction=correction.value
    )


@app.command()
@guarded
def export(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsPlace = str(DEFAULT_RESULTS),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The archive; default: <sweep name>-<plan>.zip."
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
    """Pack sweep, plan, versions, tables and report of a finished run into one archive for `ftsec
    verify`.
    """
    from ftsec_ray.cli.export_verify import export_sweep

    export_sweep(sweep, store=store, results=results, out=out, sign=sign)


@app.command()
@guarded
def verify(
    archive: Annotated[
        Path,
        typer.Argument(metavar="ARCHIVE", help="What `ftsec export` wrote.", show_default=False),
    ],
    base: Annotated[
        Path,
        typer.Option("--base", metavar="DIR", help="Where relative paths of its sweep start here."),
    ] = Path(),
    store: Store = DEFAULT_STORE,
    inside: Annotated[
        Path | None,
        typer.Option(
            "--inside",
            metavar="DIR",
            help="The archive gets no file opened out of this folder; default: --base.",
            show_default=False,
        ),
    ] = None,
    signer: Annotated[
        Path | None,
        typer.Option(
            "--signer",
            metavar="PUBKEY",
            help="File of public SSH keys, one of which must have signed the archive.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Plan the sweep of an archive here, make its metrics, comparisons and report again, and say
    what differs and what cannot be checked. Exit 0: all that was checked agrees, 1: something
    differs, 2: no archive.
    """
    from ftsec_ray.cli.export_verify import verify_archive

    raise typer.Exit(
        verify_archive(
            archive, base=base, store=store, inside=inside, signer=signer, as_json=as_json
        )
    )


@app.command("judge-audit")
@guarded
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
                "Table of true verdicts: columns truth, and prompt_id or completion_sha256,"
                " narrowed by cell and probe."
            ),
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Take the microworld's exact judge for the truth.")
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="NAME",
            help="Have this judge read the answers to requests too; may be given several times.",
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Show how often each judge is wrong, every rate raw and corrected for that, and how far two
    judges agree.
    """
    from ftsec_ray.cli.print_audit import audit

    audit(results, labels=labels, exact=exact, judges=judge or (), as_json=as_json)


@app.command()
@guarded
def claims(
    results: Annotated[
        Path | None,
        typer.Argument(
            metavar="RESULTS",
            help="A folder that `ftsec run` wrote, such as results/claims_ladder.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the rules, the controls and the queries too.")
    ] = False,  # noqa: FBT002
) -> None:
    """Test the survey's five findings on the results of a sweep; whatever the verdicts, the exit
    code is 0.
    """
    from ftsec_ray.cli.print_claims import print_claims

    print_claims(results, as_json=as_json, explain=explain)


@app.command("list")
@guarded
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="attacks | defenses | models | tasks | metrics | columns",
            show_default=False,
        ),
    ],
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """List the attacks, defenses, models, tasks, metrics or the columns of the results."""
    from ftsec_ray.cli.catalogue import list_kind

    list_kind(kind, as_json=as_json)


@app.command()
@guarded
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An attack or a defense.", show_default=False)
    ],
    as_json: Json = False,
) -> None:  # noqa: FBT002
    """Show one method: paper, differences, cost, hooks and parameters with defaults."""
    from ftsec_ray.cli.catalogue import show as show_method

    show_method(name, as_json=as_json)


@app.command()
@guarded
def schema() -> None:
    """Print the JSON schema of a sweep file, for editors."""
    from ftsec_ray.config.json_schema import sweep_schema

    say_json(sweep_schema())


@app.command()
@guarded
def doctor(
    store: Store = DEFAULT_STORE,
    address: Address = None,
    as_json: Json = False,  # noqa: FBT002
    image: Annotated[
        bool,
        typer.Option(
            "--image", help="Look at what an image for the nodes of a cluster must hold instead."
        ),
    ] = False,  # noqa: FBT002
) -> None:
    """Look at what this machine or cluster can run, and say what is missing."""
    from ftsec_ray.cli.console import table
    from ftsec_ray.cli.doctor import examine, examine_image, fault_of

    findings = list(examine_image() if image else examine(store, address=address))
    if as_json:
        say_json([finding.as_json() for finding in findings])
    else:
        table(
            "doctor",
            ("what", "state", "found", "fix"),
            ((f.what, f.state, f.found, f.fix) for f in findings),
        )
    fault = (
        fault_of(findings, what="this image cannot be a node of a cluster yet")
        if image
        else fault_of(findings)
    )
    if fault is not None:
        raise fault
