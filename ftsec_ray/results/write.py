"""The seven tables of a sweep on disk: fixed schemas, sorted rows, always the same bytes, and no
secret in any text.

Each file is written under a temporary name and renamed. `run.json` is removed first and written
last, with the row count of every table, so that readers can tell complete folders from incomplete
ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.errors import EnvironmentFault, StoreError
from ftsec_ray.redact import without_secrets
from ftsec_ray.results.redacted_tables import redacted_tables
from ftsec_ray.store.disk import is_refused

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = ("cells", "metrics", "generations", "stages", "comparisons", "searches", "lengths")
RUN_FILE = "run.json"
PART = "part-0.parquet"
_KEYS = {
    "cells": ("cell",),
    "metrics": ("cell", "metric"),
    "stages": ("digest",),
    "searches": ("search",),
    "lengths": ("cell", "metric", "tokens"),
}
"""Sort keys; `generations` is already sorted by cell, probe and prompt (sorting it here would copy
all text), and `comparisons` by its pairs.
"""


def table_schema(name: str) -> pa.Schema:
    """The schema of one of the seven tables."""
    return {
        "cells": schema.cells,
        "metrics": schema.metrics,
        "generations": schema.generations,
        "stages": schema.stages,
        "comparisons": schema.comparisons,
        "searches": schema.searches,
        "lengths": schema.lengths,
    }[name]()


@contextmanager
def told_when_unwritten(folder: Path) -> Iterator[None]:
    """Turns a full disk into a StoreError and a folder without write permission into an
    EnvironmentFault: no computed result is lost.
    """
    try:
        yield
    except OSError as fault:
        kind = EnvironmentFault if is_refused(fault) else StoreError
        raise kind(
            f"the results cannot be written to {folder}",
            str(fault),
            "a writable folder with free space",
            "free some space or give another --results, then run `ftsec report SWEEP`: the store"
            " holds all finished stages",
        ) from fault


def write_results(folder: Path, *, tables: Mapping[str, pa.Table], meta: Mapping[str, Any]) -> Path:
    """Write the seven tables and `run.json` into `folder`, replacing those of an earlier run, and
    return it; `searches` and `lengths` may be missing.
    """
    optional = {name: table_schema(name).empty_table() for name in ("searches", "lengths")}
    tables = {**optional, **tables}
    odd = sorted(set(TABLES) ^ set(tables))
    if odd:
        raise StoreError("results must be exactly seven tables", odd, " | ".join(TABLES))
    counts = {name: tables[name].num_rows for name in TABLES}
    tables = redacted_tables(tables)
    body = {**without_secrets(dict(meta)), "schema": schema.SCHEMA_VERSION, "rows": counts}
    with told_when_unwritten(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_FILE).unlink(missing_ok=True)
        for name in TABLES:
            _write_table(folder / name, name, tables[name])
        scratch = folder / f".{RUN_FILE}.{os.getpid()}.tmp"
        scratch.write_text(
            json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        scratch.replace(folder / RUN_FILE)
    return folder


def _write_table(folder: Path, name: str, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    wanted = table_schema(name)
    if not table.schema.equals(wanted):
        raise StoreError(
            f"the table {name!r} does not have its schema",
            table.schema.names,
            ", ".join(wanted.names),
        )
    if name in _KEYS:
        table = table.sort_by([(key, "ascending") for key in _KEYS[name]])
    folder.mkdir(exist_ok=True)
    scratch = folder / f".{PART}.{os.getpid()}.tmp"
    pq.write_table(
        table.replace_schema_metadata(wanted.metadata),
        scratch,
        compression="zstd",
        row_group_size=1 << 16,
    )
    for old in folder.glob("part-*.parquet"):
        if old.name != PART:
            old.unlink()
    scratch.replace(folder / PART)
