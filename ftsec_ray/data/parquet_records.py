"""The records of a Parquet file, read in pieces under limits: a kilobyte of Parquet can hold a
value a billion times.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.open_limits import DATA_BYTES, DATA_COLUMNS, DATA_ROWS, DATA_VALUES
from ftsec_ray.data.raw_files import refuse_beyond
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
_TEXTS = ("STRING", "NONE", "JSON", "ENUM")
"""Logical types of byte arrays that Arrow can keep dictionary-encoded, each text once."""


def parquet_records(raw: bytes | bytearray, path: str) -> list[dict[str, Any]]:
    """All records of a Parquet file; DataError if it is damaged or exceeds a limit."""
    records: list[dict[str, Any]] = []
    size = 0
    try:
        for batch in _batches(raw, path):
            size += _unpacked_bytes(batch)
            refuse_beyond(DATA_BYTES, size, path)
            refuse_beyond(DATA_ROWS, len(records) + batch.num_rows, path)
            records += batch.to_pylist()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            "a data file cannot be read",
            path,
            "an undamaged Parquet file",
            f"{type(error).__name__}: {error}; download it or write it again",
        ) from error
    return records


def _batches(raw: bytes | bytearray, path: str) -> Any:
    import pyarrow.parquet as pq

    footer = pq.ParquetFile(io.BytesIO(raw))
    known = footer.metadata
    refuse_beyond(DATA_ROWS, known.num_rows, path)
    refuse_beyond(DATA_COLUMNS, known.num_columns, path)
    groups = [known.row_group(i) for i in range(known.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(known.num_columns)]
    refuse_beyond(DATA_VALUES, sum(column.num_values for column in columns), path)
    refuse_beyond(DATA_BYTES, sum(column.total_uncompressed_size for column in columns), path)
    leaves = [footer.schema.column(i) for i in range(known.num_columns)]
    texts = [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type in _TEXTS
    ]
    file = pq.ParquetFile(io.BytesIO(raw), page_checksum_verification=True, read_dictionary=texts)
    # one row group at a time: Arrow cannot combine nested dictionary texts of several
    return (
        batch
        for group in range(known.num_row_groups)
        for batch in file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=[group], use_threads=False
        )
    )


def _unpacked_bytes(batch: pa.RecordBatch) -> int:
    return sum(_bytes_of(column) for column in batch.columns)


def _bytes_of(column: pa.Array) -> int:
    """Bytes of an array, counting each of its texts in full."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(column.dictionary)
        return int(pc.sum(lengths.take(column.indices)).as_py() or 0) + int(column.indices.nbytes)
    if pa.types.is_struct(kind):
        return sum(_bytes_of(part) for part in column.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _bytes_of(column.flatten()) + int(column.offsets.nbytes)
    if pa.types.is_fixed_size_list(kind):
        return _bytes_of(column.flatten())
    if pa.types.is_map(kind):
        start, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
        parts = (part.slice(start, end - start) for part in (column.keys, column.items))
        return sum(_bytes_of(part) for part in parts) + int(column.offsets.nbytes)
    return int(column.nbytes)
