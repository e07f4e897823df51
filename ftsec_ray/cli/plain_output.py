"""Output on whatever terminal, file or pipe there is: one that is not UTF-8 gets ASCII signs in
place of those that it lacks, and one that was closed ends the program quietly.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
from typing import TextIO

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code where whoever read the output has gone, as a shell knows it."""
_HANDLER = "ftsec_ray.ascii_signs"
_ASCII = {
    "–": "-",
    "—": "-",
    "−": "-",
    "†": "+",
    "·": "/",
    "×": "x",
    "…": "...",
    "→": "->",
    "←": "<-",
    "↓": "v",
    "↑": "^",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+/-",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "•": "*",
    "●": "*",
    "✓": "ok",
    "\u00a0": " ",
}


def use_plain_signs() -> None:
    """Let stdout and stderr write every text: what their encoding lacks as ASCII, else as `?`."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign, "?") for sign in text), error.end


def flushed() -> bool:
    """Write out what stdout and stderr hold; False where one was closed, of which Python says
    nothing more then.
    """
    return all([_flush(stream) for stream in (sys.stdout, sys.stderr)])


def _flush(stream: TextIO | None) -> bool:
    if stream is None or stream.closed:
        return True
    try:
        stream.flush()
    except OSError:
        # Python would try again at its end, and complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True
