"""How the terminal shows failures: each once, with its message, the value got and the fix, wrapped
to the width of the window.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ftsec_ray.cli.console import say, shown, stdout

MAX_FAILURES = 10
"""Failures shown; the table `cells` and `status --json` hold all."""
_MAX_CELLS = 3
_MAX_CHARS = 400
_FRAME = re.compile(r'\s*File ".*", line \d+')


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed cell."""

    cell: str
    """In words."""
    stage: str
    """Kind and method of the stage that failed."""
    error: str
    """As the record holds it: the text of an FtsecError, or the end of a traceback."""


def headline(error: object) -> str:
    """An error in one line: the first line of an FtsecError, of a traceback the line after its
    frames.
    """
    lines = _message(error)
    return lines[0].strip() if lines else "no message"


def details(error: object) -> list[str]:
    """The other lines of an error: `got`, `want` and `fix` of an FtsecError, or the rest of a long
    message.
    """
    return [_cut(line) for line in _message(error)[1:] if line.strip()]


def _message(error: object) -> list[str]:
    """The lines of an error without the frames of its traceback."""
    lines = str(error or "").strip("\n").rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if _FRAME.match(line)]
    if not frames and not (lines and lines[0][:1].isspace()):
        return lines
    # Where only its end was kept, a traceback begins with a line of code.
    rest = lines[frames[-1] + 1 :] if frames else lines
    start = next((i for i, line in enumerate(rest) if line[:1].strip()), None)
    return lines[-1:] if start is None else rest[start:]


def show_failures(failures: Iterable[Failure], *, more: str) -> None:
    """Print failures, grouped by stage and error.

    Args:
        failures: One per failed cell.
        more: Where the others are listed, when there are too many to print.
    """
    cells: dict[tuple[str, str], list[str]] = {}
    for one in failures:
        cells.setdefault((one.stage, one.error), []).append(one.cell)
    if not cells:
        return
    say(f"failed cells: {sum(map(len, cells.values()))}")
    for (stage, error), names in list(cells.items())[:MAX_FAILURES]:
        _print(f"{stage}: {headline(error)}", 2)
        for line in details(error):
            _print(line.strip(), 4)
        _print(_named(names), 4)
    if len(cells) > MAX_FAILURES:
        say(f"and {len(cells) - MAX_FAILURES} more failures: {more}")


def _named(cells: Sequence[str]) -> str:
    shown = "; ".join(cells[:_MAX_CELLS])
    rest = len(cells) - _MAX_CELLS
    return f"in: {shown}" + (f"; and {rest} more cells" if rest > 0 else "")


def _print(text: str, indent: int) -> None:
    """A text behind an indent, wrapped where a window or COLUMNS gives a width; long words (paths)
    stay whole.
    """
    text = shown(text, one_line=True)
    lines = [text]
    if stdout().is_terminal or os.environ.get("COLUMNS"):
        lines = textwrap.wrap(
            text,
            max(20, stdout().width - indent),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    for line in lines:
        say(" " * indent + line)


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_CHARS else f"{line[: _MAX_CHARS - 4]} ..."
