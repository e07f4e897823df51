"""Hash of the code of a Python file: of its tokens, without comments, docstrings and layout; equal
under every supported Python version.

The `tokenize` module of the standard library reads an f-string as one token up to Python 3.11, and
as several from 3.12 on. So this module reads string literals itself, and replaces each by a name
before `tokenize` runs. Apart from comments and layout, the hash ignores everything that `ruff
format` may change without an effect on the program: quotes, prefixes, implicit concatenation,
trailing commas, parentheses around a whole value, and the notation of numbers.

This file imports only the standard library, and can be run as a script: `python tokens.py FILE ...`
prints one hash per file.
"""

from __future__ import annotations

import ast
import hashlib
import io
import keyword
import re
import sys
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

HASH_CHARS = 32
_WORD = re.compile(r"\w+")
_PIECE = re.compile(r"\w+|#[^\n]*|[^\w#\"'\n]+|\n")
_QUOTE = re.compile(r"\"\"\"|'''|\"|'")
_PREFIXES = {"", "b", "r", "u", "f", "t", "br", "rb", "fr", "rf", "tr", "rt"}
_LITERAL = re.compile(r"__literal_(\d+)__")
_UNESCAPED_QUOTE = re.compile(r'(\\.)|"', re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"
_ASSIGNMENTS = {f"{sign}=" for sign in ("", *"+-*/%@&|^", "//", "**", "<<", ">>")}
_NO_GROUP = {"for", ":=", "yield"}
"""Tokens with which parentheses are more than a group or a tuple."""
_NOTED = _NO_GROUP | {"lambda"}
_NEW_LINE, _INDENT, _DEDENT = "\\n", "\\i", "\\d"
"""Markers that cannot be tokens of Python."""


@dataclass(eq=False)
class _Literal:
    """The content of a string literal, in order: texts, and the tokens of replacement fields."""

    parts: list[str | bytes | list[str]] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        """Whether it is a text without replacement fields, such as a docstring."""
        return all(isinstance(part, str) for part in self.parts)

    def add(self, part: str | bytes | list[str]) -> None:
        """Append a part; adjacent texts are joined."""
        last = self.parts[-1] if self.parts else None
        if isinstance(part, (str, bytes)) and type(last) is type(part):
            self.parts[-1] = last + part  # type: ignore[operator]  # both are of one type
        elif part or not self.parts:
            self.parts.append(part)

    def tokens(self) -> Iterator[str]:
        """Tokens that identify the literal."""
        kept = [part for part in self.parts if part != ""] or [""]
        for part in kept:
            if isinstance(part, list):
                yield from ("{", *part, "}")
            else:
                yield ascii(part)


@lru_cache(maxsize=1024)
def token_hash(source: str) -> str:
    """Hash (32 hex digits) of Python source code; SyntaxError or TokenError if it is not valid."""
    return hashlib.sha256("\n".join(normal_tokens(source)).encode()).hexdigest()[:HASH_CHARS]


def file_token_hash(path: Path) -> str:
    """Hash (32 hex digits) of a Python file in UTF-8."""
    return token_hash(path.read_text(encoding="utf-8-sig"))


def normal_tokens(source: str) -> list[str]:
    """The tokens of Python source code that enter its hash."""
    code, literals = _without_literals(source)
    tokens: list[str] = []
    line: list[str | _Literal] = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.INDENT:
            tokens.append(_INDENT)
        elif token.type == tokenize.DEDENT:
            tokens.append(_DEDENT)
        elif token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            tokens += _line_tokens(line)
            line = []
        elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP):
            _append(line, token, literals)
        elif token.type == tokenize.ERRORTOKEN and not token.string.isspace():
            raise SyntaxError(f"not Python: {token.string!r} in {token.line.strip()!r}")
    return tokens


def _append(
    line: list[str | _Literal], token: tokenize.TokenInfo, literals: list[_Literal]
) -> None:
    """Add a token to a logical line; adjacent string literals are joined."""
    literal = _LITERAL.fullmatch(token.string)
    if literal is None:
        is_number = token.type == tokenize.NUMBER
        line.append(repr(ast.literal_eval(token.string)) if is_number else token.string)
    elif line and isinstance(line[-1], _Literal):
        for part in literals[int(literal[1])].parts:
            line[-1].add(part)
    else:
        line.append(literals[int(literal[1])])


def _line_tokens(line: list[str | _Literal]) -> Iterator[str]:
    """The tokens of a logical line; none for an empty line or a line that is only a string."""
    if not line or (len(line) == 1 and isinstance(line[0], _Literal) and line[0].is_text):
        return
    for token in _without_free_tokens(line):
        if isinstance(token, _Literal):
            yield from token.tokens()
        else:
            yield token
    yield _NEW_LINE


# Trailing commas, and parentheses with which a formatter splits long lines.


@dataclass
class _Bracket:
    """A bracket of a line."""

    start: int
    """Its index in the line."""
    can_drop_any: bool
    """Whether a trailing comma has no meaning: in calls, lists, sets and mappings."""
    commas: int = 0
    words: set[str] = field(default_factory=set)
    """Words of `_NOTED` directly inside it, not in an inner bracket."""


def _without_free_tokens(line: Iterable[str | _Literal]) -> list[str | _Literal]:
    """The line without trailing commas that do not make a tuple, and without parentheses around a
    whole value at its end.
    """
    kept: list[str | _Literal] = []
    open_brackets: list[_Bracket] = []
    last = None
    for token in line:
        if isinstance(token, _Literal):
            pass
        elif token in _OPENING:
            is_call_or_index = bool(kept) and _may_end_a_value(kept[-1])
            is_free = token == "{" or (token == "(") == is_call_or_index
            open_brackets.append(_Bracket(len(kept), is_free))
        elif token in _CLOSING and open_brackets:
            last = open_brackets.pop()
            is_free = last.can_drop_any or (last.commas > 1 and "lambda" not in last.words)
            if kept[-1] == "," and is_free:
                kept.pop()
        elif open_brackets:
            open_brackets[-1].commas += token == ","
            open_brackets[-1].words |= {token} & _NOTED
        kept.append(token)
    return kept if last is None else _without_outer(kept, last)


def _without_outer(line: list[str | _Literal], last: _Bracket) -> list[str | _Literal]:
    """The line without its last parentheses, `last`, if they enclose the whole value that is
    assigned, returned, imported, tested or iterated over.
    """
    before = line[last.start - 1] if last.start else ""
    head = line[: last.start]
    is_test = len(head) == 1 and before in ("if", "elif", "while")
    is_loop = head[:1] == ["for"] and before == "in" and head.count("in") == 1
    end = -2 if line[-1] == ":" and (is_test or is_loop) else -1
    is_value = is_test or is_loop or before in ("return", "yield") or before in _ASSIGNMENTS
    is_group = not last.words & _NO_GROUP and len(line) + end - last.start > 1
    if (
        line[end] == ")"
        and line[last.start] == "("
        and (before == "import" or (is_value and is_group))
    ):
        return [*head, *line[last.start + 1 : end], *line[len(line) + end + 1 :]]
    return line


def _may_end_a_value(token: str | _Literal) -> bool:
    """Whether `(` after the token starts a call or parameters, and `[` a subscript."""
    if isinstance(token, _Literal) or token in _CLOSING:
        return True
    return token.isidentifier() and not keyword.iskeyword(token) and not _is_soft(token)


def _is_soft(token: str) -> bool:
    return token in ("match", "case", "type", "_")


# String literals.


def _without_literals(source: str) -> tuple[str, list[_Literal]]:
    """The source without comments and with a name for every string literal, and the literals."""
    code: list[str] = []
    literals: list[_Literal] = []
    place, is_line_start = 0, True
    while place < len(source):
        piece = _PIECE.match(source, place)
        text = piece[0] if piece else ""
        if source.startswith(("'", '"'), place + len(text)) and text.lower() in _PREFIXES:
            quote = _QUOTE.match(source, place + len(text))
            assert quote is not None
            place, literal = _read_literal(source, place, quote)
            # Separate the name from a keyword as in `return"x"`, but do not indent a line.
            code.append(f"{'' if is_line_start else ' '}__literal_{len(literals)}__ ")
            literals.append(literal)
            is_line_start = False
            continue
        if not text.startswith("#"):
            code.append(text)
            is_line_start = text.endswith("\n") or (is_line_start and text.isspace())
        place += len(text)
    return "".join(code), literals


def _line_end(source: str, place: int) -> int:
    end = source.find("\n", place)
    return len(source) if end < 0 else end


def _quote_at(source: str, place: int) -> re.Match[str] | None:
    """The opening quote of a literal that starts at `place`, with or without a prefix."""
    word = _WORD.match(source, place)
    if word is not None and word[0].lower() not in _PREFIXES:
        return None
    return _QUOTE.match(source, word.end() if word else place)


def _read_literal(source: str, place: int, quote: re.Match[str]) -> tuple[int, _Literal]:
    """The end of the literal at `place`, and its content."""
    prefix = source[place : quote.start()].lower()
    if "f" in prefix or "t" in prefix:
        literal = _Literal([["t"]] if "t" in prefix else [])
        return _read_fields(source, quote.end(), literal, end=quote[0], is_raw="r" in prefix)
    end = quote.end()
    while not source.startswith(quote[0], end):
        if end >= len(source):
            raise SyntaxError(f"unterminated string: {source[place : place + 40]!r}")
        end += 2 if source[end] == "\\" else 1
    end += len(quote[0])
    return end, _Literal([_value(source[place:end])])


def _value(literal: str) -> str | bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are kept unchanged
        value = ast.literal_eval(literal)
    return value if isinstance(value, bytes) else str(value)


def _read_fields(
    source: str, place: int, literal: _Literal, *, end: str, is_raw: bool
) -> tuple[int, _Literal]:
    """Read the text and the fields of an f-string up to `end`: its closing quote, or `}` for the
    format of a field. Returns the position after it, and the literal.
    """
    is_format = end == "}"
    text_start = place

    def keep_text() -> None:
        text = source[text_start:place]
        literal.add(text if is_raw else _cooked(text))

    while not source.startswith(end, place):
        if place >= len(source):
            raise SyntaxError(f"unterminated f-string: {source[text_start:][:40]!r}")
        char = source[place]
        if char == "\\":
            place = _behind_escape(source, place, is_raw=is_raw)
        elif char in "{}" and source.startswith(char * 2, place) and not is_format:
            place += 1
            keep_text()
            place += 1
            text_start = place
        elif char == "{":
            keep_text()
            place, tokens = _read_field(source, place + 1, is_raw=is_raw)
            literal.add(tokens)
            text_start = place
        else:
            place += 1
    keep_text()
    return place + len(end), literal


def _behind_escape(source: str, place: int, *, is_raw: bool) -> int:
    """The position after an escape sequence; a brace after the backslash still starts a field."""
    following = source[place + 1 : place + 2]
    if following in "{}":
        return place + 1
    if following == "N" and not is_raw and source.startswith("{", place + 2):
        return source.index("}", place) + 1
    return place + 2


def _cooked(text: str) -> str:
    """Part of an f-string's text, with escapes resolved."""
    stray = "\\" if (len(text) - len(text.rstrip("\\"))) % 2 else ""
    body = _UNESCAPED_QUOTE.sub(
        lambda match: match[1] or '\\"', text[: len(text) - len(stray)] if stray else text
    )
    return str(_value(f'"""{body}"""')) + stray


def _read_field(source: str, place: int, *, is_raw: bool) -> tuple[int, list[str]]:
    """Read a replacement field after its opening brace; returns the position after it, and its
    tokens.
    """
    start, place = place, _expression_end(source, place)
    expression = source[start:place]
    tokens = normal_tokens(f"({expression})")
    if source.startswith("=", place):
        tokens.append(ascii(expression))  # `{x=}` prints its own source text
        behind = place + 1
        place = behind + len(source[behind:]) - len(source[behind:].lstrip())
        tokens.append(ascii(source[behind - 1 : place]))
    if source.startswith("!", place):
        conversion = _WORD.match(source, place + 1)
        if conversion is None:
            raise SyntaxError(f"missing conversion in {source[start : place + 5]!r}")
        tokens.append(f"!{conversion[0]}")
        place = conversion.end()
        while source[place : place + 1].isspace():
            place += 1
    if source.startswith(":", place):
        place, spec = _read_fields(source, place + 1, _Literal(), end="}", is_raw=is_raw)
        return place, [*tokens, ":", *spec.tokens()]
    if not source.startswith("}", place):
        raise SyntaxError(f"unterminated field: {source[start : place + 5]!r}")
    return place + 1, tokens


def _expression_end(source: str, place: int) -> int:
    """The end of the expression of a replacement field: at its `=`, `!`, `:` or `}`."""
    depth = 0
    while place < len(source):
        char = source[place]
        quote = _quote_at(source, place)
        word = _WORD.match(source, place)
        if quote is not None:
            place, _ = _read_literal(source, place, quote)
        elif word is not None:
            place = word.end()
        elif char == "#":
            place = _line_end(source, place)
        elif char in "=!<>" and source.startswith("=", place + 1):
            place += 2
        elif depth == 0 and (char in "!:}" or _is_self_documenting(source, place)):
            return place
        else:
            depth += (char in _OPENING) - (char in _CLOSING)
            place += 1
    raise SyntaxError("unterminated field")


def _is_self_documenting(source: str, place: int) -> bool:
    return source[place] == "=" and source[place + 1 :].lstrip()[:1] in ("}", "!", ":")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(f"{file_token_hash(Path(name))}\n")
