"""The command line `ftsec`: a thin face over `ftsec_ray.api`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MIN_PYTHON = (3, 11)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; 3 where Python or a package that it is
    made of is missing.
    """
    from ftsec_ray.cli.plain_output import PIPE_CLOSED, flushed, use_plain_signs
    from ftsec_ray.errors import EnvironmentFault
    from ftsec_ray.shown_text import for_terminal

    use_plain_signs()
    try:
        # Sent along with a job, this package meets whatever Python a cluster has.
        if sys.version_info < MIN_PYTHON:
            raise EnvironmentFault(
                "this Python is too old",
                sys.version.split()[0],
                "Python 3.11 or newer",
                "on a cluster: another image",
            )
        try:
            from ftsec_ray.cli.app import app
        except ModuleNotFoundError as error:
            raise EnvironmentFault(
                "a package that ftsec_ray needs is not installed",
                error.name,
                "everything that its pyproject.toml requires",
                f"install {error.name}, on a cluster in the image of all nodes",
            ) from error
    except EnvironmentFault as fault:
        sys.stderr.write(f"{for_terminal(str(fault))}\n")  # Rich may be what is missing
        raise SystemExit(fault.exit_code) from None
    try:
        app(args=None if args is None else list(args), prog_name="ftsec")
    except BrokenPipeError:
        flushed()
        raise SystemExit(PIPE_CLOSED) from None
    except SystemExit as leaving:
        if not flushed():
            raise SystemExit(leaving.code or PIPE_CLOSED) from None
        raise
