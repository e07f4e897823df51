"""How large an archive may be, packed and unpacked: one from a stranger must not take the machine
of whoever verifies it.

An archive cannot raise its own limits; the variables of the environment do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.config.limits import Limit
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

PACKED = Limit("archive_bytes", 1_000_000_000, "bytes in an archive")
UNPACKED = Limit("archive_unpacked_bytes", 2_000_000_000, "bytes in an archive once unpacked")
MEMBERS = Limit("archive_members", 64, "files in an archive")
RATIO = Limit("archive_ratio", 200, "times its packed size that a file unpacks to")
TEXT_BYTES = Limit("archive_text_bytes", 64_000_000, "bytes in a text file of an archive")
JSON_VALUES = Limit("archive_json_values", 5_000_000, "values in a JSON file of an archive")
ROWS = Limit("archive_rows", 5_000_000, "rows in a table of an archive")
TABLE_BYTES = Limit("archive_table_bytes", 2_000_000_000, "bytes in a table of an archive, decoded")
CELL_ANSWERS = Limit("archive_cell_answers", 100_000, "answers of one cell")
MEMORY = Limit("archive_memory_bytes", 8_000_000_000, "bytes of memory to verify an archive")
LIMITS = (
    PACKED,
    UNPACKED,
    MEMBERS,
    RATIO,
    TEXT_BYTES,
    JSON_VALUES,
    ROWS,
    TABLE_BYTES,
    CELL_ANSWERS,
    MEMORY,
)
SMALL = 1 << 20
"""Bytes up to which a file may be compressed to any ratio: it harms nobody."""
_BATCH = 1 << 14
"""Rows decoded at a time while a table is measured."""
_TO_READ = "do not unpack it; if you trust where it comes from, set {} in the environment"
_TO_WRITE = (
    "split the sweep; or set {} in the environment, here and wherever `ftsec verify` is to read it"
)


class ArchiveError(DataError):
    """A file that is no archive of a sweep, or an archive that must not be written or read."""

    code = "archive"
    exit_code = 2


def check(limit: Limit, count: int, where: str, *, writes: bool = False) -> None:
    """ArchiveError where `where` holds more than the limit allows; `writes` says that the archive
    is being made here.
    """
    fix = (_TO_WRITE if writes else _TO_READ).format(limit.variable)
    if fault := limit.exceeded_by(count, fix=fix):
        raise ArchiveError(f"{where}: {fault.what}", fault.got, fault.want, fault.fix)


def check_json(content: bytes, where: str, *, writes: bool = False) -> None:
    """ArchiveError for a JSON text of which parsing alone would take the machine's memory; nothing
    is parsed.
    """
    check(TEXT_BYTES, len(content), where, writes=writes)
    marks = sum(content.count(mark) for mark in (b",", b":", b"[", b"{"))
    check(JSON_VALUES, marks, where, writes=writes)


def check_table(path: Path, where: str, schema: pa.Schema, *, writes: bool = False) -> None:
    """ArchiveError for a Parquet file of too many rows or bytes, by its footer first and then by
    what its columns decode to; other faults are left to whoever reads it.

    A few bytes can stand for any number of equal rows, so the size of the file says nothing. No
    column is decoded where one is not of the schema: Results.open refuses such a table.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_footer(file.metadata, where, writes=writes)
            held = file.schema_arrow
            if any(one.name not in schema.names for one in held) or any(
                one.type != schema.field(one.name).type for one in held
            ):
                return
            texts = [one.name for one in held if pa.types.is_string(one.type)]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            decoded = 0
            for batch in file.iter_batches(_BATCH, use_threads=False):
                decoded += sum(_decoded_bytes(column) for column in batch.columns)
                check(TABLE_BYTES, decoded, where, writes=writes)
    except (pa.ArrowException, OSError):  # told by Results.open
        return


def _check_footer(footer: parquet.FileMetaData, where: str, *, writes: bool) -> None:
    check(ROWS, footer.num_rows, where, writes=writes)
    columns = [
        group.column(place)
        for group in map(footer.row_group, range(footer.num_row_groups))
        for place in range(group.num_columns)
    ]
    # A list in one row may hold any number of values.
    check(ROWS, max((one.num_values for one in columns), default=0), where, writes=writes)
    packed = sum(one.total_uncompressed_size for one in columns)
    check(TABLE_BYTES, packed, where, writes=writes)


def _decoded_bytes(column: object) -> int:
    """Bytes of a column of a batch once every value stands for itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.DictionaryArray):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        return int(pc.sum(lengths).as_py() or 0) + 4 * len(column)
    return int(column.nbytes)  # type: ignore[attr-defined]


@contextmanager
def within_memory() -> Iterator[None]:
    """Ends by ArchiveError what would take more memory than MEMORY allows: the last resort behind
    the other limits, for files that lie about what they hold.

    Linux only, and for a process of its own: other threads would meet the limit as well.
    """
    _load_libraries()
    held = _data_bytes()
    if held is None:
        yield
        return
    import resource

    most = MEMORY.value
    before = resource.getrlimit(resource.RLIMIT_DATA)
    soft = held + most
    if before[1] != resource.RLIM_INFINITY:
        soft = min(soft, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    except MemoryError as fault:
        raise ArchiveError(
            "the archive takes more memory than it may",
            f"more than {most:,} bytes",
            "a whole archive as ftsec writes it",
            _TO_READ.format(MEMORY.variable),
        ) from fault
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _load_libraries() -> None:
    """Import what takes memory by the number of cores before that is counted: the threads of linear
    algebra alone take gigabytes where there are many.
    """
    for name in ("numpy", "scipy.special", "pyarrow.compute", "pyarrow.parquet"):
        with suppress(ImportError):
            importlib.import_module(name)


def _data_bytes() -> int | None:
    """Private memory of this process, as RLIMIT_DATA counts it; None where the system does not
    tell.
    """
    if sys.platform != "linux":
        return None
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        told = next(line for line in lines if line.startswith("VmData:"))
        return int(told.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None
