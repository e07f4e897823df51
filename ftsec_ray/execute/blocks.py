"""Craft sets of rows that are more than `data.ray_above`: block by block, in bounded memory, with
the bytes of the in-process path.

A block is a part of the sorted input. It is read from the artifact, changed by the method's own
`craft_rows` in batches that are cut at fixed places, and comes back in pieces with their counts;
the driver keeps the pieces as sorted runs and merges them into one file. So neither the number of
blocks, nor their order, nor a worker that dies and is replaced can show in the bytes.

Where the stage's trial has workers of its own (resource class `data:<workers>`), Ray Data runs the
blocks on actors that hold the session, and with it the model of a filter. The actors live in the
bundles of the trial's placement group, which it got whole before
it started: they wait for nobody, and no other unit can wait for them. Elsewhere the blocks run one
    after the other in this process.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray import errors
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.data.external_sort import ExternalSort
from ftsec_ray.data.rows import (
    FilterTally,
    RowsWriter,
    count_rows,
    count_true,
    filter_tally,
    plain_rows,
    read_batches,
)
from ftsec_ray.errors import FtsecError, StageError
from ftsec_ray.execute.session import CRAFTED, Session
from ftsec_ray.execute.unit import code_of, gpu_share, set_up_numerics
from ftsec_ray.method import BATCH_ROWS, RowWise, check_notes
from ftsec_ray.numerics import environment_of
from ftsec_ray.plan.stage import Stage, is_data
from ftsec_ray.redact import clean_logs, redacted
from ftsec_ray.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.execute.stages import StageJob

PIECE_BATCHES = 16
"""Batches that come back together."""
BLOCK_ROWS = 65_536
"""Rows of a block, at most."""
STORE_BYTES = 256 * 2**20
"""Bytes of pieces under way, at most, in Ray's object store."""
MAX_DEATHS = 8
"""Times that the survey is begun anew when its worker has died."""
NO_PROGRESS_S = 3_600.0
"""Seconds without a piece after which a pipeline is given up: Ray Data replaces workers that die,
and would do so for ever.
"""


@dataclass(frozen=True)
class Chunk:
    """A piece of a crafted set and what is to be added up over all of them."""

    rows: pa.Table
    seen: int = 0
    """Rows of the input that it comes from."""
    counts: Mapping[str, int] = field(default_factory=dict)
    tally: FilterTally = field(default_factory=FilterTally)

    def packed(self) -> pa.Table:
        """A row of bytes and text, which nothing on the way can bend."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_table(self.rows)
        return _packed(
            sink.getvalue().to_pybytes(), told=[self.seen, dict(self.counts), astuple(self.tally)]
        )

    @classmethod
    def unpacked(cls, row: Mapping[str, Any]) -> Chunk:
        """The piece that `packed` packed; raises the error that came in its place."""
        import pyarrow as pa

        if row["error"]:
            raise _error_of(json.loads(row["error"]))
        seen, counts, tally = json.loads(row["told"])
        return cls(pa.ipc.open_stream(row["rows"]).read_all(), seen, counts, FilterTally(*tally))


def _packed(rows: bytes = b"", *, told: object = None, error: object = None) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "rows": pa.array([rows], pa.large_binary()),
            "told": [json.dumps(told)],
            "error": ["" if error is None else json.dumps(error)],
        }
    )


class _Got(str):
    """The value of an error as a worker printed it, without quotes around."""

    __repr__ = str.__str__


def _told(error: Exception) -> dict[str, str]:
    """An error as text; `_error_of` makes one again that says the same."""
    trace = redacted("".join(traceback.format_exception(error)))
    if not isinstance(error, FtsecError):
        code = code_of(error)
        return {
            "class": "MemoryError" if code == "oom" else code,
            "what": redacted(str(error)),
            "trace": trace,
        }
    got = {} if error.got is None else {"got": redacted(repr(error.got))}
    return {
        "class": type(error).__name__,
        "what": redacted(error.what),
        **got,
        "want": error.want,
        "fix": error.fix,
        "trace": trace,
    }


def _error_of(told: Mapping[str, str]) -> Exception:
    cls = getattr(errors, told["class"], None)
    error: Exception
    if isinstance(cls, type) and issubclass(cls, FtsecError):
        error = cls(
            told["what"], _Got(told["got"]) if "got" in told else None, told["want"], told["fix"]
        )
    elif told["class"] == "MemoryError":
        error = MemoryError(told["what"])
    else:
        error = StageError(
            f"{told['class']}: {told['what']}",
            None,
            "a method that crafts every block",
            "see the traceback of the worker below",
        )
    error.add_note(told["trace"])
    return error


@dataclass(frozen=True)
class Survey:
    """What a method found in the whole set before its rows are crafted."""

    known: Any
    new: pa.Table | None
    notes: Mapping[str, Any]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class BatchCrafter:
    """One process at work on a stage: a method, what it may ask, and the file of its input."""

    method: RowWise
    context: StageContext
    file: Path

    def survey(self) -> Survey:
        """The method's look at all rows."""
        context = replace(self.context, notes={}, counts={})
        known = self.method.survey(
            read_batches(self.file, BATCH_ROWS, range(count_rows(self.file))), context
        )
        return Survey(known, self.method.new_rows(known, context), context.notes, context.counts)

    def craft(self, part: range, known: Any) -> Iterator[Chunk]:
        """The pieces of a block."""
        import pyarrow as pa

        waiting = read_batches(self.file, BATCH_ROWS, part)
        while batches := list(islice(waiting, PIECE_BATCHES)):
            context, tally, tables = replace(self.context, notes={}, counts={}), FilterTally(), []
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
            )


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker needs to become a Crafter."""

    store: str
    """URI of the store."""
    runtime: Runtime
    cache_gib: float
    stage: Stage


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """The workers of a pipeline."""

    size: int
    each: Mapping[str, float]
    """CPU and GPU of one worker."""
    group: Any = None
    """Placement group in which they live; None: anywhere."""

    def asks(self) -> dict[str, float | None]:
        """What each of them asks for."""
        return {"num_cpus": self.each["CPU"], "num_gpus": self.each.get("GPU", 0.0) or None}

    def place(self) -> Any:
        """Where Ray puts them."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return (
            "DEFAULT"
            if self.group is None
            else PlacementGroupSchedulingStrategy(
                self.group, placement_group_capture_child_tasks=True
            )
        )


def craft_in_blocks(
    job: StageJob,
    method: RowWise,
    file: Path,
    *,
    crew: WorkerPool | None = None,
    blocks: int | None = None,
) -> dict[str, Any]:
    """Write the crafted set into the folder of a job; returns the notes for its record."""
    crew = crew or _crew_of(job.stage)
    total = count_rows(file)
    parts = parts_of(total, blocks or max(2 * (crew.size if crew else 1), -(-total // BLOCK_ROWS)))
    if crew is None:
        crafter = BatchCrafter(method, job.context(), file)
        survey = crafter.survey()
        pieces = (made for part in parts for made in crafter.craft(part, survey.known))
    else:
        order = Order(
            store=job.session.store.uri,
            runtime=job.session.runtime,
            cache_gib=job.session.cache_gib,
            stage=job.stage,
        )
        survey = _surveyed(order, crew)
        pieces = _crafted(order, crew, parts, survey.known)
    runs, counts, tally, poisoned = (
        ExternalSort(job.out / ".runs"),
        Counter(survey.counts),
        FilterTally(),
        0,
    )
    new = [] if survey.new is None else [Chunk(plain_rows(survey.new))]
    seen = 0
    with closing(pieces):
        for made in chain(new, pieces):
            runs.add(made.rows)
            counts.update(made.counts)
            tally, poisoned = (
                tally + made.tally,
                poisoned + count_true(made.rows.column("poisoned")),
            )
            seen += made.seen
            if seen == total:
                break  # and so close the pipeline, see `_crafted`
    assert seen == total, (seen, total)
    if runs.count:
        with RowsWriter(job.out / CRAFTED) as writer:
            for rows in runs.merged():
                writer.write(rows)
    shutil.rmtree(job.out / ".runs")
    report = tally.report() if method.KIND == "defense" else {}
    return {**report, **survey.notes, **counts, "rows": runs.count, "poisoned": poisoned}


def parts_of(total: int, blocks: int) -> list[range]:
    """So many parts of a set at most, cut where batches are cut."""
    batches = -(-total // BATCH_ROWS)
    step = -(-batches // blocks) * BATCH_ROWS
    return [range(start, min(start + step, total)) for start in range(0, total, step)]


def _crew_of(stage: Stage) -> WorkerPool | None:
    """The workers that the trial of this process has for the stage; None where there are none."""
    if not is_data(stage.resource):
        return None
    import ray

    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    bundles = group.bundle_specs if group is not None else []
    return WorkerPool(size=len(bundles), each=bundles[0], group=group) if bundles else None


def _surveyed(order: Order, crew: WorkerPool) -> Survey:
    import ray

    task = ray.remote(_survey_task).options(
        **crew.asks(),
        scheduling_strategy=crew.place(),
        max_retries=MAX_DEATHS,
        runtime_env=_environment(order),
    )
    try:
        found: Survey = ray.get(task.remote(order))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return found


def _environment(order: Order) -> dict[str, Any]:
    """What Ray starts a worker with: one that it has at hand may have imported torch."""
    return {"env_vars": environment_of(order.runtime.numerics)}


def _survey_task(order: Order) -> Survey:
    return _opened(order).survey()


def _crafted(
    order: Order, crew: WorkerPool, parts: list[range], known: Any
) -> Generator[Chunk, None, None]:
    """The pieces of all blocks as Ray Data's workers finish them.

    To be closed by who takes them: then Ray Data ends its actors at once. At its own end, or after
    an error of its own, it only lets go of them, and as long as anything (a traceback) refers to
    them they keep the bundles that the next pipeline of this trial needs.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 16 * 2**20
    # Only here, and not as `scheduling_strategy_large_args` too: with both, Ray Data (2.60) takes
    # the group's bundles for all that there is,
    # and since these hold no object store, it runs one block at a time.
    context.scheduling_strategy = crew.place()
    context.scheduling_strategy_large_args = "DEFAULT"
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.execution_options = ExecutionOptions(
        resource_limits=ExecutionResources(
            cpu=crew.size * crew.each["CPU"],
            gpu=crew.size * crew.each.get("GPU", 0.0),
            object_store_memory=STORE_BYTES,
        )
    )
    items = [{"start": part.start, "stop": part.stop} for part in parts]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_args=(order, known),
        compute=ActorPoolStrategy(size=min(crew.size, len(items))),
        batch_size=None,
        runtime_env=_environment(order),
        **crew.asks(),
    )
    batches = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    with closing(batches):
        for batch in batches:
            yield from map(Chunk.unpacked, batch.to_pylist())


class _Worker:
    """An actor of the pipeline: it opens the session once, and the model of a filter with it."""

    def __init__(self, order: Order, known: Any) -> None:
        self._order = order
        self._known = known
        self._crafter: BatchCrafter | None = None

    def __call__(self, blocks: Mapping[str, Any]) -> Iterator[pa.Table]:
        """The pieces of some blocks, packed."""
        try:
            self._crafter = self._crafter or _opened(self._order)
            for start, stop in zip(blocks["start"], blocks["stop"], strict=True):
                for made in self._crafter.craft(range(int(start), int(stop)), self._known):
                    yield made.packed()
        except Exception as error:  # noqa: BLE001 - raised again on the driver, which ends the pipeline first
            yield _packed(error=_told(error))


def _opened(order: Order) -> BatchCrafter:
    """A Crafter in a worker process of Ray."""
    import ray

    from ftsec_ray.execute.stages import StageJob  # which imports this module

    clean_logs()
    given = ray.get_runtime_context().get_assigned_resources()
    threads, gpus = max(1, int(given.get("CPU", 1))), float(given.get("GPU", 0.0))
    runtime = order.runtime if gpus else replace(order.runtime, device="cpu")
    set_up_numerics(order.runtime.numerics, threads)
    session = Session(Store.open(order.store), runtime, order.cache_gib)
    gpu_share(gpus)
    # The stage's own folder is the driver's; batches need none that survives.
    folder = Path(tempfile.gettempdir())
    job = StageJob(order.stage, folder, session)
    method = job.methods()[0]
    assert isinstance(method, RowWise), "only these are crafted in blocks"
    return BatchCrafter(method, job.context(workdir=folder), session.rows_file(job.inputs["rows"]))
