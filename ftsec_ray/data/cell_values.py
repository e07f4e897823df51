"""Single values of a data file: which are missing, how a value compares with the text of a `where`,
and which texts are refused.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from ftsec_ray.errors import DataError

MISSING_WORDS = frozenset({"nan", "none", "null", "n/a", "na"})
"""What programs write into the cells of a .csv or .tsv that have no value, in any case."""
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_HALF = re.compile("[\ud800-\udfff]")
_MAX_VALUES = 6


def is_missing(value: object, *, is_cell: bool = False) -> bool:
    """Whether a value is missing: null, or a float that is not finite.

    Args:
        value: A value of a row.
        is_cell: Whether it comes from a .csv or .tsv, where every value is text and a cell that
            holds one of MISSING_WORDS counts as missing.
    """
    if isinstance(value, float):
        return not math.isfinite(value)
    if is_cell and isinstance(value, str):
        return value.strip().lower() in MISSING_WORDS
    return value is None


def plain_text(value: Any) -> str | None:
    """The text of a string or a number; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or is_missing(value):
        return None
    return str(value)


def label_text(value: Any) -> str | None:
    """The text of a label: like `plain_text`, but a whole float (from a column of integers with
    gaps) as an integer, and booleans as `true` or `false`.
    """
    if isinstance(value, bool):
        return str(value).lower()
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else plain_text(value)


def matches(value: Any, wanted: str) -> bool:
    """Whether a value of a row equals the value in a `where`, compared by type: 1, 1.0 and "1" are
    equal, as are true and "True", a date and its text, null and a missing value.
    """
    text = wanted.strip()
    if is_missing(value):
        return text.lower() == "null"
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        kind = float if isinstance(value, float) else Decimal
        return _NUMBER.fullmatch(text) is not None and kind(text) == value
    if isinstance(value, datetime.date):
        return _is_date(value, text)
    own = str(value).strip()
    if own == text:
        return True
    if _NUMBER.fullmatch(own) and _NUMBER.fullmatch(text):
        return Decimal(own) == Decimal(text)
    return own.lower() == text.lower() and own.lower() in ("true", "false")


def _is_date(value: datetime.date, text: str) -> bool:
    try:
        wanted = datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    if not isinstance(value, datetime.datetime):
        return value == wanted.date() and wanted.time() == datetime.time()
    if wanted.tzinfo is None or value.tzinfo is None:  # compare in the time zone of the data
        return value.replace(tzinfo=None) == wanted.replace(tzinfo=None)
    return value == wanted


def values_there(records: Iterable[Mapping[str, Any]], column: str) -> str:
    """The most frequent values of a column with their counts, for an error message."""
    counts = Counter(_shown(record.get(column)) for record in records)
    shown = [f"{value} ({count})" for value, count in counts.most_common(_MAX_VALUES)]
    more = len(counts) - len(shown)
    return f"{column}: " + ", ".join(shown) + (f" and {more} other values" if more > 0 else "")


def _shown(value: object) -> str:
    if is_missing(value):
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, datetime.date):
        text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def refuse_broken_text(value: object, place: str) -> None:
    """DataError if any text inside a value, also in a key, holds half a character or a NUL."""
    if isinstance(value, str):
        half = None if value.isascii() else _HALF.search(value)
        if half:
            raise DataError(
                f"{place} holds half a character, the surrogate \\u{ord(half[0]):04x}",
                value[max(0, half.start() - 40) : half.end() + 40],
                "whole characters: surrogates only in pairs",
                "the text was cut inside a character, such as an emoji: repair or remove the row",
            )
        if "\0" in value:
            at = value.index("\0")
            raise DataError(
                f"{place} holds a NUL character, \\u0000",
                value[max(0, at - 40) : at + 40],
                "text without it: tokenizers and other programs end the text there",
                "remove it from the row",
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_broken_text(key, place)
            refuse_broken_text(item, place)
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_broken_text(item, place)
