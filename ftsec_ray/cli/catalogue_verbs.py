"""The verbs that describe: catalogues, pages of methods, the schema and this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ftsec_ray.cli.completion import catalogues, methods
from ftsec_ray.cli.console import say_json
from ftsec_ray.cli.options import DEFAULT_STORE, Address, Json, Store


def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="attacks | defenses | models | tasks | metrics | judges | stages | columns",
            show_default=False,
            autocompletion=catalogues,
        ),
    ],
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """List attacks, defenses, models, tasks, metrics, ..."""
    from ftsec_ray.cli.catalogue import list_kind

    list_kind(kind, as_json=as_json)


def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="An attack or a defense, such as badnets.",
            show_default=False,
            autocompletion=methods,
        ),
    ],
    as_json: Json = False,
) -> None:  # noqa: FBT002
    """Show one attack or defense, with its parameters.

    Also shows its paper, how it differs from the paper, its cost and its hooks.
    """
    from ftsec_ray.cli.catalogue import show as show_method

    show_method(name, as_json=as_json)


def schema() -> None:
    """Print the JSON schema of a sweep file, for editors."""
    from ftsec_ray.config.json_schema import sweep_schema

    say_json(sweep_schema())


def doctor(
    store: Store = DEFAULT_STORE,
    address: Address = None,
    as_json: Json = False,  # noqa: FBT002
    image: Annotated[
        bool,
        typer.Option(
            "--image", help="Check the contents of an image for the nodes of a cluster instead."
        ),
    ] = False,  # noqa: FBT002
) -> None:
    """Check what this machine or cluster can run.

    Lists what is installed, what is missing, and how to install it.
    """
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
