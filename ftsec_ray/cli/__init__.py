"""The command line `ftsec`: a thin face over `ftsec_ray.api`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

MIN_PYTHON = (3, 11)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; 3 where Python or a package that it is
    made of is missing.
    """
    from ftsec_ray.cli.plain_output import PIPE_CLOSED, flushed, use_plain_signs
    from ftsec_ray.errors import EnvironmentFault
    from ftsec_ray.redact import clean_logs

    use_plain_signs()
    clean_logs()
    sys.excepthook = _show_bug
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
    """The traceback of an error that nobody expected, which may quote what it met."""
    _write("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _write(text: str) -> None:
    """Write to stderr without Rich, which may be what is missing."""
    from ftsec_ray.redact import redacted
    from ftsec_ray.shown_text import for_terminal

    sys.stderr.write(f"{for_terminal(redacted(text))}\n")
