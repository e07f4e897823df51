"""Makes text from outside safe to show: names, prompts, completions, verdicts and errors may hold
characters that move a cursor, hide or reverse text, or act as markup.

One function per target. The browser makes CSV and LaTeX, with `csv` and `latex` of
`report/export.js`, from texts that `for_html` has processed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Control characters, format characters (bidirectional, zero-width), surrogates, private and
unassigned characters, and unusual line ends.
"""
_BLANK = frozenset(
    chr(code)
    for first, last in (
        (0x34F, 0x34F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x2800, 0x2800),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0D),
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)
"""Fillers and variation selectors, which show nothing although they are letters or marks; the two
that choose between a character and its emoji are allowed.
"""
_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|#&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE
)
"""Markup in a line of GitHub's Markdown, including the beginnings of links without brackets."""


def for_terminal(text: str, *, one_line: bool = False) -> str:
    r"""The text with everything that a terminal would act on or hide as `\x1b` or `\u202e`; with
    `one_line` also line ends and tabs.
    """
    return _shown(text, _escape, kept="" if one_line else "\n\t")


def for_html(text: str) -> str:
    """The text with everything that a page would hide or reverse as ⟨U+202E⟩; the template escapes
    markup.
    """
    return _shown(text, _named, kept="\n\t")


def for_markdown(text: str) -> str:
    """The text in one line, escaped for Markdown, its tables and the HTML made from it."""
    return _MARKDOWN.sub(r"\\\g<0>", for_html(" ".join(text.split())))


def _shown(text: str, shape: Callable[[str], str], *, kept: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    odd = {ord(sign): shape(sign) for sign in set(text) if sign not in kept and _is_hidden(sign)}
    return str.translate(text, odd) if odd else text


def _is_hidden(sign: str) -> bool:
    return unicodedata.category(sign) in _HIDDEN or sign in _BLANK


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def _named(sign: str) -> str:
    return f"⟨U+{ord(sign):04X}⟩"
