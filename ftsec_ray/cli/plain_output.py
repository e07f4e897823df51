"""Output on any terminal, file or pipe: one that is not UTF-8 gets ASCII in place of the characters
that it lacks, and a closed pipe ends the program quietly.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
from typing import TextIO

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code when the reader of the output has closed it, by the convention of shells."""
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
    """Let stdout and stderr write any text; characters that their encoding lacks become ASCII."""
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
    """Flush stdout and stderr; False when one was closed, about which Python then prints nothing
    more.
    """
    return all([_flush(stream) for stream in (sys.stdout, sys.stderr)])


def _flush(stream: TextIO | None) -> bool:
    if stream is None or stream.closed:
        return True
    try:
        stream.flush()
    except OSError:
        # Python would flush again at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True
