"""The plan left-joined to the store, as the seven tables: one row for every planned cell, whether
done or not.

Each artifact is read once, however many cells share it. A cell is done when its evaluation, its
inspections and the row filters of its defenses are done; metrics that exist are written even if
another part failed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.config.yaml_text import redacted_yaml
from ftsec_ray.errors import DataError
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.measured import wilson
from ftsec_ray.plan.cost_estimate import BudgetError, bill_of, shortfall, spent
from ftsec_ray.plan.durations import Costs
from ftsec_ray.results.compare import compare
from ftsec_ray.results.planned_columns import (
    cell_columns,
    defense_facts,
    stage_columns,
    sweep_fields,
)
from ftsec_ray.results.search_results import (
    is_chosen,
    reported,
    reported_rates,
    search_row,
    told_of,
    without_trials,
)
from ftsec_ray.results.stage_warnings import warnings_of
from ftsec_ray.results.write import write_results
from ftsec_ray.store import DamagedArtifact
from ftsec_ray.success import success_metric, with_asr
from ftsec_ray.version import version_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.plan import Cell, Plan
    from ftsec_ray.plan.search_rounds import CellOutcome
    from ftsec_ray.results.paired import Correction
    from ftsec_ray.schedule.dispatcher import RunReport
    from ftsec_ray.store import Store

_PACKAGES = (
    "ftsec_ray",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "ray",
    "numpy",
    "pyarrow",
    "statsmodels",
    "optuna",
)
Row = dict[str, Any]
_ANSWER = ("probe", "prompt_id", "sample")
"""Columns that identify an answer of a cell."""
_MEASURE = ("metric", "value", "n", "n_null", "ci_low", "ci_high")
_OPTIONAL = ("head_verdict",)
"""Columns of `generations` that an evaluation may leave out."""
_UNSEEN = dict.fromkeys(("n_null", "ci_low", "ci_high"))
"""Missing values of a metric without verdicts and without an interval."""


def collect(
    plan: Plan,
    store: Store,
    report: RunReport | None,
    folder: Path,
    *,
    sweep_text: str | None = None,
    correction: Correction = "bh",
) -> Path:
    """Write the results of a plan into `folder` and return it.

    Args:
        plan: The planned cells and stages.
        store: The finished stages.
        report: What this run did, to separate new stages from earlier ones; None if nothing ran, so
            that all finished stages are earlier.
        folder: `<results>/<sweep name>`, created if missing.
        sweep_text: The sweep file as its author wrote it; None writes the sweep's own fields
            instead.
        correction: Correction of the comparisons for multiple tests: Benjamini-Hochberg, or Holm.
    """
    found = _Found(plan, store, report)
    found.read_answers()
    cells = sorted(plan.cells, key=lambda cell: cell.digest)
    tables = {
        "cells": _from_rows(schema.cells(), (_cell_row(found, cell) for cell in cells)),
        "metrics": _from_rows(
            schema.metrics(), (row for cell in cells for row in _metric_rows(found, cell))
        ),
        "generations": _generations(found, cells),
        "stages": _from_rows(schema.stages(), _stage_rows(found)),
        "lengths": _from_rows(
            schema.lengths(), (row for cell in cells for row in _length_rows(found, cell))
        ),
    }
    facts = defense_facts(plan.spec)
    grid = without_trials(tables)
    tables["comparisons"] = compare(
        grid["cells"],
        grid["metrics"],
        grid["generations"],
        hooks=facts["defense_hooks"],
        controls=facts["controls"],
        own_controls=facts["own_controls"],
        correction=correction,
    )
    tables["searches"] = _from_rows(
        schema.searches(),
        sorted(
            (search_row(search, found.told) for search in plan.searches),
            key=lambda row: row["search"],
        ),
    )
    statuses = tables["cells"]["status"].to_pylist()
    meta = {
        "sweep": plan.spec.name,
        "question": plan.spec.question,
        "plan": plan.digest,
        "versions": _versions(),
        "counts": {status: statuses.count(status) for status in schema.STATUSES},
        **facts,
        "correction": correction,
        "warnings": [warning.as_json() for warning in warnings_of(plan, found.records)],
        "spent": {
            cell.digest: spent_on
            for cell in cells
            if (spent_on := _spent_on(found, cell)) is not None
        },
        "sweep_text": redacted_yaml(sweep_text or sweep_fields(plan.spec)),
    }
    return write_results(folder, tables=tables, meta=meta)


@dataclass
class _Found:
    """A plan's contents in the store; each artifact is read once."""

    plan: Plan
    store: Store
    report: RunReport | None
    metrics: dict[str, list[Row]] = field(default_factory=dict)
    """By evaluation."""
    generations: dict[str, pa.Table] = field(default_factory=dict)
    """By evaluation, sorted, without the column `cell`."""
    lengths: dict[str, list[Row]] = field(default_factory=dict)
    """By evaluation that judged answers at several lengths."""
    inspections: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Artifact that does not match its record -> why."""

    @cached_property
    def records(self) -> dict[str, Row]:
        """Records of the plan's finished stages."""
        held = self.store.sound(self.plan.kinds)[1]
        return {digest: record for digest, record in held.items() if digest not in self.broken}

    @cached_property
    def failures(self) -> dict[str, Row]:
        """Failed stages: those recorded in the store, and those of this run, which include dead
        workers.
        """
        fresh = (
            {}
            if self.report is None
            else {digest: asdict(failure) for digest, failure in self.report.failed.items()}
        )
        return {**self.store.failures(), **fresh}

    @cached_property
    def over_budget(self) -> tuple[str, frozenset[str]]:
        """Why the sweep's budget does not allow some stages, and which."""
        if self.report is not None:
            return self.report.over_budget or "", frozenset(self.report.unaffordable)
        plan = self.plan
        left = plan.needed(set(self.records)) if plan.spec.budget else []
        fault = (
            shortfall(
                plan,
                spent(plan, self.records, self.failures),
                bill_of(plan, left, Costs(self.records.values())),
            )
            if left
            else None
        )
        return (
            (fault.what, frozenset(stage.digest for stage in left)) if fault else ("", frozenset())
        )

    def told(self, cell: Cell) -> CellOutcome | None:
        """The verdicts of a cell's evaluation."""
        return told_of(self.generations[cell.score]) if cell.score in self.generations else None

    def read_answers(self) -> None:
        """Read every artifact that the tables need; a damaged one counts as missing."""
        scores = {digest for cell in self.plan.cells for digest in (cell.score, *cell.opinions)}
        for digest in sorted(scores & set(self.records)):
            self._read(digest, self._read_evaluation)
        measured = {digest for cell in self.plan.cells for digest in cell.measurements}
        for digest in sorted(measured & set(self.records)):
            self._read(digest, self._read_metrics)
        for digest in sorted(
            {digest for cell in self.plan.cells for digest in _inspections(cell)}
            & set(self.records)
        ):
            self._read(digest, self._read_inspection)

    def _read(self, digest: str, read: Any) -> None:
        try:
            read(digest)
        except DamagedArtifact as damage:
            self._drop(digest, str(damage))
        except (DataError, OSError, ValueError, KeyError, TypeError) as error:
            # Its files match its record, but not what its kind of stage writes.
            self.store.put_aside(digest, str(error).splitlines()[0] if str(error) else "unreadable")
            self._drop(digest, str(error))

    def _drop(self, digest: str, why: str) -> None:
        self.broken[digest] = why
        for held in (self.records, self.metrics, self.generations, self.lengths, self.inspections):
            held.pop(digest, None)

    def _read_evaluation(self, digest: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.store.fetch(digest)
        wanted = schema.generations()
        wanted = pa.schema([field for field in wanted if field.name not in ("cell", "opinions")])
        needed = [field.name for field in wanted if field.name not in _OPTIONAL]
        try:
            # Thousands of small files: starting threads for each takes longer than reading it.
            held = pq.ParquetFile(folder / "generations.parquet").read(use_threads=False)
            if missing := set(needed) - set(held.schema.names):
                raise KeyError(*sorted(missing))
            judged = schema.brought_up(held, wanted)
            rows = _measures_in(folder)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"evaluation {digest} does not have the columns of this schema: {error}",
                str(folder),
                ", ".join(wanted.names),
            ) from error
        self.generations[digest] = judged.sort_by([(key, "ascending") for key in _ANSWER])
        self.metrics[digest] = rows
        if (folder / "lengths.parquet").is_file():
            held = pq.ParquetFile(folder / "lengths.parquet").read(use_threads=False)
            self.lengths[digest] = held.to_pylist()

    def _read_metrics(self, digest: str) -> None:
        folder = self.store.fetch(digest)
        try:
            self.metrics[digest] = _measures_in(folder)
        except (OSError, KeyError, ValueError) as error:  # ValueError includes pyarrow's errors
            raise DataError(
                f"the metrics of {digest} do not have the columns of this schema: {error}",
                str(folder),
                ", ".join(_MEASURE),
            ) from error

    def _read_inspection(self, digest: str) -> None:
        self.inspections[digest] = self.store.read_json(digest, "inspection.json")

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Weights per model: counted when it was loaded, otherwise from the sweep."""
        counted: dict[str, int] = {}
        for cell in self.plan.cells:
            name = cell.model.name
            for stage in cell.stages if name not in counted else ():
                info = self.records.get(stage, {}).get("notes", {}).get("info")
                if info and self.plan.stages[stage].kind in ("source", "align"):
                    counted[name] = int(info["parameters"])
            asked = cell.of_kind("generate")[0].digest
            if name not in counted and asked in self.records:
                info = self.records[asked].get("notes", {}).get("info")
                if info and not cell.defenses and success_metric(cell.attack) is None:
                    counted[name] = int(info["parameters"])
        declared = {m.name: m.parameters for m in self.plan.spec.models if m.parameters}
        return {**declared, **counted}


def _measures_in(folder: Path) -> list[Row]:
    """The metrics of an artifact."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(folder / "metrics.parquet").read(use_threads=False)
    return list(table.select(list(_MEASURE)).to_pylist())


def _from_rows(wanted: pa.Schema, rows: Iterable[Row]) -> pa.Table:
    """A table of rows that must have exactly the columns of the schema."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in wanted.names}
    for row in rows:
        if row.keys() != columns.keys():
            raise DataError(
                "a results row has missing or unknown columns",
                sorted(row.keys() ^ columns.keys()),
                ", ".join(columns),
            )
        for name, value in row.items():
            columns[name].append(value)
    return pa.Table.from_arrays(
        [pa.array(columns[field.name], field.type) for field in wanted], schema=wanted
    )


def _inspections(cell: Cell) -> list[str]:
    """Digests of a cell's detector results."""
    return [step.digest for step in cell.of_kind("inspect")]


def _cell_row(found: _Found, cell: Cell) -> Row:
    status, code, error = _outcome(found, cell)
    return {
        **cell_columns(found.plan.spec.name, cell),
        "model_params": found.parameters.get(cell.model.name),
        "status": status,
        "error_code": code,
        "error": error,
        **_templates(found, cell),
    }


def _templates(found: _Found, cell: Cell) -> Row:
    """Hashes of the chat templates for training and for evaluation; null before the model has
    answered.
    """
    asked = cell.of_kind("generate")[0].digest
    notes = found.records.get(asked, {}).get("notes", {})
    names = ("train_template_hash", "serve_template_hash")
    return {name: notes.get(name) for name in names}


def _spent_on(found: _Found, cell: Cell) -> list[float] | None:
    """GPU and CPU seconds of all stages of a cell, shared ones too; None if one has not run."""
    records = [found.records.get(stage) for stage in cell.stages]
    if not all(records):
        return None
    return [
        round(sum(record.get(key) or 0.0 for record in records if record), 3)
        for key in ("gpu_s", "cpu_s")
    ]


def _outcome(found: _Found, cell: Cell) -> tuple[str, str | None, str | None]:
    """(status, error_code, error) of a cell; the error is that of its earliest failed stage."""
    missing = [stage for stage in cell.answers if stage not in found.records]
    if not missing:
        return "done", None, None
    for stage in cell.stages:
        verdict = found.failures.get(stage)
        if verdict is not None and stage not in found.records:
            return "failed", verdict["error_code"], f"{_named(found, stage)}: {verdict['error']}"
    broken = next((stage for stage in missing if stage in found.broken), None)
    if broken:
        return "pending", "store.damaged", found.broken[broken]
    why, kept = found.over_budget
    return (
        ("pending", BudgetError.code, why)
        if kept.intersection(cell.stages)
        else ("pending", None, None)
    )


def _named(found: _Found, digest: str) -> str:
    stage = found.plan.stages[digest]
    return f"{stage.kind} {stage.method}" if stage.method else stage.kind


def _metric_rows(found: _Found, cell: Cell) -> Iterator[Row]:
    rows: dict[str, Row] = {}
    for scores in (cell.score, *cell.opinions):
        own = {row["metric"]: row for row in found.metrics.get(scores, ())}
        if is_chosen(cell) and scores in found.generations:
            reported = reported_rates(own, found.generations[scores])
            own |= {row["metric"]: row for row in reported}
        rows |= own
    rows = with_asr(rows, success_metric(cell.attack))
    measured = [row for digest in cell.measurements for row in found.metrics.get(digest, ())]
    for row in [*rows.values(), *measured]:
        yield {"cell": cell.digest, **{key: row[key] for key in _MEASURE}}
    yield from _edit_rows(found, cell)
    inspections = _inspections(cell)
    seen = [found.inspections[digest] for digest in inspections if digest in found.inspections]
    if seen and len(seen) == len(inspections):
        yield from _detector_rows(cell.digest, seen)
    notes = [
        found.records[digest].get("notes", {}) for digest in cell.filters if digest in found.records
    ]
    if notes and len(notes) == len(cell.filters):
        yield _filter_row(
            cell.digest,
            "filter_tpr",
            [(note.get("filter_tpr"), note.get("n_poisoned") or 0) for note in notes],
        )
        yield _filter_row(
            cell.digest,
            "filter_fpr",
            [(note.get("filter_fpr"), note.get("n_clean") or 0) for note in notes],
        )


def _length_rows(found: _Found, cell: Cell) -> Iterator[Row]:
    """Success against answer length; not for a chosen setting, whose metrics use half of the
    prompts.
    """
    for row in () if is_chosen(cell) else found.lengths.get(cell.score, ()):
        yield {"cell": cell.digest, **row}


def _edit_rows(found: _Found, cell: Cell) -> Iterator[Row]:
    """The effect of a weight edit alone on the target's probability with the trigger, from the
    notes of the attack's own stage.
    """
    own = cell.stages if "prepare_model" in hooks_of(type(cell.attack)) else ()
    for notes in (found.records.get(stage, {}).get("notes", {}) for stage in own):
        if "target_nll_before" in notes and "target_nll_after" in notes:
            gain = math.exp(-notes["target_nll_after"]) - math.exp(-notes["target_nll_before"])
            yield {
                "cell": cell.digest,
                "metric": "edit_gain",
                "value": gain,
                "n": notes["prompts"],
                **_UNSEEN,
            }


def _detector_rows(cell: str, seen: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """AUROC and standardised score; a stack of detectors has the score of its most suspicious
    member.
    """
    scores = [_standardised(inspection) for inspection in seen]
    score = max((own for own, _ in scores if own is not None), default=None)
    if len(seen) == 1:
        subject, clean = seen[0]["score"], list(seen[0]["clean_scores"])
    else:  # all members have the same clean models, in the same order
        subject, clean = (
            score,
            [max(values) for values in zip(*(clean for _, clean in scores), strict=False)],
        )
    n = len(clean)
    yield {"cell": cell, "metric": "detect_score", "value": score, "n": n, **_UNSEEN}
    if len(seen) == 1:
        yield {"cell": cell, "metric": "detect_raw", "value": subject, "n": n, **_UNSEEN}
    if n == 0 or subject is None:
        yield {"cell": cell, "metric": "detect_auroc", "value": None, "n": n, **_UNSEEN}
        return
    share = sum((value < subject) + 0.5 * (value == subject) for value in clean) / n
    low, high = wilson(share, n)
    yield {
        "cell": cell,
        "metric": "detect_auroc",
        "value": share,
        "n": n,
        "n_null": None,
        "ci_low": low,
        "ci_high": high,
    }


def _standardised(inspection: Mapping[str, Any]) -> tuple[float | None, list[float]]:
    """The score and the clean scores in sample standard deviations of the clean scores; None and
    empty if those do not differ.
    """
    clean = [float(value) for value in inspection["clean_scores"]]
    spread = statistics.stdev(clean) if len(clean) > 1 else 0.0
    if spread == 0:
        return None, []
    middle = statistics.fmean(clean)
    return (inspection["score"] - middle) / spread, [(value - middle) / spread for value in clean]


def _filter_row(cell: str, metric: str, notes: Sequence[tuple[float | None, int]]) -> Row:
    """The share of rows that any filter of the stack flagged; each filter counts the rows that the
    previous ones kept.
    """
    n = notes[0][1]
    if n == 0:
        return {"cell": cell, "metric": metric, "value": None, "n": 0, **_UNSEEN}
    share = min(1.0, sum((flagged or 0.0) * count for flagged, count in notes) / n)
    low, high = wilson(share, n)
    return {
        "cell": cell,
        "metric": metric,
        "value": share,
        "n": n,
        "n_null": None,
        "ci_low": low,
        "ci_high": high,
    }


def _generations(found: _Found, cells: Sequence[Cell]) -> pa.Table:
    """All generations by cell; the text of a shared evaluation is in memory only once."""
    import pyarrow as pa

    wanted = schema.generations()
    parts = []
    for cell in cells:
        answers = _with_opinions(found, cell)
        if answers is not None and is_chosen(cell):
            answers = reported(answers)
        if answers is not None and answers.num_rows:
            column = pa.repeat(pa.scalar(cell.digest, pa.string()), answers.num_rows)
            parts.append(pa.table([pa.chunked_array([column]), *answers.columns], schema=wanted))
    return pa.concat_tables(parts) if parts else wanted.empty_table()


def _with_opinions(found: _Found, cell: Cell) -> pa.Table | None:
    """The judged answers of a cell, each with the verdicts of the additional judges."""
    import pyarrow as pa

    judged = found.generations.get(cell.score)
    if judged is None:
        return None
    verdicts: dict[tuple[Any, ...], list[Row]] = {}
    for score in cell.opinions:
        for row in found.generations[score].to_pylist() if score in found.generations else ():
            given = {name: row[name] for name in schema.OPINION}
            verdicts.setdefault(tuple(row[key] for key in _ANSWER), []).append(given)
    places = zip(*(judged[key].to_pylist() for key in _ANSWER), strict=True)
    kind = schema.generations().field("opinions").type
    opinions = pa.array([verdicts.get(place) for place in places], kind)
    return judged.append_column("opinions", opinions)


def _stage_rows(found: _Found) -> Iterator[Row]:
    cached = set(found.report.cached) if found.report is not None else set(found.records)
    bad: set[str] = set()
    for digest, stage in found.plan.stages.items():
        record, verdict = found.records.get(digest, {}), found.failures.get(digest, {})
        if record:
            status = "done"
        elif verdict:
            status = "failed"
        else:
            status = (
                "upstream_failed" if bad & {needed for _, needed in stage.inputs} else "pending"
            )
        if status in ("failed", "upstream_failed"):
            bad.add(digest)
        outcome = record or verdict
        yield {
            **stage_columns(found.plan, digest),
            **{key: record.get(key) for key in _MEASURED},
            "wall_s": outcome.get("wall_s"),
            "cached": digest in cached and bool(record),
            "attempt": outcome.get("attempt"),
            "status": status,
            "host": outcome.get("host"),
            "error_code": verdict.get("error_code") if status == "failed" else None,
            "error": verdict.get("error") if status == "failed" else None,
        }


_MEASURED = ("cpu_s", "gpu_s", "peak_bytes", "tokens", "flops")


def _versions() -> dict[str, str]:
    versions = {name: version_of(name) for name in ("python", *_PACKAGES)}
    return {name: version for name, version in versions.items() if version}
