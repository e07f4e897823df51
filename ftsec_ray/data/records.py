"""Read a file of rows in whatever common form it has, as (columns, records) with text and row
numbers kept.

.jsonl, .json, .csv, .tsv, .txt and .parquet, each also as .gz. JSON may be a list of objects, of
strings or of conversations, an object of lists, an object of strings, or an object with the list
inside. A .tsv has no quoting.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftsec_ray.errors import DataError

Record = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
MAX_CELL_CHARS = 16 * 2**20


def read_records(path: str) -> list[Record]:
    """All records of a local file, each a mapping from column to value; DataError when it cannot be
    read.
    """
    suffixes = [s.lower() for s in Path(path).suffixes]
    is_packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if is_packed else suffixes)[-1:]
    if not kind or kind[0] not in FORMATS:
        raise DataError(
            "a data file of unknown format",
            path,
            " | ".join(FORMATS) + ", each also .gz",
            "convert or rename the file",
        )
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if is_packed else raw
    except (OSError, EOFError) as error:
        raise DataError(
            "a data file cannot be read", path, "a readable file", str(error)
        ) from error
    if kind[0] == ".parquet":
        return _parquet(raw, path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("a data file is not UTF-8 text", path, "UTF-8", str(error)) from error
    return list(
        {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _lines}[
            kind[0]
        ](text, path)
    )


def columns_of(records: list[Record]) -> list[str]:
    """The columns of records, in the order in which they first occur."""
    return list(dict.fromkeys(column for record in records for column in record))


def _parquet(raw: bytes, path: str) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records: list[Record] = pq.read_table(io.BytesIO(raw)).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError("a data file cannot be read", path, "a Parquet file", str(error)) from error
    return records


def _lines(text: str, path: str) -> Iterator[Record]:  # noqa: ARG001
    yield from ({"text": line.strip()} for line in text.split("\n") if line.strip())


def _cells(lines: Iterator[list[str]], path: str) -> Iterator[Record]:
    header: list[str] = []
    try:
        for number, cells in enumerate(lines):
            if not header:
                header = [name.strip() for name in cells]
            elif len(cells) == len(header):
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
    return _cells(csv.reader(io.StringIO(text, newline="")), path)


def _tsv(text: str, path: str) -> Iterator[Record]:
    rows = (
        [cell.strip() for cell in line.split("\t")] for line in text.split("\n") if line.strip()
    )
    return _cells(rows, path)


def _json_lines(text: str, path: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _record(_parsed(line, f"line {number} of {path}"), number, path)


def _json(text: str, path: str) -> Iterator[Record]:
    value = _parsed(text, path)
    items = value if isinstance(value, list) else _object_rows(value, path)
    return (_record(item, number, path) for number, item in enumerate(items, 1))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON", text[:120], "valid JSON", str(error)) from error


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
            "an object whose lists have one length",
            "name the file's rows under one key",
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
            f"row {number} of {path} is no row", item, "an object, a string or a list of messages"
        )
    return item
