"""The command line `ftsec`, a thin layer over `ftsec_ray.api`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

MIN_PYTHON = (3, 11)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its exit code; 3 when Python is too old or a required
    package is missing.
    """
    from ftsec_ray.cli.plain_output import PIPE_CLOSED, flushed, use_plain_signs
    from ftsec_ray.errors import EnvironmentFault
    from ftsec_ray.redact import clean_logs

    use_plain_signs()
    clean_logs()
    sys.excepthook = _show_bug
    try:
        # Uploaded with a job, this package runs on the Python of the cluster.
        if sys.version_info < MIN_PYTHON:
            raise EnvironmentFault(
                "this Python is too old",
                sys.version.split()[0],
                "Python 3.11 or newer",
                "install a newer Python; on a cluster, change the image of the nodes",
            )
        try:
            from ftsec_ray.cli.app import app
        except ModuleNotFoundError as error:
            raise EnvironmentFault(
                "a package that ftsec_ray needs is not installed",
                error.name,
                "all packages that its pyproject.toml requires",
                f"install {error.name} (on a cluster, in the image of every node)",
            ) from error
    except EnvironmentFault as fault:
        _write(str(fault))
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


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unexpected error, without the secrets that it may quote."""
    _write("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _write(text: str) -> None:
    """Write to stderr without Rich, which may be the missing package."""
    from ftsec_ray.redact import redacted
    from ftsec_ray.shown_text import for_terminal

    sys.stderr.write(f"{for_terminal(redacted(text))}\n")
