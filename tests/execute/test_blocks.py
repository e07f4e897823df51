"""Sets of rows crafted in blocks: the bytes and notes of the in-process path, whoever does the work
and whatever dies.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray.attacks.badnets import BadNets
from ftsec_ray.attacks.harmful_tuning import HarmfulTuning
from ftsec_ray.config.sweep import DataSpec
from ftsec_ray.context import StageContext
from ftsec_ray.data.external_sort import ExternalSort
from ftsec_ray.data.rows import RowsWriter, read_batches, read_table, write_table
from ftsec_ray.defenses.onion import Onion
from ftsec_ray.errors import DataError, StageError
from ftsec_ray.execute.blocks import WorkerPool, craft_in_blocks, parts_of
from ftsec_ray.execute.stage_job import run_stage
from ftsec_ray.method import BATCH_ROWS
from ftsec_ray.schedule.execution import execute
from tests.execute.crafting import (
    GIVEN,
    WaryJob,
    at_once,
    craft_stage,
    filled,
    job_of,
    many_rows,
    session_of,
)
from tests.fixtures_models import row, sentiment_rows, table
from tests.schedule.engine_runners import local_ray, plan_of, stage_of

ROWS = 8 * BATCH_ROWS + 37
METHODS = [
    BadNets(rate=0.3),
    BadNets(setting="clean", repeat=2, rate=0.1),
    HarmfulTuning(shots=5),
    HarmfulTuning(poison_rate=8 / ROWS),
    Onion(altered_frac=0.2),
    Onion(altered_frac=0.2, action="drop"),
]
IDS = ["badnets", "badnets-clean", "harmful_tuning", "harmful_tuning-share", "onion", "onion-drop"]
BUSY = "tests.execute.crafting:run"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("store"), many_rows(ROWS))


@pytest.fixture(scope="module")
def cluster():
    with local_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def expected(store, tmp_path_factory):
    """Bytes and notes of the in-process path, worked out once per method and seed."""
    known = {}

    def find(method, seed):
        if (method, seed) not in known:
            known[method, seed] = at_once(
                store, craft_stage(method, seed=seed), tmp_path_factory.mktemp("whole") / "out"
            )
        return known[method, seed]

    return find


def in_blocks(store, method, seed, out, **how):
    job, made, file = job_of(store, craft_stage(method, seed=seed), out)
    notes = craft_in_blocks(job, made, file, **how)
    assert sorted(path.name for path in out.iterdir()) == ["rows.parquet"]
    return (out / "rows.parquet").read_bytes(), notes


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_blocks_in_one_process_give_the_bytes_and_notes_of_the_whole_set(
    method, seed, store, expected, tmp_path
):
    whole, notes = expected(method, seed)
    for blocks in (1, 2, 8):
        assert in_blocks(store, method, seed, tmp_path / str(blocks), blocks=blocks) == (
            whole,
            notes,
        )
    changed = [key for key in ("poisoned_rows", "rows_changed", "harmful_rows") if notes.get(key)]
    assert changed, "a method that does nothing shows nothing"


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "which", ["badnets", "harmful_tuning-share", pytest.param("onion", marks=pytest.mark.slow)]
)
def test_ray_data_gives_the_bytes_and_notes_of_the_whole_set(which, store, expected, tmp_path):
    method, pool = METHODS[IDS.index(which)], WorkerPool(size=2, each={"CPU": 1.0})
    for blocks, seed in ((1, 0), (2, 7), (8, 0)):
        assert in_blocks(
            store, method, seed, tmp_path / str(blocks), pool=pool, blocks=blocks
        ) == expected(method, seed)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("pool", [None, WorkerPool(size=2, each={"CPU": 1.0})], ids=["here", "ray"])
def test_what_a_method_warns_of_in_any_process_reaches_the_job(pool, store, tmp_path):
    job = WaryJob(craft_stage(BadNets(rate=0.3)), tmp_path, session_of(store, 0))
    file = job.session.rows_file(job.inputs["rows"])
    craft_in_blocks(job, job.methods()[0], file, pool=pool, blocks=4)
    assert sorted(job.warnings) == ["crafted", "seen"]


def test_two_seeds_give_two_sets(expected):
    for method in METHODS[:4:2]:
        assert expected(method, 0)[0] != expected(method, 7)[0]


def test_a_stage_takes_blocks_above_the_limit_and_the_whole_set_below(store, tmp_path, monkeypatch):
    from ftsec_ray.execute import blocks

    taken = []
    monkeypatch.setattr(
        blocks, "craft_in_blocks", lambda *given: taken.append("blocks") or craft_in_blocks(*given)
    )
    stage, made = craft_stage(METHODS[0]), []
    for limit in (ROWS, ROWS - 1):
        out = tmp_path / str(limit)
        out.mkdir()
        notes = run_stage(stage, out, session_of(store, limit))["notes"]
        made.append(((out / "rows.parquet").read_bytes(), notes))
        taken.append(limit)
    assert taken == [ROWS, "blocks", ROWS - 1]
    assert made[0] == made[1]


def test_a_data_class_without_ray_is_crafted_in_this_process(store, expected, tmp_path):
    stage = craft_stage(METHODS[0], resource="data:4")
    run_stage(stage, tmp_path, session_of(store, 0))
    assert (tmp_path / "rows.parquet").read_bytes() == expected(METHODS[0], 0)[0]


@pytest.mark.parametrize("limit", [0, 10**9], ids=["blocks", "whole"])
def test_a_set_with_one_id_twice_is_refused_either_way(limit, tmp_path):
    taken = [{**r, "row_id": f"harmful_tuning/h/{i:04d}"} for i, r in enumerate(sentiment_rows(25))]
    store = filled(tmp_path / "store", [*many_rows(2 * BATCH_ROWS), *taken])
    (tmp_path / "out").mkdir()
    with pytest.raises(
        DataError, match=r"two rows have the same id\n  got:  'harmful_tuning/h/00(1|2)"
    ):
        run_stage(craft_stage(HarmfulTuning(shots=8)), tmp_path / "out", session_of(store, limit))


@pytest.mark.parametrize("limit", [0, 10**9], ids=["blocks", "whole"])
def test_a_filter_that_leaves_nothing_fails_the_same_either_way(limit, tmp_path):
    store = filled(tmp_path / "store", [row(i, "red blue stone", "good") for i in range(20)])
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match="onion removed all training rows"):
        run_stage(
            craft_stage(Onion(threshold=-1e9, max_words=2, action="drop")),
            tmp_path / "out",
            session_of(store, limit),
        )


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_an_error_of_a_method_in_a_worker_is_the_error_of_the_stage(store, tmp_path):
    import ray

    pool = WorkerPool(size=1, each={"CPU": 1.0})
    with pytest.raises(DataError, match=r"got:  8\n  want: 100 rows in split harmful_train"):
        in_blocks(store, HarmfulTuning(), 0, tmp_path / "survey", pool=pool)
    job, made, file = job_of(store, craft_stage(Onion(threshold=1.0)), tmp_path / "craft")
    job = replace(job, stage=replace(job.stage, inputs=job.stage.inputs[:2]))
    with pytest.raises(StageError, match="a model that it does not declare") as held:
        craft_in_blocks(job, made, file, pool=pool)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2, (
        "its actor is gone, though the error is still held"
    )
    assert "craft_rows" in "".join(held.value.__notes__), "where it happened"


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(tmp_path):
    method, out, killed = BadNets(rate=0.9, repeat=20), tmp_path / "out", []
    store = filled(tmp_path / "store", many_rows(40 * BATCH_ROWS))
    whole = at_once(store, craft_stage(method), tmp_path / "whole")

    def kill_one():
        while not killed:
            time.sleep(0.02)
            if len(list(out.glob(".runs/*"))) >= 1:  # the work has begun, and has not ended
                workers = [
                    one
                    for one in psutil.Process().children(recursive=True)
                    if "MapWorker" in "".join(one.cmdline())
                ]
                killed.extend(one.pid for one in workers)
                workers[0].kill()

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    assert (
        in_blocks(store, method, 0, out, pool=WorkerPool(size=2, each={"CPU": 1.0}), blocks=20)
        == whole
    )
    thread.join(10)
    assert killed


def plan_with(*others, stage, workers=2):
    plan = plan_of([*GIVEN, *others, stage])
    return replace(plan, spec=replace(plan.spec, data=DataSpec(ray_above=0, workers=workers)))


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("asked", "executor"),
    [(2, "tune"), (16, "tune"), pytest.param(16, "actors", marks=pytest.mark.slow)],
)
def test_a_pipeline_gets_its_cores_while_other_units_want_all_of_them(
    asked, executor, expected, tmp_path
):
    """Two cores, never free together, and a set whose blocks need both once another unit is done:
    it gets its turn before the rest.
    """
    here = filled(tmp_path / "store", many_rows(ROWS))
    busy = [
        replace(stage_of(f"busy{i}", sleep=0.5 + 0.13 * (i % 4)), kind="generate")
        for i in range(16)
    ]
    stage = craft_stage(METHODS[0], resource=f"data:{asked}")
    stage = replace(stage, inputs=(*stage.inputs, ("after", busy[0].digest)), cost_s=50.0)
    events = []
    report = execute(
        plan_with(*busy, stage=stage, workers=asked),
        here,
        executor=executor,
        runner=BUSY,
        on_event=lambda e: events.append((e.kind, e.unit)),
    )
    assert report.is_complete
    assert report.attempts[stage.digest] == 1
    assert len(report.done) == 17
    later = [
        unit
        for kind, unit in events[events.index(("finished", stage.digest)) :]
        if kind == "started"
    ]
    assert len(later) >= 6, "it did not have to wait until nobody else wanted a core"
    assert (here.fetch(stage.digest) / "rows.parquet").read_bytes() == expected(METHODS[0], 0)[0]
    assert here.record(stage.digest)["resource"] == f"data:{asked}"


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
@pytest.mark.parametrize("on_ray", ["tune", pytest.param("actors", marks=pytest.mark.slow)])
def test_a_chain_of_pipelines_on_ray_has_the_bytes_of_the_local_executor(tmp_path, on_ray):
    stores = [filled(tmp_path / name, many_rows(ROWS)) for name in ("ray", "local")]
    poison = craft_stage(METHODS[0], resource="data:2")
    clean = craft_stage(METHODS[4], rows=poison.digest, resource="data:2")
    for where, executor in zip(stores, (on_ray, "local"), strict=True):
        assert execute(
            plan_with(poison, stage=clean), where, executor=executor, runner=BUSY
        ).is_complete
    for stage in (poison, clean):
        records = [where.record(stage.digest) for where in stores]
        assert records[0]["files"] == records[1]["files"]
        assert records[0]["notes"] == records[1]["notes"]
    assert 0 < records[0]["notes"]["filter_tpr"] <= 1


# The parts.


def test_parts_are_cut_where_batches_are_and_leave_nothing_out():
    for total, blocks in (
        (1, 1),
        (ROWS, 1),
        (ROWS, 2),
        (ROWS, 8),
        (BATCH_ROWS, 4),
        (10 * BATCH_ROWS, 3),
    ):
        parts = parts_of(total, blocks)
        assert len(parts) <= blocks
        assert [i for part in parts for i in (part.start, part.stop)][1:-1:2] == [
            part.start for part in parts[1:]
        ]
        assert (parts[0].start, parts[-1].stop) == (0, total)
        assert all(part.start % BATCH_ROWS == 0 for part in parts)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 700), length=st.integers(0, 700), size=st.integers(1, 300))
def test_batches_of_a_part_are_whole_but_for_the_last(start, length, size, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "batches"
    rows = table([row(i, f"p {i}", "r") for i in range(600)])
    if not folder.exists():
        import pyarrow.parquet as pq

        folder.mkdir()
        pq.write_table(rows, folder / "r.parquet", row_group_size=128)
    part = range(min(start, 600), min(start + length, 600))
    found = list(read_batches(folder / "r.parquet", size, part))
    assert [batch.num_rows for batch in found[:-1]] == [size] * (len(found) - 1)
    assert [one for batch in found for one in batch["row_id"].to_pylist()] == rows[
        "row_id"
    ].to_pylist()[part.start : part.stop]


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.lists(st.integers(0, 10_000), max_size=60), max_size=8),
    seed=st.integers(0, 5),
)
def test_pieces_in_any_order_are_merged_to_the_bytes_of_a_sorted_table(
    numbers, seed, tmp_path_factory
):
    seen: set[int] = set()
    pieces = [[one for one in piece if not (one in seen or seen.add(one))] for piece in numbers]
    folder = tmp_path_factory.mktemp("runs")
    runs = ExternalSort(folder / "runs")
    for piece in random.Random(seed).sample(pieces, len(pieces)):
        runs.add(table([row(i, f"p {i}", "r") for i in piece]))
    with RowsWriter(folder / "merged.parquet") as writer:
        for rows in runs.merged():
            writer.write(rows)
    write_table(table([row(i, f"p {i}", "r") for i in seen]), folder / "whole.parquet")
    assert runs.count == len(seen)
    assert (folder / "merged.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()


def test_overlapping_runs_are_merged_batch_by_batch(tmp_path):
    ids = list(range(30_000))
    runs = ExternalSort(tmp_path / "runs")
    for start in range(3):
        runs.add(table([row(i, "p", "r") for i in ids[start::3]]))
    merged = list(runs.merged())
    assert [one for rows in merged for one in rows["row_id"].to_pylist()] == sorted(
        f"t/{i:04d}" for i in ids
    )
    assert len(merged) > 5, "not all at once"


@pytest.mark.parametrize("count", [0, 1, 65_535, 65_536, 65_537, 140_000])
def test_a_file_has_the_bytes_that_pyarrow_gives_the_whole_table(count, tmp_path):
    """The writer of pieces against one call of pyarrow's."""
    import pyarrow.parquet as pq

    rows = table(
        [
            {**row(0, f"p {i % 91}", "r"), "row_id": f"{i:08d}", "label": [None, "good"][i % 2]}
            for i in range(count)
        ]
    )
    pq.write_table(
        rows.combine_chunks(),
        tmp_path / "reference.parquet",
        compression="zstd",
        row_group_size=65_536,
    )
    with RowsWriter(tmp_path / "pieces.parquet") as writer:
        for start in range(0, count, 777):
            writer.write(rows.slice(start, 777))
    write_table(rows, tmp_path / "whole.parquet")
    assert (
        (tmp_path / "pieces.parquet").read_bytes()
        == (tmp_path / "whole.parquet").read_bytes()
        == (tmp_path / "reference.parquet").read_bytes()
    )
    assert read_table(tmp_path / "pieces.parquet").equals(rows)


def test_a_method_that_notes_single_batches_is_told_to_count(tmp_path):
    class Noting(BadNets):
        def craft_rows(self, rows, known, ctx):
            ctx.note(last=rows.num_rows)
            return rows

    from tests.attacks.context import context

    ctx: StageContext = context()
    with pytest.raises(
        StageError,
        match=r"Noting.craft_rows calls ctx.note(?s:.*)\n  got:  \['last'\]",
    ):
        Noting().craft_data(table(sentiment_rows(3)), ctx)
    ctx.count(seen=2)
    ctx.count(seen=3)
    assert ctx.counts == {"seen": 5}
