"""Results of a sweep as tables: opened only if complete, of a known schema, and written by one run.

`Results.open` checks the footer of every table against `run.json` and reads no rows; each table is
read when it is first used. Results of an older schema can be opened too: later columns are null,
and the comparisons are computed from the other tables.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.errors import DataError, EnvironmentFault
from ftsec_ray.results.write import PART, RUN_FILE, TABLES, table_schema
from ftsec_ray.success import before_declared

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa

    from ftsec_ray.results.paired import Correction

_FIX = "collect the sweep again: `ftsec run SWEEP` reuses finished stages in the store"


@dataclass(frozen=True)
class Results:
    """The tables of one sweep."""

    folder: Path
    meta: dict[str, Any]
    """Content of `run.json`: sweep, question, plan digest, versions, row counts."""

    @classmethod
    def open(cls, folder: Path) -> Results:
        """The results in a folder; DataError with what is missing, foreign, incomplete or of
        another schema.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(
                "no results folder", str(folder), "a folder that `ftsec run` wrote", _FIX
            )
        meta = _read_meta(folder)
        for name in held_tables(meta):
            _check_table(folder, name, meta["rows"].get(name), meta["schema"])
        return cls(folder, meta)

    @cached_property
    def cells(self) -> pa.Table:
        """One row for every planned cell (schema.cells), without the trials of searches, as in
        `metrics` and `generations`.
        """
        return self._grid("cells")

    @cached_property
    def metrics(self) -> pa.Table:
        """One row per cell and metric (schema.metrics)."""
        return self._grid("metrics")

    @cached_property
    def generations(self) -> pa.Table:
        """One row per cell, probe, prompt and sample (schema.generations)."""
        return self._grid("generations")

    @cached_property
    def stages(self) -> pa.Table:
        """One row per unique stage (schema.stages)."""
        return self._read("stages")

    @cached_property
    def searches(self) -> pa.Table:
        """One row per search of an attacker (schema.searches)."""
        return self._read("searches")

    @cached_property
    def lengths(self) -> pa.Table:
        """One row per cell, metric and answer length (schema.lengths), without those of trials."""
        return self._grid("lengths")

    @cached_property
    def comparisons(self) -> pa.Table:
        """One row per pair of stacks and metric (schema.comparisons)."""
        return (
            self._read("comparisons")
            if "comparisons" in held_tables(self.meta)
            else self.compared()
        )

    def compared(self, correction: Correction = "bh") -> pa.Table:
        """The comparisons computed again with another correction: `bh` (Benjamini-Hochberg) or
        `holm`.
        """
        from ftsec_ray.results.compare import compare

        return compare(
            self.cells,
            self.metrics,
            self.generations,
            hooks=self.meta.get("defense_hooks", {}),
            controls=self.meta.get("controls", ()),
            own_controls=self.meta.get("own_controls", {}),
            correction=correction,
        )

    @cached_property
    def aggregated(self) -> pa.Table:
        """One row per point of the grid and metric: mean over seeds, with intervals over prompts
        and over seeds (schema.aggregates).
        """
        from ftsec_ray.results.aggregate import aggregate

        return aggregate(self.cells, self.metrics)

    def table(self, name: str, *, trials: bool = False) -> pa.Table:
        """A table by name; with `trials` including the trials of searches, as on disk. DataError if
        there is no such table.
        """
        if name not in TABLES:
            raise DataError("unknown results table", name, " | ".join(TABLES))
        if trials and name == "cells":
            return self._all_cells
        if trials and name not in ("stages", "searches"):  # those are the same with trials
            return self._read(name)
        return getattr(self, name) if hasattr(type(self), name) else self._read(name)

    def to_polars(self, name: str) -> polars.DataFrame:
        """A table as a Polars frame."""
        try:
            import polars
        except ImportError as missing:
            raise EnvironmentFault(
                "Polars is not installed", missing.name, "an installed polars", "pip install polars"
            ) from missing
        frame = polars.from_arrow(self.table(name))
        assert isinstance(frame, polars.DataFrame)  # noqa: S101 (a table never becomes a Series)
        return frame

    def to_pandas(self, name: str) -> pandas.DataFrame:
        """A table as a pandas frame."""
        try:
            import pandas  # noqa: F401 (pyarrow's own error is less clear)
        except ImportError as missing:
            raise EnvironmentFault(
                "pandas is not installed", missing.name, "an installed pandas", "pip install pandas"
            ) from missing
        return self.table(name).to_pandas()

    def wide(self, *, intervals: bool = False) -> pa.Table:
        """One row per cell: its columns, then one column per measured metric, and with `intervals`
        also its interval, n and n_null.
        """
        import pyarrow as pa

        row_of = {cell: index for index, cell in enumerate(self.cells["cell"].to_pylist())}
        long = self.metrics.to_pydict()
        measured = set(long["metric"])
        names = schema.in_order(measured)
        sources = [("", "value", pa.float64())]
        if intervals:
            sources += [
                ("_ci_low", "ci_low", pa.float64()),
                ("_ci_high", "ci_high", pa.float64()),
                ("_n", "n", pa.int64()),
                ("_n_null", "n_null", pa.int64()),
            ]
        wide = self.cells.replace_schema_metadata(None)
        columns = {
            name + suffix: [None] * len(row_of) for name in names for suffix, _, _ in sources
        }
        for suffix, source, _ in sources:
            for cell, metric, value in zip(long["cell"], long["metric"], long[source], strict=True):
                columns[metric + suffix][row_of[cell]] = value
        kinds = {name + suffix: kind for name in names for suffix, _, kind in sources}
        for name, values in columns.items():
            wide = wide.append_column(name, pa.array(values, kinds[name]))
        return wide

    @cached_property
    def _all_cells(self) -> pa.Table:
        return self._read("cells")

    def _grid(self, name: str) -> pa.Table:
        """A table without the trials of searches."""
        from ftsec_ray.results.search_results import without_trials

        return without_trials(
            {
                "cells": self._all_cells,
                name: self._all_cells if name == "cells" else self._read(name),
            }
        )[name]

    def _read(self, name: str) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = table_schema(name)
        if name not in held_tables(self.meta):
            return whole.empty_table()
        path = self.folder / name / PART
        try:
            table = pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError) as broken:  # its footer was readable
            raise DataError(
                f"the rows of {path} cannot be read",
                str(broken)[:120],
                "Parquet as ftsec wrote it",
                _FIX,
            ) from broken
        if self.meta["schema"] == schema.SCHEMA_VERSION:
            return table
        return (
            _declared(schema.brought_up(table, whole), self.meta)
            if name == "cells"
            else (schema.brought_up(table, whole))
        )


def _declared(cells: pa.Table, meta: dict[str, Any]) -> pa.Table:
    """`cells` of an older schema, with the success metrics of its attacks."""
    import pyarrow as pa

    if int(meta["schema"]) >= 4:
        return cells
    goals = meta.get("attack_goals", {})
    metrics = [before_declared(attack, goals) for attack in cells["attack"].to_pylist()]
    field = cells.schema.field("success_metric")
    return cells.set_column(
        cells.schema.get_field_index(field.name), field, pa.array(metrics, field.type)
    )


def run_meta(folder: Path) -> dict[str, Any] | None:
    """The content of `run.json` in a folder, whatever else is there; None if it cannot be read."""
    try:
        meta = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    if not path.is_file():
        held = sorted(p.name for p in folder.iterdir())[:8]
        what = (
            "the results are incomplete: writing stopped before run.json"
            if set(TABLES) & set(held)
            else "this is not a results folder"
        )
        raise DataError(f"{what} ({folder})", held, f"{RUN_FILE} next to {', '.join(TABLES)}", _FIX)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as broken:
        raise DataError(
            f"{path} is not JSON", str(broken), "JSON as ftsec writes it", _FIX
        ) from broken
    if not isinstance(meta, dict) or not isinstance(meta.get("rows"), dict):
        raise DataError(
            f"{path} was not written by ftsec",
            str(meta)[:80],
            "a mapping with `schema` and `rows`",
            _FIX,
        )
    version = meta.get("schema")
    if (
        not isinstance(version, str)
        or not re.fullmatch("[1-9][0-9]{0,5}", version)
        or int(version) > int(schema.SCHEMA_VERSION)
    ):
        raise DataError(
            f"the results in {folder} have a schema version that this ftsec_ray does not know",
            version,
            f"1 to {schema.SCHEMA_VERSION}",
            "read them with the ftsec_ray that wrote them or a newer one, or collect the sweep"
            " again",
        )
    return meta


def held_tables(meta: dict[str, Any]) -> tuple[str, ...]:
    """The tables that results of this schema version have on disk."""
    return tuple(
        name for name in TABLES if schema.as_of(table_schema(name), meta["schema"]) is not None
    )


def _check_table(folder: Path, name: str, rows: object, version: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = schema.as_of(table_schema(name), version)
    assert wanted is not None  # only tables of that version are checked
    path = folder / name / PART
    if not path.is_file():
        raise DataError(f"the table {name!r} is missing", str(path), PART, _FIX)
    try:
        with pq.ParquetFile(path) as file:
            held, count = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as broken:
        raise DataError(
            f"{path} is not an undamaged Parquet file", str(broken)[:120], "Parquet", _FIX
        ) from broken
    if not held.equals(wanted):
        lacks = [f"{field.name}: {field.type}" for field in wanted if field not in held]
        raise DataError(
            f"{path} does not have the columns of the table {name!r}",
            ", ".join(held.names),
            f"columns {', '.join(lacks)}",
            _FIX,
        )
    others = sorted(file.name for file in path.parent.glob("*.parquet") if file.name != PART)
    if others:  # reading the folder with a glob would count them too
        raise DataError(
            f"the folder of the table {name!r} holds files that ftsec did not write",
            others,
            f"only {PART} in {path.parent}",
            "move them elsewhere",
        )
    if count != rows:
        raise DataError(
            f"{path} and {RUN_FILE} are not of the same run", f"{count} rows", f"{rows} rows", _FIX
        )
