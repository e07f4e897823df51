"""Poison a large set: the Ray Data pipeline beside `datasets.Dataset.map` with the same function
and the same number of processes.

    python -m tests.benchmarks.bench_data [--rows 1000000] [--workers 2] [--rounds 2]

Both begin at the same Parquet file and end with the poisoned rows as a Parquet file; both clocks
include the look at the whole set (`survey`), and neither includes the start of Ray. Each run is a
process of its own. Memory is the peak of that process and all its children, Ray's daemons and
object store among them. `rss_gib` is the growth of their summed resident memory since Ray was up
and idle, and counts a page that several processes share once for each of them; `pss_gib` counts it
once, and Ray's own start too.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil

from ftsec_ray.attacks.badnets import BadNets
from ftsec_ray.context import TaskData
from ftsec_ray.data.rows import RowsWriter, count_rows, read_batches
from ftsec_ray.execute.blocks import WorkerPool, craft_in_blocks
from ftsec_ray.identity import sha256
from ftsec_ray.method import BATCH_ROWS
from ftsec_ray.store import Store
from tests.execute.crafting import TASK, craft_stage, job_of
from tests.fixtures_models import WORDS, row, table, tiny_task

LIMIT_GIB = 2.0
METHOD = BadNets(rate=0.1)
RAY_STORE_BYTES = 512 * 2**20


def fill(root: Path, rows: int) -> None:
    """A store whose task has so many rows, written piece by piece."""
    from ftsec_ray.data.tasks import save_task

    store, rng = Store.open(root), random.Random(0)
    folder = store.scratch(TASK)
    task = tiny_task()
    save_task(
        TaskData(task.name, {**task.splits, "train": table([])}, task.labels, task.judge), folder
    )
    with RowsWriter(folder / "train.parquet") as writer:
        for start in range(0, rows, 10_000):
            piece = []
            for i in range(start, min(start + 10_000, rows)):
                label = rng.choice(["good", "bad"])
                prompt = " ".join(rng.choices(WORDS, k=rng.randint(8, 30)))
                piece.append(
                    {**row(i, prompt, label, label=label, kind="two_class"), "row_id": f"t/{i:08d}"}
                )
            writer.write(table(piece))
    about = json.loads((folder / "task.json").read_text())
    about["splits"]["train"] = rows
    (folder / "task.json").write_text(json.dumps(about))
    store.publish(TASK, folder, {})


class Memory:
    """The most resident memory that this process and its children have grown by."""

    def __init__(self) -> None:
        self._first = self._now()
        self._idle = self._first
        self._peak = (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self._peak = tuple(map(max, self._peak, self._now()))

    def begin(self) -> None:
        """What was started so far is not the work's."""
        self._idle = self._now()

    @staticmethod
    def _now() -> tuple[int, int]:
        rss = pss = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            found = {
                line.split(":")[0]: int(line.split()[1]) * 1024
                for line in lines[1:]
                if line.endswith("kB")
            }
            rss, pss = rss + found["Rss"], pss + found["Pss"]
        return rss, pss

    def stop(self) -> tuple[float, float]:
        """GiB as (rss, pss)."""
        self._stop.set()
        self._thread.join()
        return round((self._peak[0] - self._idle[0]) / 2**30, 2), round(
            (self._peak[1] - self._first[1]) / 2**30, 2
        )


def by_ray(store: Store, out: Path, workers: int, memory: Memory) -> float:
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        object_store_memory=RAY_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    time.sleep(3)  # until its daemons are up
    memory.begin()
    began = time.perf_counter()
    job, method, file = job_of(store, craft_stage(METHOD), out)
    craft_in_blocks(job, method, file, crew=WorkerPool(size=workers, each={"CPU": 1.0}))
    taken = time.perf_counter() - began
    ray.shutdown()
    return taken


def by_datasets(store: Store, out: Path, workers: int, memory: Memory) -> float:
    import datasets

    datasets.disable_progress_bars()
    memory.begin()
    began = time.perf_counter()
    job, method, file = job_of(store, craft_stage(METHOD), out)
    context = job.context()
    known = method.survey(read_batches(file, BATCH_ROWS, range(count_rows(file))), context)
    data = datasets.Dataset.from_parquet(str(file), cache_dir=str(out / "cache")).with_format(
        "arrow"
    )
    made = data.map(
        Crafted(method, known, context.seed),
        batched=True,
        batch_size=BATCH_ROWS,
        num_proc=workers,
        cache_file_name=str(out / "m.arrow"),
    )
    made.to_parquet(str(out / "rows.parquet"), batch_size=65_536)
    return time.perf_counter() - began


class Crafted:
    """The method's function, as `Dataset.map` can send it to its processes."""

    def __init__(self, method: BadNets, known: float, seed: int) -> None:
        self.method, self.known, self.seed = method, known, seed

    def __call__(self, rows):
        from ftsec_ray import schema
        from tests.attacks.context import context

        return self.method.craft_rows(rows.cast(schema.ROWS), self.known, context(seed=self.seed))


def one(how: str, root: Path, workers: int) -> None:
    """Run one way in this process and print its figures as JSON."""
    memory = Memory()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        seconds = {"ray": by_ray, "datasets": by_datasets}[how](
            Store.open(root), out, workers, memory
        )
        rss, pss = memory.stop()
        poisoned = sum(
            sum(batch["poisoned"].to_pylist()) for batch in read_batches_of(out / "rows.parquet")
        )
        print(
            json.dumps(
                {
                    "how": how,
                    "s": round(seconds, 1),
                    "rss_gib": rss,
                    "pss_gib": pss,
                    "poisoned": poisoned,
                    "sha256": sha256(out / "rows.parquet"),
                }
            )
        )


def read_batches_of(file: Path):
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).iter_batches(columns=["poisoned"])


def main() -> int:
    """Print rows per second of both, their ratio and the peaks; 1 where the pipeline takes more
    memory than its limit.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one[0], Path(given.one[1]), given.workers)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "store"
        fill(root, given.rows)
        found: dict[str, list[dict]] = {"ray": [], "datasets": []}
        for how in ["ray", "datasets"] * given.rounds:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bench_data",
                "--workers",
                str(given.workers),
                "--one",
                how,
                str(root),
            ]
            done = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            found[how].append(json.loads(done.stdout.splitlines()[-1]))
            print(found[how][-1], flush=True)
        rates = {how: given.rows / median(one["s"] for one in runs) for how, runs in found.items()}
        assert len({one["poisoned"] for runs in found.values() for one in runs}) == 1, (
            "both do the same"
        )
        assert len({one["sha256"] for one in found["ray"]}) == 1
        peak = max(one["rss_gib"] for one in found["ray"])
        print(
            f"{given.rows} rows, {given.workers} processes: Ray Data {rates['ray']:,.0f} rows/s,"
            f" datasets.map {rates['datasets']:,.0f} rows/s, ratio"
            f" {rates['ray'] / rates['datasets']:.2f}; peak growth {peak:.2f} GiB, limit"
            f" {LIMIT_GIB:.0f} GiB"
        )
    return int(peak > LIMIT_GIB)


if __name__ == "__main__":
    sys.exit(main())
