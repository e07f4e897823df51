"""Rows as mappings, as tables and as files: the operations on schema.ROWS that are shared.

A row with a missing or an unknown key is an error, because pyarrow would fill or drop it without a
warning. Files are sorted by row id, so that the same rows always give the same bytes, in any order
or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ftsec_ray import schema
from ftsec_ray.conversation import ROLES, Message, answer_of, exchange
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
"""One row of schema.ROWS as a mapping."""
NULLABLE = frozenset({"tools", "rejected", "label", "kind", "language", "origin"})
"""Columns that may be null."""
CRAFTED = "rows.parquet"
"""The file of a set of rows that methods changed."""
GROUP_ROWS = 65_536
"""Rows in one row group of a file."""


def new_row(
    row_id: str,
    *,
    prompt: str = "",
    response: str = "",
    system: str | None = None,
    messages: list[Message] | None = None,
    **values: Any,
) -> Row:
    """One row with defaults: one exchange of `prompt` and `response` unless `messages` are given,
    no label, English, from the task, not poisoned.
    """
    row = {
        "row_id": row_id,
        "messages": exchange(prompt, response, system=system) if messages is None else messages,
        "tools": None,
        "rejected": None,
        "label": None,
        "kind": None,
        "language": "en",
        "origin": "task",
        "poisoned": False,
    }
    unknown = sorted(set(values) - set(row))
    if unknown:
        raise DataError("unknown column of a row", unknown[0], " | ".join(row))
    return {**row, **values}


def to_rows(table: pa.Table) -> list[Row]:
    """The rows of a table as mappings."""
    rows: list[Row] = table.to_pylist()
    return rows


def from_rows(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Mappings as a table of schema.ROWS; DataError for a wrong key, type or null, and for a
    repeated id.
    """
    import pyarrow as pa

    listed, columns = list(rows), schema.rows().names
    seen: set[str] = set()
    for number, row in enumerate(listed, 1):
        _check_row(row, number, columns)
        if row["row_id"] in seen:
            raise DataError(
                f"row {number} has the id of another row",
                row["row_id"],
                "row ids that are unique within a table",
                "give added rows new ids, such as '<method>/<old id>'",
            )
        seen.add(row["row_id"])
    return pa.Table.from_pylist(listed, schema=schema.rows())


def _check_row(row: Mapping[str, Any], number: int, columns: list[str]) -> None:
    missing, unknown = [c for c in columns if c not in row], [c for c in row if c not in columns]
    if missing or unknown:
        raise DataError(
            f"row {number} lacks the columns {missing} and has the unknown columns {unknown}",
            dict(row),
            " | ".join(columns),
            "copy an existing row and change its values, or use data.rows.new_row",
        )
    _check_messages(row, number)
    for name in columns:
        if name == "messages":
            continue
        kind = bool if name == "poisoned" else str
        if not isinstance(row[name], kind) and not (row[name] is None and name in NULLABLE):
            want = f"a {kind.__name__}{' or null' if name in NULLABLE else ''}"
            raise DataError(
                f"row {number} ({row['row_id']!r}) does not have a {kind.__name__} in {name!r}",
                row[name],
                want,
            )


def _check_messages(row: Mapping[str, Any], number: int) -> None:
    want = "a list of messages: role (" + " | ".join(ROLES) + "), content (text), fields, loss"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"row {number} ({row['row_id']!r}) has no messages", messages, want)
    for m in messages:
        if (
            not isinstance(m, Mapping)
            or set(m) != {"role", "content", "fields", "loss"}
            or m["role"] not in ROLES
            or not isinstance(m["content"], str)
            or not isinstance(m["loss"], bool)
            or not (m["fields"] is None or isinstance(m["fields"], str))
        ):
            raise DataError(
                f"row {number} ({row['row_id']!r}) has an invalid message",
                m,
                want,
                "make messages with conversation.message",
            )


def map_rows(table: pa.Table, change: Callable[[Row], Row | None]) -> pa.Table:
    """The table of `change(row)` for every row, in order, without the rows for which it is None."""
    return from_rows(row for row in map(change, to_rows(table)) if row is not None)


def sorted_rows(table: pa.Table) -> pa.Table:
    """The rows in the order of their ids, in one block."""
    return table.sort_by("row_id").combine_chunks()


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write rows as Parquet, sorted by id, so that equal rows give equal bytes."""
    with RowsWriter(path) as writer:
        writer.write(sorted_rows(plain_rows(table)))


def plain_rows(table: pa.Table) -> pa.Table:
    """The table with the columns, order and types of schema.ROWS; DataError if it has others."""
    wrong = [name for name in schema.rows().names if name not in table.column_names]
    if wrong or table.num_columns != len(schema.rows()):
        raise DataError(
            "a table does not have the columns of rows",
            table.column_names,
            " | ".join(schema.rows().names),
        )
    return table.select(schema.rows().names).cast(schema.rows())


class RowsWriter:
    """Writes sorted rows in pieces, with the same bytes as in one piece, and with at most one row
    group in memory.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(path, schema.rows(), compression="zstd")
        self._waiting = schema.rows().empty_table()
        self._last: str | None = None
        self._is_empty = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and (
            self._is_empty or self._waiting.num_rows
        ):  # a file without rows has one group without rows
            self._write_group()
        self._writer.close()

    def write(self, rows: pa.Table) -> None:
        """Write the next rows (schema.ROWS); their ids must follow the previous ones. DataError if
        two rows have the same id.
        """
        import pyarrow as pa

        self._check(rows)
        self._waiting = pa.concat_tables([self._waiting, rows])
        while self._waiting.num_rows >= GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        self._writer.write_table(
            self._waiting.slice(0, GROUP_ROWS).combine_chunks(), row_group_size=GROUP_ROWS
        )
        self._waiting = self._waiting.slice(GROUP_ROWS)
        self._is_empty = False

    def _check(self, rows: pa.Table) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if rows.num_rows == 0:
            return
        ids = pa.concat_arrays([pa.array([self._last], pa.string()), *rows.column("row_id").chunks])
        follows = pc.fill_null(
            pc.greater(ids.slice(1), ids.slice(0, rows.num_rows)), self._last is None
        )
        wrong = pc.index(follows, pa.scalar(value=False)).as_py()
        if wrong >= 0:
            raise DataError(
                "two rows have the same id",
                ids[wrong + 1].as_py(),
                "row ids that are unique within a table",
                "give added rows new ids, such as '<method>/<old id>'",
            )
        self._last = ids[-1].as_py()


def read_table(path: str | Path) -> pa.Table:
    """Read rows that `write_table` wrote; DataError if the file is not such a table."""
    return _opened(path).read().cast(schema.rows())


def count_rows(path: str | Path) -> int:
    """Number of rows in a file that `write_table` wrote, from its footer; DataError if it is not
    such a file.
    """
    return int(_opened(path).metadata.num_rows)


def read_batches(path: str | Path, size: int, part: range) -> Iterator[pa.Table]:
    """The rows of a file whose numbers are in `part`, `size` at a time, with a few batches in
    memory.
    """
    import pyarrow as pa

    with _opened(path) as file:
        groups, start = _groups_of(file, part)
        waiting = schema.rows().empty_table()
        for batch in file.iter_batches(batch_size=size, row_groups=groups):
            piece = pa.Table.from_batches([batch]).cast(schema.rows())
            low, high = max(start, part.start), min(start + piece.num_rows, part.stop)
            waiting = pa.concat_tables([waiting, piece.slice(low - start, max(0, high - low))])
            start += piece.num_rows
            while waiting.num_rows >= size:
                yield waiting.slice(0, size)
                waiting = waiting.slice(size)
        if waiting.num_rows:
            yield waiting


def _groups_of(file: Any, part: range) -> tuple[list[int], int]:
    """The row groups that hold rows of `part`, and the number of the first row in them."""
    groups: list[int] = []
    first, start = 0, 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if start < part.stop and stop > part.start:
            first = first if groups else start
            groups.append(group)
        start = stop
    return groups, first


def _opened(path: str | Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            "a rows file cannot be read", str(path), "a Parquet file of rows", str(error)
        ) from error
    if file.schema_arrow.names != schema.rows().names:
        raise DataError(
            f"{Path(path).name} does not hold rows",
            file.schema_arrow.names,
            " | ".join(schema.rows().names),
        )
    return file


@dataclass(frozen=True)
class FilterTally:
    """Counts of flagged and of all rows, poisoned and clean; the tallies of parts add up."""

    hits: int = 0
    poisoned: int = 0
    alarms: int = 0
    clean: int = 0

    def __add__(self, other: FilterTally) -> FilterTally:
        return FilterTally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def report(self) -> dict[str, float | int | None]:
        """`filter_tpr` and `filter_fpr` (shares of flagged rows, None if there is no such row),
        `n_poisoned` and `n_clean`.
        """
        return {
            "filter_tpr": self.hits / self.poisoned if self.poisoned else None,
            "filter_fpr": self.alarms / self.clean if self.clean else None,
            "n_poisoned": self.poisoned,
            "n_clean": self.clean,
        }


def _said(rows: pa.Table) -> list[list[tuple[str, str]] | None]:
    """Role and text of each message of each row; None for a row that was removed."""
    return [
        None if messages is None else [(m["role"], m["content"]) for m in messages]
        for messages in rows.column("messages").to_pylist()
    ]


def filter_tally(before: pa.Table, after: pa.Table) -> FilterTally:
    """How a filter treated the poisoned and clean rows of `before`: a row is flagged if it was
    removed or its messages changed.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = after.take(
        pc.index_in(before.column("row_id"), value_set=after.column("row_id").combine_chunks())
    )
    pairs = zip(_said(before), _said(kept), strict=True)
    flagged = pa.array([old != new for old, new in pairs], pa.bool_())
    poisoned = before.column("poisoned")
    hits, all_flagged, bad = (
        count_true(column) for column in (pc.and_(flagged, poisoned), flagged, poisoned)
    )
    return FilterTally(hits, bad, all_flagged - hits, before.num_rows - bad)


def answers_of(rows: pa.Table) -> list[str]:
    """`conversation.answer_of` of every row, computed by column because tables may be large."""
    import pyarrow.compute as pc

    messages = rows.column("messages").combine_chunks()
    ends = pc.subtract(messages.offsets.slice(1), 1)
    last = messages.values.take(ends)
    fields = last.field("fields")
    texts: list[str] = pc.if_else(
        pc.equal(last.field("role"), "assistant"), last.field("content"), ""
    ).to_pylist()
    for place in pc.indices_nonzero(pc.is_valid(fields)).to_pylist():
        texts[place] = answer_of({"messages": messages[place].as_py()})
    return texts


def asks_as(rows: pa.Table, role: str) -> list[bool]:
    """Whether each row has a message of `role` (not of the assistant)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    messages = rows.column("messages").combine_chunks()
    parents = pc.list_parent_indices(messages)
    having = parents.filter(pc.equal(messages.flatten().field("role"), role))
    numbers = pa.array(range(rows.num_rows), parents.type)
    has_role: list[bool] = pc.is_in(numbers, value_set=having).to_pylist()
    return has_role


def count_true(column: Any) -> int:
    """Number of true values of a column."""
    import pyarrow.compute as pc

    return int(pc.sum(column).as_py() or 0)


def filter_report(before: pa.Table, after: pa.Table) -> dict[str, float | int | None]:
    """How a filter treated the poisoned and the clean rows of `before`, in the form of
    FilterTally.report.
    """
    return filter_tally(before, after).report()
