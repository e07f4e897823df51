"""Reads a file of rows in any common format into records, and keeps texts and row numbers.

.jsonl, .json, .csv, .tsv, .txt and .parquet, each also as .gz. JSON may be a list of objects, of
strings or of conversations, an object of lists, an object of strings, or an object that holds the
list. A .tsv has no quoting. Files that are damaged or hold no data raise a DataError that says what
they are.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ftsec_ray.config.limits import is_deeper
from ftsec_ray.config.open_limits import DATA_COLUMNS, DATA_ROWS, DATA_VALUES
from ftsec_ray.data.cell_values import refuse_broken_text
from ftsec_ray.data.not_rows import (
    json_value,
    refuse_error_body,
    refuse_json,
    refuse_page,
    refuse_separator,
)
from ftsec_ray.data.parquet_records import parquet_records
from ftsec_ray.data.raw_files import decoded, head_of, read_raw, refuse_beyond
from ftsec_ray.errors import DataError

Record = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
CELLS = (".csv", ".tsv")
"""Formats in which every value is text."""
MAX_CELL_CHARS = 16 * 2**20
_MAX_DEPTH = 100
_LOOK_BYTES = 2**20
_ESCAPED = re.compile(r"\\u([dD][89a-fA-F]|0000)")
"""How JSON writes half a character and NUL; a text read as UTF-8 cannot hold them otherwise."""


def read_records(path: str) -> list[Record]:
    """All records of a local file, each a mapping from column to value; DataError if it cannot be
    read.
    """
    kind, is_packed = format_of(path)
    if kind not in FORMATS:
        raise DataError(
            "a data file has an unknown format",
            path,
            " | ".join(FORMATS) + ", each also as .gz",
            "convert or rename the file",
        )
    try:
        raw = read_raw(path, is_packed=is_packed, is_parquet=kind == ".parquet")
    except DataError:
        _refuse_text(path, kind)
        raise
    if kind == ".parquet":
        records = parquet_records(raw, path)
        must_look = True
    else:
        text = decoded(raw, path)
        del raw  # the text is as large
        _refuse_many(text, path, kind)
        _refuse_foreign(text, path, kind)
        reader = {
            ".jsonl": _json_lines,
            ".json": _json,
            ".csv": _csv,
            ".tsv": _tsv,
            ".txt": _lines,
        }[kind]
        records = _within(reader(text, path), path)
        must_look = kind in (".jsonl", ".json") and _ESCAPED.search(text) is not None
    if not records:
        raise DataError(
            f"{path} holds no rows",
            "only a header" if kind in (*CELLS, ".parquet") else "an empty file or list",
            "at least one row",
            "write or download the file again",
        )
    refuse_beyond(DATA_COLUMNS, len(columns_of(records)), path)
    if must_look:
        for number, record in enumerate(records, 1):
            refuse_broken_text(record, f"row {number} of {path}")
    return records


def _within(records: Iterator[Record], path: str) -> list[Record]:
    """The records; DataError if they exceed the limit."""
    most = DATA_ROWS.value
    within = list(islice(records, most + 1))
    refuse_beyond(DATA_ROWS, len(within), path)
    return within


_VALUE_MARKS = {".jsonl": ",[{", ".json": ",[{", ".csv": ",\n", ".tsv": "\t\n"}
"""Characters before a value: a small file of brackets becomes many objects in memory."""
_IN_JSON = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)
_IN_CSV = re.compile(r'(?<![^,\r\n])"(?:[^"]++|"")*+"?|[,\n]')
_UNQUOTED = {".jsonl": _IN_JSON, ".json": _IN_JSON, ".csv": _IN_CSV}
"""A quoted text, up to its end or that of the file, or a mark outside quotes: slower to count, but
correct for texts full of punctuation.
"""


def _refuse_many(text: str, path: str, kind: str) -> None:
    """DataError if a text would give too many rows or values, before any of them is created."""
    count = sum(text.count(mark) for mark in _VALUE_MARKS.get(kind, ""))
    if count > DATA_VALUES.value and kind in _UNQUOTED:
        marks = (match for match in _UNQUOTED[kind].finditer(text) if match[0][0] != '"')
        count = sum(1 for _ in islice(marks, DATA_VALUES.value + 1))
    refuse_beyond(DATA_VALUES, count, path)
    if kind in (".jsonl", ".tsv", ".txt"):
        refuse_beyond(DATA_ROWS, text.count("\n"), path)


def format_of(path: str) -> tuple[str, bool]:
    """The format in a file's name (such as `.csv`), and whether it is packed (.gz)."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    is_packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if is_packed else suffixes)[-1:]
    return (kind[0] if kind else ""), is_packed


def holds_cells(path: str | None) -> bool:
    """Whether the values of a source are the cells of a .csv or .tsv."""
    return path is not None and format_of(path)[0] in CELLS


def _refuse_text(path: str, kind: str) -> None:
    """A better message if a file that is no archive or Parquet is a page or an error."""
    try:
        text = head_of(path, _LOOK_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        return
    _refuse_foreign(text, path, kind)


def _refuse_foreign(text: str, path: str, kind: str) -> None:
    refuse_page(text, path)
    if kind in (*CELLS, ".txt", ".parquet"):
        refuse_json(text, path, is_text=kind == ".txt")


def columns_of(records: list[Record]) -> list[str]:
    """The columns of records, in the order in which they first occur."""
    return list(dict.fromkeys(column for record in records for column in record))


def _lines(text: str, path: str) -> Iterator[Record]:  # noqa: ARG001
    yield from ({"text": line.strip()} for line in text.split("\n") if line.strip())


def _header(cells: list[str], path: str) -> list[str]:
    header = [name.strip() for name in cells]
    refuse_beyond(DATA_COLUMNS, len(header), path)
    twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if twice:
        raise DataError(
            f"{path} has two columns with the same name",
            twice[0],
            "different names: " + " | ".join(header),
            "rename or remove one of them",
        )
    return header


def _cells(lines: Iterator[list[str]], path: str, separator: str) -> Iterator[Record]:
    header: list[str] = []
    try:
        for number, cells in enumerate(lines):
            if not header:
                header = _header(cells, path)
                refuse_separator(header, None, path, separator)
                continue
            if number == 1:
                refuse_separator(header, cells, path, separator)
            if len(cells) == len(header):
                yield dict(zip(header, cells, strict=True))
            elif cells:
                raise DataError(
                    f"row {number} of {path} has {len(cells)} cells",
                    cells,
                    f"{len(header)} cells: {' | '.join(header)}",
                    "repair the row, or quote a cell that holds the separator",
                )
    except csv.Error as error:
        raise DataError(
            "a data file cannot be read",
            path,
            "comma-separated text with a header line",
            str(error),
        ) from error


def _csv(text: str, path: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_CELL_CHARS)
    return _cells(csv.reader(io.StringIO(text, newline="")), path, ",")


def _tsv(text: str, path: str) -> Iterator[Record]:
    rows = (
        [cell.strip() for cell in line.split("\t")] for line in text.split("\n") if line.strip()
    )
    return _cells(rows, path, "\t")


def _json_lines(text: str, path: str) -> Iterator[Record]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        value = _parsed(line, f"line {number} of {path}", whole=text)
        if len(lines) == 1:
            refuse_error_body(value, path)
        yield _record(value, number, path)


def _json(text: str, path: str) -> Iterator[Record]:
    value = _parsed(text, path)
    refuse_error_body(value, path)
    items = value if isinstance(value, list) else _object_rows(value, path)
    return (_record(item, number, path) for number, item in enumerate(items, 1))


def _parsed(text: str, place: str, *, whole: str = "") -> Any:
    """The value of a JSON text; `whole` is the text of the whole file if `text` is one line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if whole:
            refuse_error_body(json_value(whole), place.partition(" of ")[2])
        fix = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        if whole and json_value(whole) is not None:
            fix += "; the file as a whole is JSON: rename it to .json"
        elif not whole and json_value(text.lstrip().partition("\n")[0]) is not None:
            fix += "; its first line is JSON: rename it to .jsonl"
        raise DataError(f"{place} is not JSON", text[:120], "valid JSON", fix) from error


def _object_rows(value: Any, path: str) -> list[Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds no rows",
            type(value).__name__,
            "a list, or an object of lists or strings",
        )
    if value and all(isinstance(item, str) for item in value.values()):
        return [{"key": key, "value": item} for key, item in value.items()]
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item}
    if len({len(item) for item in lists.values()}) != 1:
        raise DataError(
            f"{path} holds no rows",
            {key: len(item) for key, item in lists.items()},
            "an object whose lists have the same length",
            "put the rows of the file into one list, under one key",
        )
    if len(lists) == 1:
        ((name, only),) = lists.items()
        return [{name: item} if isinstance(item, str) else item for item in only]
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _record(item: Any, number: int, path: str) -> Record:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, list) and item and all(isinstance(m, dict) and "role" in m for m in item):
        return {"messages": item}
    if not isinstance(item, dict):
        raise DataError(
            f"row {number} of {path} is not a row",
            item,
            "an object, a string or a list of messages",
        )
    if any(is_deeper(value, _MAX_DEPTH) for value in item.values()):
        raise DataError(
            f"row {number} of {path} is nested too deeply",
            None,
            f"at most {_MAX_DEPTH} levels of lists and objects",
            "keep only the columns that you need",
        )
    return item
