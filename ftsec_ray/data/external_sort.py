"""Sort rows that do not fit into memory: write sorted runs to disk and merge them when read.

Runs whose ids do not overlap, such as those of a set that was already sorted, are read one after
the other; only runs whose ids overlap are open at the same time, with one batch each in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ftsec_ray.data.rows import sorted_rows

if TYPE_CHECKING:
    import pyarrow as pa

RUN_BATCH_ROWS = 4_096
"""Rows of an open run that are kept in memory."""


class _Run(NamedTuple):
    first: str
    path: Path


@dataclass
class _Open:
    """A run that is being read: its next rows, and the batches after them."""

    rows: pa.Table
    more: Iterator[pa.Table]

    def pop(self, bound: str) -> pa.Table:
        """The rows in memory whose ids are at most `bound`."""
        import pyarrow.compute as pc

        count = pc.sum(pc.less_equal(self.rows.column("row_id"), bound)).as_py() or 0
        taken, self.rows = self.rows.slice(0, count), self.rows.slice(count)
        if self.rows.num_rows == 0:
            self.rows = next(self.more, self.rows)
        return taken


class ExternalSort:
    """Takes rows in pieces and in any order, keeps them in a folder, returns them sorted by id."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._runs: list[_Run] = []
        self.count = 0
        """Rows so far."""

    def add(self, rows: pa.Table) -> None:
        """Add a piece; it must fit into memory."""
        import pyarrow as pa

        if rows.num_rows == 0:
            return
        path = self._folder / f"{len(self._runs)}.arrow"
        with pa.ipc.new_file(
            path, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
        ) as writer:
            rows = sorted_rows(rows)
            writer.write_table(rows, max_chunksize=RUN_BATCH_ROWS)
        self._runs.append(_Run(rows.column("row_id")[0].as_py(), path))
        self.count += rows.num_rows

    def merged(self) -> Iterator[pa.Table]:
        """All rows, sorted; rows with equal ids follow each other."""
        import pyarrow as pa

        waiting, active = deque(sorted(self._runs)), list[_Open]()
        while waiting or active:
            bound = min((run.rows.column("row_id")[-1].as_py() for run in active), default=None)
            if waiting and (bound is None or waiting[0].first <= bound):
                batches = _read(waiting.popleft().path)
                active.append(_Open(next(batches), batches))
                continue
            assert bound is not None, "at least one run is open here"
            pieces = [run.pop(bound) for run in active]
            active = [run for run in active if run.rows.num_rows]
            yield pieces[0] if len(pieces) == 1 else sorted_rows(pa.concat_tables(pieces))


def _read(path: Path) -> Iterator[pa.Table]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])
