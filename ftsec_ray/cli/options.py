"""The arguments and options that several verbs share, with their help texts and completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftsec_ray.cli.completion import sweep_files

DEFAULT_STORE = ".ftsec/store"
DEFAULT_RESULTS = Path("results")

Sweep = Annotated[
    Path,
    typer.Argument(
        metavar="SWEEP",
        help="The sweep file, such as sweeps/quickstart.yaml.",
        show_default=False,
        autocompletion=sweep_files,
    ),
]
Store = Annotated[
    str,
    typer.Option(
        "--store", metavar="DIR", help="The artifact store: a folder, s3://... or gs://..."
    ),
]
ResultsDir = Annotated[
    Path,
    typer.Option("--results", metavar="DIR", help="Write tables and report to DIR/<sweep name>."),
]
ResultsPlace = Annotated[
    str,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Write tables and report to DIR/<sweep name>; DIR may be s3://... or gs://...",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="A running Ray cluster: host:port, or auto. Default: start Ray on this machine.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Run at most N stages at a time. Default: as many as fit.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="N", help="Take the first N cells only."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
