"""Crafts data sets of more than `data.ray_above` rows block by block, in bounded memory; the result
is byte-identical to that of the in-process path.

A block is a part of the sorted input. It is read from the artifact, changed by the method's
`craft_rows` in batches with fixed boundaries, and returned in pieces with their counts. The driver
stores the pieces as sorted runs and merges them into one file. So the number of blocks, their order
and the death of a worker do not change the result.

If the stage has its own workers (resource class `data:<workers>`), Ray Data runs the blocks on
actors that hold the session, and with it the model of a filter. The actors run in the bundles of
the trial's placement group, which are all reserved before the trial starts, so neither they nor
other units wait for each other. Otherwise the blocks run one after the other in this process.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.limits import limits_set
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.data.external_sort import ExternalSort
from ftsec_ray.data.rows import (
    CRAFTED,
    FilterTally,
    RowsWriter,
    count_rows,
    count_true,
    filter_tally,
    plain_rows,
    read_batches,
)
from ftsec_ray.execute.error_json import error_from_json, error_to_json
from ftsec_ray.execute.session import Session
from ftsec_ray.execute.unit import gpu_share, set_up_numerics
from ftsec_ray.method import BATCH_ROWS, RowWise, check_notes
from ftsec_ray.numerics import environment_of
from ftsec_ray.plan.stage import Stage, is_data
from ftsec_ray.redact import clean_logs
from ftsec_ray.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.lifecycle import Job

PIECE_BATCHES = 16
"""Batches per piece."""
BLOCK_ROWS = 65_536
"""Rows per block, at most."""
STORE_BYTES = 256 * 2**20
"""Bytes of unfinished pieces in Ray's object store, at most."""
MAX_DEATHS = 8
"""Retries of the survey after its worker died, at most."""
NO_PROGRESS_S = 3_600.0
"""A pipeline is given up after so many seconds without a piece; Ray Data alone would replace dead
workers forever.
"""


@dataclass(frozen=True)
class Chunk:
    """A piece of the crafted data set, and the counts to sum over all pieces."""

    rows: pa.Table
    seen: int = 0
    """Number of input rows that it was made from."""
    counts: Mapping[str, int] = field(default_factory=dict)
    tally: FilterTally = field(default_factory=FilterTally)
    warnings: Sequence[str] = ()

    def packed(self) -> pa.Table:
        """The piece as one row of bytes and text, so that Ray Data cannot change its types."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_table(self.rows)
        return _packed(
            sink.getvalue().to_pybytes(),
            summary=[self.seen, dict(self.counts), astuple(self.tally), list(self.warnings)],
        )

    @classmethod
    def unpacked(cls, row: Mapping[str, Any]) -> Chunk:
        """The piece from a row of `packed`; raises the worker's error if the row holds one."""
        import pyarrow as pa

        if row["error"]:
            raise error_from_json(json.loads(row["error"]))
        seen, counts, tally, warnings = json.loads(row["summary"])
        rows = pa.ipc.open_stream(row["rows"]).read_all()
        return cls(rows, seen, counts, FilterTally(*tally), warnings)


def _packed(rows: bytes = b"", *, summary: object = None, error: object = None) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "rows": pa.array([rows], pa.large_binary()),
            "summary": [json.dumps(summary)],
            "error": ["" if error is None else json.dumps(error)],
        }
    )


@dataclass(frozen=True)
class Survey:
    """The results of a method's `survey` of the whole data set, before rows are crafted."""

    known: Any
    new: pa.Table | None
    notes: Mapping[str, Any]
    counts: Mapping[str, int]
    warnings: Sequence[str]


@dataclass(frozen=True)
class BatchCrafter:
    """Crafts blocks in one process: a method, its context, and the file with its input."""

    method: RowWise
    context: StageContext
    file: Path

    def survey(self) -> Survey:
        """Run the method's `survey` over all rows."""
        context = replace(self.context, notes={}, counts={}, warnings=[])
        known = self.method.survey(
            read_batches(self.file, BATCH_ROWS, range(count_rows(self.file))), context
        )
        new = self.method.new_rows(known, context)
        return Survey(known, new, context.notes, context.counts, context.warnings)

    def craft(self, part: range, known: Any) -> Iterator[Chunk]:
        """The pieces of a block."""
        import pyarrow as pa

        waiting = read_batches(self.file, BATCH_ROWS, part)
        while batches := list(islice(waiting, PIECE_BATCHES)):
            context = replace(self.context, notes={}, counts={}, warnings=[])
            tally, tables = FilterTally(), []
            for batch in batches:
                made = plain_rows(self.method.craft_rows(batch, known, context))
                tally += (
                    filter_tally(batch, made) if self.method.KIND == "defense" else FilterTally()
                )
                tables.append(made)
            check_notes(self.method, context.notes, {})
            yield Chunk(
                pa.concat_tables(tables),
                sum(batch.num_rows for batch in batches),
                context.counts,
                tally,
                sorted(set(context.warnings)),
            )


@dataclass(frozen=True, kw_only=True)
class CrafterSpec:
    """The values that a worker needs to make a `BatchCrafter`."""

    store: str
    """URI of the store."""
    runtime: Runtime
    cache_gib: float
    stage: Stage
    job: Callable[[Stage, Path, Session], Job]
    """Makes the job of a stage; the class of the driver's job."""


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """The workers of a pipeline."""

    size: int
    each: Mapping[str, float]
    """CPU cores and GPUs of one worker."""
    group: Any = None
    """Their placement group; None: they run anywhere."""

    def asks(self) -> dict[str, float | None]:
        """Ray options with the resources of one worker."""
        return {"num_cpus": self.each["CPU"], "num_gpus": self.each.get("GPU", 0.0) or None}

    def place(self) -> Any:
        """Ray's scheduling strategy of the workers."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return (
            "DEFAULT"
            if self.group is None
            else PlacementGroupSchedulingStrategy(
                self.group, placement_group_capture_child_tasks=True
            )
        )


def craft_in_blocks(
    job: Job,
    method: RowWise,
    file: Path,
    *,
    pool: WorkerPool | None = None,
    blocks: int | None = None,
) -> dict[str, Any]:
    """Write the crafted data set into the folder of a job.

    Args:
        job: The job of the stage.
        method: The method that crafts the rows.
        file: The file with the input rows.
        pool: The workers of the pipeline; None: those of the stage's resource class, if any.
        blocks: Number of blocks, at most; None: chosen by the number of rows and workers.

    Returns:
        The notes for the stage's record.
    """
    pool = pool or _pool_of(job.stage)
    total = count_rows(file)
    parts = parts_of(total, blocks or max(2 * (pool.size if pool else 1), -(-total // BLOCK_ROWS)))
    if pool is None:
        crafter = BatchCrafter(method, job.context(), file)
        survey = crafter.survey()
        pieces = (made for part in parts for made in crafter.craft(part, survey.known))
    else:
        spec = CrafterSpec(
            store=job.session.store.uri,
            runtime=job.session.runtime,
            cache_gib=job.session.cache_gib,
            stage=job.stage,
            job=type(job),
        )
        survey = _surveyed(spec, pool)
        pieces = _crafted(spec, pool, parts, survey.known)
    runs, counts, tally, poisoned = (
        ExternalSort(job.out / ".runs"),
        Counter(survey.counts),
        FilterTally(),
        0,
    )
    new = [] if survey.new is None else [Chunk(plain_rows(survey.new))]
    seen, warnings = 0, set(survey.warnings)
    with closing(pieces):
        for made in chain(new, pieces):
            runs.add(made.rows)
            counts.update(made.counts)
            warnings.update(made.warnings)
            tally, poisoned = (
                tally + made.tally,
                poisoned + count_true(made.rows.column("poisoned")),
            )
            seen += made.seen
            if seen == total:
                break  # this closes the pipeline, see `_crafted`
    assert seen == total, (seen, total)
    if runs.count:
        with RowsWriter(job.out / CRAFTED) as writer:
            for rows in runs.merged():
                writer.write(rows)
    shutil.rmtree(job.out / ".runs")
    for text in warnings:
        job.warn(text)
    report = tally.report() if method.KIND == "defense" else {}
    return {**report, **survey.notes, **counts, "rows": runs.count, "poisoned": poisoned}


def parts_of(total: int, blocks: int) -> list[range]:
    """Split `total` rows into at most `blocks` ranges, at boundaries of batches."""
    batches = -(-total // BATCH_ROWS)
    step = -(-batches // blocks) * BATCH_ROWS
    return [range(start, min(start + step, total)) for start in range(0, total, step)]


def _pool_of(stage: Stage) -> WorkerPool | None:
    """The pipeline workers that are reserved for the stage; None if there are none."""
    if not is_data(stage.resource):
        return None
    import ray

    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    bundles = group.bundle_specs if group is not None else []
    return WorkerPool(size=len(bundles), each=bundles[0], group=group) if bundles else None


def _surveyed(spec: CrafterSpec, pool: WorkerPool) -> Survey:
    import ray

    task = ray.remote(_survey_task).options(
        **pool.asks(),
        scheduling_strategy=pool.place(),
        max_retries=MAX_DEATHS,
        runtime_env=_environment(spec),
    )
    try:
        survey: Survey = ray.get(task.remote(spec))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return survey


def _environment(spec: CrafterSpec) -> dict[str, Any]:
    """Runtime environment of a worker; it also forces a new process, since a reused one may have
    imported torch with other settings.
    """
    return {"env_vars": {**limits_set(), **environment_of(spec.runtime.numerics)}}


def _survey_task(spec: CrafterSpec) -> Survey:
    return _opened(spec).survey()


def _crafted(
    spec: CrafterSpec, pool: WorkerPool, parts: list[range], known: Any
) -> Generator[Chunk, None, None]:
    """The pieces of all blocks, in the order in which Ray Data's workers finish them.

    The caller must close this generator: then Ray Data stops its actors at once. When Ray Data ends
    by itself or after an error, it only drops its references to the actors. While anything else (a
    traceback) refers to them, they keep the bundles that the next pipeline of this trial needs.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 16 * 2**20
    # Not set for `scheduling_strategy_large_args`: with both, Ray Data (2.60) treats the bundles of
    # the group as all available resources. They have no object store memory, so it would run one
    # block at a time.
    context.scheduling_strategy = pool.place()
    context.scheduling_strategy_large_args = "DEFAULT"
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.execution_options = ExecutionOptions(
        resource_limits=ExecutionResources(
            cpu=pool.size * pool.each["CPU"],
            gpu=pool.size * pool.each.get("GPU", 0.0),
            object_store_memory=STORE_BYTES,
        )
    )
    items = [{"start": part.start, "stop": part.stop} for part in parts]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_args=(spec, known),
        compute=ActorPoolStrategy(size=min(pool.size, len(items))),
        batch_size=None,
        runtime_env=_environment(spec),
        **pool.asks(),
    )
    batches = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    with closing(batches):
        for batch in batches:
            yield from map(Chunk.unpacked, batch.to_pylist())


class _Worker:
    """An actor of the pipeline; it opens the session, and the model of a filter, only once."""

    def __init__(self, spec: CrafterSpec, known: Any) -> None:
        self._spec = spec
        self._known = known
        self._crafter: BatchCrafter | None = None

    def __call__(self, blocks: Mapping[str, Any]) -> Iterator[pa.Table]:
        """The packed pieces of some blocks."""
        try:
            self._crafter = self._crafter or _opened(self._spec)
            for start, stop in zip(blocks["start"], blocks["stop"], strict=True):
                for made in self._crafter.craft(range(int(start), int(stop)), self._known):
                    yield made.packed()
        except Exception as error:  # noqa: BLE001 - the driver ends the pipeline and raises it again
            yield _packed(error=error_to_json(error))


def _opened(spec: CrafterSpec) -> BatchCrafter:
    """A `BatchCrafter` in a worker process of Ray."""
    import ray

    clean_logs()
    given = ray.get_runtime_context().get_assigned_resources()
    threads, gpus = max(1, int(given.get("CPU", 1))), float(given.get("GPU", 0.0))
    runtime = spec.runtime if gpus else replace(spec.runtime, device="cpu")
    set_up_numerics(spec.runtime.numerics, threads)
    session = Session(Store.open(spec.store), runtime, spec.cache_gib)
    gpu_share(gpus)
    # The stage's work folder belongs to the driver; batches need only a temporary one.
    folder = Path(tempfile.gettempdir())
    job = spec.job(spec.stage, folder, session)
    method = job.methods()[0]
    assert isinstance(method, RowWise), "only RowWise methods are crafted in blocks"
    return BatchCrafter(method, job.context(workdir=folder), session.rows_file(job.inputs["rows"]))
