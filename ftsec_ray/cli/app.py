"""The command `ftsec`: its verbs, in the order in which the help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from ftsec_ray.cli import catalogue_verbs, result_verbs, sweep_verbs
from ftsec_ray.cli.console import guarded, say

app = typer.Typer(
    name="ftsec",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Run attack x defense x model-size sweeps for the security of LLM fine-tuning.\n\n"
        "Exit codes: 0 success; 1 some cells failed, or the budget stopped the run; 2 the"
        " command or the sweep file is wrong; 3 the environment is wrong."
    ),
)


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


for _name, _verb in (
    ("init", sweep_verbs.init),
    ("plan", sweep_verbs.plan),
    ("run", sweep_verbs.run),
    ("status", sweep_verbs.status),
    ("submit", sweep_verbs.submit),
    ("report", result_verbs.report),
    ("export", result_verbs.export),
    ("verify", result_verbs.verify),
    ("judge-audit", result_verbs.judge_audit),
    ("claims", result_verbs.claims),
    ("list", catalogue_verbs.list_),
    ("show", catalogue_verbs.show),
    ("schema", catalogue_verbs.schema),
    ("doctor", catalogue_verbs.doctor),
):
    app.command(_name)(guarded(_verb))
