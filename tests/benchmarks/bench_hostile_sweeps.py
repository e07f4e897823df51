"""Mutations of the shipped sweeps: each is answered by a plan or by its faults; the slowest of them,
and the most memory of a process that answers a thousand of them.

    python -m tests.benchmarks.bench_hostile_sweeps [--count 20000] [--seed 1]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.config.test_hostile_sweeps import is_answered, mutated_texts, mutated_values

AT_A_TIME = 1000
"""Mutations of one process: Hypothesis keeps what it tried in memory."""


def answer(count: int, first: int) -> tuple[list[float], float]:
    """CPU-seconds of each of `count` mutations, and the peak memory of this process in MiB."""
    cpu_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:

        @seed(first)
        @settings(
            max_examples=count,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(sweep=st.one_of(mutated_values(), mutated_texts()))
        def answer_all(sweep: Any) -> None:
            before = time.process_time()
            is_answered(sweep, Path(folder))
            cpu_s.append(time.process_time() - before)

        answer_all()
    return cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print how many were answered, and the worst of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    cpu_s, peak_mib = [], 0.0
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1) as pool:
        for start in range(0, asked.count, AT_A_TIME):
            count = min(AT_A_TIME, asked.count - start)
            took, peak = pool.submit(answer, count, asked.seed + start).result()
            cpu_s += took
            peak_mib = max(peak_mib, peak)
            print(
                f"{len(cpu_s)} mutations answered; CPU-s of the slowest {max(cpu_s):.2f}, over 2 s"
                f" {sum(one > 2 for one in cpu_s)}, sum {sum(cpu_s):.0f}; peak of a process"
                f" {peak_mib:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
