"""The verbs that make, plan and run a sweep. Each imports what it needs when it runs, so that
`init`, `plan` and the help answer at once.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ftsec_ray.cli.options import (
    DEFAULT_RESULTS,
    DEFAULT_STORE,
    Address,
    Json,
    Limit,
    ResultsPlace,
    Store,
    Sweep,
    Workers,
)
from ftsec_ray.schedule.executors import DEFAULT, EXECUTORS, help_text

Executor = StrEnum("Executor", {name: name for name in EXECUTORS})  # type: ignore[misc]
_DEFAULT_EXECUTOR = Executor(DEFAULT)
DASHBOARD = "http://127.0.0.1:8265"


def init(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="owner/name[@commit] on Hugging Face, a model folder, a .gguf file, or"
            " ladder:<size>.",
        ),
    ] = "ladder:0.2m",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="The fine-tuning rows: a file (.jsonl .json .csv .tsv .txt .parquet, also .gz)"
            " or owner/name@commit on Hugging Face. Default: the model's built-in task.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The sweep file to write. Default: <data>.yaml."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file if it exists.")
    ] = False,  # noqa: FBT002
) -> None:
    """Write a commented starter sweep for a model and a data file.

    Reads the data, chooses the columns and the kind of task, and says in comments what it chose
    and what is left to fill in. Nothing is written that `ftsec plan` would refuse.
    """
    from ftsec_ray.cli.starter import write_starter

    write_starter(model, data, out=out, force=force)


def plan(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsPlace = str(DEFAULT_RESULTS),
    limit: Limit = None,
    as_json: Json = False,  # noqa: FBT002
    gpu_price: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="PRICE", help="Price of one GPU hour, to print the cost of the GPUs."
        ),
    ] = None,
) -> None:
    """Show the cells and stages of a sweep, and how long they take.

    Also shows what the store already holds and what sharing equal stages saves. Runs nothing.
    """
    from ftsec_ray.cli.overview import print_plan

    print_plan(
        sweep, store=store, results=results, limit=limit, as_json=as_json, gpu_price=gpu_price
    )


def run(
    sweep: Sweep,
    store: Store = DEFAULT_STORE,
    results: ResultsPlace = str(DEFAULT_RESULTS),
    executor: Annotated[
        Executor, typer.Option(help=f"How stages run. {help_text()}.")
    ] = _DEFAULT_EXECUTOR,
    address: Address = None,
    workers: Workers = None,
    limit: Limit = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what `ftsec plan` prints, and run nothing."),
    ] = False,  # noqa: FBT002
) -> None:
    """Run a sweep, write its tables and its report.

    Stages that the store already holds are reused: an interrupted run continues where it stopped.
    """
    if dry_run:
        from ftsec_ray.cli.overview import print_plan

        print_plan(sweep, store=store, results=results, limit=limit, as_json=False, gpu_price=None)
        return
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


def status(sweep: Sweep, store: Store = DEFAULT_STORE, as_json: Json = False) -> None:  # noqa: FBT002
    """Show which cells are done, failed or pending."""
    from ftsec_ray.cli.overview import print_status

    print_status(sweep, store=store, as_json=as_json)


def submit(
    sweep: Sweep,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="URL",
            help=(
                "The dashboard of the cluster. Default: the value of RAY_API_SERVER_ADDRESS, else"
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
                "The artifact store of the job: s3://... or gs://...; a folder only if the"
                " cluster is this machine (default then: .ftsec/store), or with --shared-disk."
            ),
        ),
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(
            "--results",
            metavar="URI",
            help=(
                "Write tables and report to URI/<sweep name>. Default: STORE/results, or results"
                " if the cluster is this machine."
            ),
        ),
    ] = None,
    workers: Workers = None,
    limit: Limit = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help="Show the log of the job until it ends, and exit with its exit code.",
        ),
    ] = False,
    submission_id: Annotated[
        str | None,
        typer.Option(
            "--submission-id",
            metavar="ID",
            help="The id of the job. Default: made from the sweep's name and the time.",
        ),
    ] = None,
    package: Annotated[
        bool | None,
        typer.Option(
            "--package/--no-package",
            show_default=False,
            help=(
                "Upload this machine's ftsec_ray, or use the one installed on the cluster."
                " Default: upload it if it is a checkout or an editable install."
            ),
        ),
    ] = None,
    shared_disk: Annotated[
        bool,
        typer.Option(
            "--shared-disk",
            help="All nodes mount the absolute paths of this machine at the same place.",
        ),
    ] = False,
) -> None:
    """Run a sweep as a job on a Ray cluster.

    Uploads the sweep file and the files that it names by relative path, and runs `ftsec run`
    there. Stages that the store already holds are reused, so a lost job can be submitted again.
    Tokens and cloud keys are never uploaded: the nodes of the cluster need their own. Prints the
    id of the job, and the commands that follow and stop it.
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
