"""Limits on the size of an archive, packed and unpacked: an archive from a stranger must not
exhaust the machine that verifies it.

An archive cannot raise its own limits; environment variables can.
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
"""Files up to this many bytes may have any compression ratio: they do no harm."""
_BATCH = 1 << 14
"""Rows decoded in one batch while a table is measured."""
_TO_READ = "do not unpack it; if you trust its source, set {} in the environment"
_TO_WRITE = (
    "split the sweep; or set {} in the environment, here and on every machine that runs"
    " `ftsec verify`"
)


class ArchiveError(DataError):
    """A file that is not an archive of a sweep, or an archive that may not be written or read."""

    code = "archive"
    exit_code = 2


def check(limit: Limit, count: int, where: str, *, writes: bool = False) -> None:
    """ArchiveError if `where` exceeds the limit; `writes` if the archive is being written here."""
    fix = (_TO_WRITE if writes else _TO_READ).format(limit.variable)
    if fault := limit.exceeded_by(count, fix=fix):
        raise ArchiveError(f"{where}: {fault.what}", fault.got, fault.want, fault.fix)


def check_json(content: bytes, where: str, *, writes: bool = False) -> None:
    """ArchiveError for a JSON text that would exhaust memory; nothing is parsed here."""
    check(TEXT_BYTES, len(content), where, writes=writes)
    marks = sum(content.count(mark) for mark in (b",", b":", b"[", b"{"))
    check(JSON_VALUES, marks, where, writes=writes)


def check_table(path: Path, where: str, schema: pa.Schema, *, writes: bool = False) -> None:
    """ArchiveError for a Parquet file with too many rows or bytes, first by its footer and then by
    the decoded size of its columns; reading the table reports other faults.

    A few bytes can stand for any number of equal rows, so the size of the file says nothing.
    Nothing is decoded if a column is not in the schema: Results.open refuses such a table.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_footer(file.metadata, where, writes=writes)
            held = file.schema_arrow
            if any(field.name not in schema.names for field in held) or any(
                field.type != schema.field(field.name).type for field in held
            ):
                return
            texts = [field.name for field in held if pa.types.is_string(field.type)]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            decoded = 0
            for batch in file.iter_batches(_BATCH, use_threads=False):
                decoded += sum(_decoded_bytes(column) for column in batch.columns)
                check(TABLE_BYTES, decoded, where, writes=writes)
    except (pa.ArrowException, OSError):  # Results.open reports it
        return


def _check_footer(footer: parquet.FileMetaData, where: str, *, writes: bool) -> None:
    check(ROWS, footer.num_rows, where, writes=writes)
    columns = [
        group.column(place)
        for group in map(footer.row_group, range(footer.num_row_groups))
        for place in range(group.num_columns)
    ]
    # A list in one row may hold any number of values.
    check(ROWS, max((column.num_values for column in columns), default=0), where, writes=writes)
    packed = sum(column.total_uncompressed_size for column in columns)
    check(TABLE_BYTES, packed, where, writes=writes)


def _decoded_bytes(column: object) -> int:
    """Bytes of a column of a batch when every value is stored in full."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.DictionaryArray):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        return int(pc.sum(lengths).as_py() or 0) + 4 * len(column)
    return int(column.nbytes)  # type: ignore[attr-defined]


@contextmanager
def within_memory() -> Iterator[None]:
    """Raises ArchiveError when the code inside takes more memory than MEMORY: the last protection
    behind the other limits, against files with wrong sizes in their headers.

    Linux only. The limit applies to the whole process, so call this only in a process of its own.
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
            "the archive needs more memory than allowed",
            f"more than {most:,} bytes",
            "an undamaged archive as ftsec writes it",
            _TO_READ.format(MEMORY.variable),
        ) from fault
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _load_libraries() -> None:
    """Import libraries whose memory depends on the number of cores before memory is counted: the
    threads of linear algebra alone can take gigabytes.
    """
    for name in ("numpy", "scipy.special", "pyarrow.compute", "pyarrow.parquet"):
        with suppress(ImportError):
            importlib.import_module(name)


def _data_bytes() -> int | None:
    """Private memory of this process, as RLIMIT_DATA counts it; None if the system does not report
    it.
    """
    if sys.platform != "linux":
        return None
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        line_of_data = next(line for line in lines if line.startswith("VmData:"))
        return int(line_of_data.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None
