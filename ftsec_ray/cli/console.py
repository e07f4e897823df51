"""Where the command line writes: answers to stdout, progress and errors to stderr, plain text when
the output is no terminal. All output passes `shown`, which removes secrets and control characters.

Errors that the user can fix are printed without a traceback, and their class decides the exit code.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftsec_ray.cli.plain_output import PIPE_CLOSED, flushed
from ftsec_ray.errors import EnvironmentFault, FtsecError
from ftsec_ray.redact import redacted, without_secrets
from ftsec_ray.shown_text import for_terminal

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED = 130
_WIDE = 200
"""Columns of a table in a file or pipe, where no window sets the width."""


def stdout() -> Console:
    """The console for answers."""
    return _console(stderr=False)


def stderr() -> Console:
    """The console for progress and errors."""
    return _console(stderr=True)


class _Console(Console):
    """A console whose reader may close the pipe; Rich itself would exit with the code of failed
    cells.
    """

    def on_broken_pipe(self) -> None:
        """Exit without a message."""
        flushed()
        raise SystemExit(PIPE_CLOSED)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else _WIDE
    return _Console(
        stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False
    )


def shown(text: str, *, one_line: bool = False) -> str:
    """A text that is safe to print on a terminal."""
    return for_terminal(redacted(text), one_line=one_line)


def say(text: str = "", *, style: str | None = None, err: bool = False) -> None:
    """Print text as it is: no markup, no truncation."""
    (stderr() if err else stdout()).print(Text(shown(text), style=style or ""), soft_wrap=True)


def say_json(value: object) -> None:
    """Print a value as JSON; secrets are removed before, so that the output is valid JSON."""
    text = json.dumps(without_secrets(value), indent=1).replace("\x7f", "\\u007f")
    stdout().print(Text(text), soft_wrap=True)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[str] = (),
) -> None:
    """Print a table: ruled on a terminal, aligned columns elsewhere."""
    console = stdout()
    drawn = Table(
        title=shown(title, one_line=True) if console.is_terminal else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        drawn.add_column(
            shown(column, one_line=True),
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column == columns[0],
        )
    for row in rows:
        drawn.add_row(*(Text("" if one is None else shown(str(one), one_line=True)) for one in row))
    if console.is_terminal:
        console.print(drawn)
        return
    with console.capture() as captured:
        console.print(drawn)
    for line in captured.get().splitlines():
        say(line.rstrip())


def _leave(error: FtsecError) -> NoReturn:
    say(str(error), err=True, style="red" if stderr().is_terminal else None)
    raise typer.Exit(error.exit_code) from None


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose FtsecErrors are printed and become exit codes; Ctrl-C prints how to
    continue.
    """

    @functools.wraps(command)
    def _guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FtsecError as error:
            _leave(error)
        except ModuleNotFoundError as error:
            if (error.name or "ftsec_ray").partition(".")[0] == "ftsec_ray":
                raise  # a bug, and not a package that somebody forgot to install
            _leave(
                EnvironmentFault(
                    "a package that ftsec_ray needs is not installed",
                    error.name,
                    "all packages that its pyproject.toml requires",
                    f"install {error.name} (on a cluster, in the image of every node);"
                    " `ftsec doctor` lists what else is missing",
                )
            )
        except KeyboardInterrupt:
            again = " ".join(["ftsec", *sys.argv[1:]])
            say(f"\ninterrupted; finished stages are kept. Continue with: {again}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # a reader such as `head` has closed the pipe
            flushed()
            raise typer.Exit(PIPE_CLOSED) from None

    return _guarded
