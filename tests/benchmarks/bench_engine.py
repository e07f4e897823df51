"""What the engine adds to the work: seconds per empty unit, and makespan against what no scheduler
can beat.

    python -m tests.benchmarks.bench_engine [overhead | makespan | scale [UNITS ...]]

`overhead` runs 1,000 units that do nothing, in this process, and with 2 workers under Tune and on
plain actors.
`makespan` runs a grid of stages that sleep for declared durations on 8 logical CPUs; its bound is
the longer of the critical path and work / slots. `scale` runs 1,000, 5,000, 20,000 and again 1,000
units that do nothing under Tune with 2 workers, each plan in a fresh
process: the cost of a unit must not grow with their number. Times count from the first start of a
unit; what Ray takes to start is printed beside them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.show import summarize
from ftsec_ray.plan.stage import Stage
from ftsec_ray.schedule.execution import Event, execute
from ftsec_ray.store import Store
from tests.schedule.engine_runners import plan_of, stage_of

LIMITS = {"local_ms": 5.0, "tune_ms": 100.0, "actors_ms": 20.0, "makespan": 1.10, "scale": 1.5}
SIZES = (1_000, 5_000, 20_000, 1_000)
"""The smallest once more at the end, so that a machine that became busier shows."""


def timed(plan: Plan, executor: str, workers: int) -> dict[str, float]:
    """Seconds from the first start to the last end, and before the first start."""
    events: list[tuple[float, float, Event]] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = execute(
            plan,
            Store.open(folder),
            executor=executor,
            workers=workers,  # type: ignore[arg-type]
            runner="tests.schedule.engine_runners:nothing",
            session="tests.schedule.engine_runners:Bench",
            on_event=lambda event: events.append(
                (time.perf_counter() - started, time.process_time(), event)
            ),
        )
        ended = time.perf_counter() - started
    assert report.is_complete, report.failed
    assert len(report.done) == len(plan.stages)
    ends = [(at, cpu) for at, cpu, event in events if event.kind == "finished"]
    some = min(1_000, len(ends) // 2)

    def per_unit_ms(first: int, last: int, clock: int) -> float:
        return 1000 * (ends[last][clock] - ends[first][clock]) / some

    return {
        "units": len(report.attempts),
        "start_s": events[0][0],
        "span_s": events[-1][0] - events[0][0],
        "cpu_s": events[-1][1] - events[0][1],
        "end_s": ended - events[-1][0],
        "first_ms": per_unit_ms(0, some, 0),
        "last_ms": per_unit_ms(-1 - some, -1, 0),
        "first_cpu_ms": per_unit_ms(0, some, 1),
        "last_cpu_ms": per_unit_ms(-1 - some, -1, 1),
    }


def overhead() -> bool:
    """Milliseconds per empty unit."""
    base = stage_of("base")
    plan = plan_of([base, *(stage_of(f"s{i}", base) for i in range(1000))])
    is_good = True
    for executor, workers in (("local", 1), ("tune", 2), ("actors", 2)):
        found = timed(plan, executor, workers)
        per_unit_ms = 1000 * found["span_s"] / found["units"]
        is_good &= per_unit_ms <= LIMITS[f"{executor}_ms"]
        print(
            json.dumps(
                {
                    "executor": executor,
                    "units": found["units"],
                    "per_unit_ms": round(per_unit_ms, 2),
                    "limit_ms": LIMITS[f"{executor}_ms"],
                    "ray_start_s": round(found["start_s"], 1),
                    "load_1min": os.getloadavg()[0],
                }
            )
        )
    return is_good


def grid(rng: random.Random) -> list[Stage]:
    """Sources, poisoned rows, tunes, repairs and evaluations with durations of 1 to 8 seconds, and
    true costs as priors.
    """

    def sleeping(name: str, low: float, high: float, *needs: Stage) -> Stage:
        seconds = round(rng.uniform(low, high), 2)
        return stage_of(name, *needs, cost_s=seconds, sleep=seconds)

    stages = []
    for model in range(2):
        base = sleeping(f"base{model}", 4, 6)
        stages.append(base)
        for attack in range(6):
            rows = sleeping(f"rows{model}{attack}", 1, 2)
            tune = sleeping(f"tune{model}{attack}", 4, 8, base, rows)
            stages += [rows, tune, sleeping(f"eval{model}{attack}", 2, 4, tune)]
            for defense in range(8):
                repair = sleeping(f"repair{model}{attack}{defense}", 1, 4, tune)
                stages += [repair, sleeping(f"eval{model}{attack}{defense}", 2, 4, repair)]
    return stages


def makespan() -> bool:
    """Makespan over its lower bound."""
    slots = 8
    plan = plan_of(grid(random.Random(0)))
    summary = summarize(plan, set())
    bound_s = max(summary.critical_path_s, summary.work_s / slots)
    found = timed(plan, "tune", slots)
    ratio = found["span_s"] / bound_s
    print(
        json.dumps(
            {
                "stages": summary.stages,
                "units": found["units"],
                "slots": slots,
                "work_s": round(summary.work_s, 1),
                "critical_path_s": round(summary.critical_path_s, 1),
                "bound_s": round(bound_s, 1),
                "makespan_s": round(found["span_s"], 1),
                "ratio": round(ratio, 3),
                "limit": LIMITS["makespan"],
                "ray_start_s": round(found["start_s"], 1),
                "load_1min": os.getloadavg()[0],
            }
        )
    )
    return ratio <= LIMITS["makespan"]


def fan(count: int) -> dict[str, float]:
    """One stage and so many that need it; measured in a process of its own."""
    base = stage_of("base")
    plan = plan_of([base, *(stage_of(f"s{i}", base) for i in range(count - 1))])
    planned = _peak_mib()
    return {**timed(plan, "tune", 2), "plan_mib": planned, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Most memory that this process has had."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 1024


def scale(sizes: tuple[int, ...]) -> bool:
    """Cost of a unit in the largest plan over that in the smallest, by the clock and in seconds of
    the driver.
    """
    found_of: dict[int, list[dict[str, float]]] = {}
    for count in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(fan, count).result()
        found_of.setdefault(count, []).append(found)
        print(
            json.dumps(
                {
                    "units": found["units"],
                    "units_per_s": round(found["units"] / found["span_s"], 1),
                    "per_unit_ms": round(1000 * found["span_s"] / found["units"], 2),
                    "first_1000_ms": round(found["first_ms"], 2),
                    "last_1000_ms": round(found["last_ms"], 2),
                    "driver_cpu_ms": round(1000 * found["cpu_s"] / found["units"], 2),
                    "first_1000_cpu_ms": round(found["first_cpu_ms"], 2),
                    "last_1000_cpu_ms": round(found["last_cpu_ms"], 2),
                    "driver_peak_mib": round(found["peak_mib"]),
                    "before_run_mib": round(found["plan_mib"]),
                    "ray_start_s": round(found["start_s"], 1),
                    "end_s": round(found["end_s"], 1),
                    "load_1min": os.getloadavg()[0],
                }
            ),
            flush=True,
        )

    def cost(count: int, of: str) -> float:
        return sum(one[of] / one["units"] for one in found_of[count]) / len(found_of[count])

    ratio, cpu_ratio = (
        cost(max(found_of), of) / cost(min(found_of), of) for of in ("span_s", "cpu_s")
    )
    print(
        json.dumps(
            {
                "ratio": round(ratio, 2),
                "driver_cpu_ratio": round(cpu_ratio, 2),
                "limit": LIMITS["scale"],
            }
        )
    )
    return ratio <= LIMITS["scale"]


def main() -> int:
    """Run what was asked for; 1 when a limit is exceeded."""
    asked = sys.argv[1:] or ["overhead", "makespan", "scale"]
    sizes = tuple(int(word) for word in asked if word.isdigit()) or SIZES
    known = {"overhead": overhead, "makespan": makespan, "scale": lambda: scale(sizes)}
    return int(not all([known[name]() for name in asked if not name.isdigit()]))


if __name__ == "__main__":
    sys.exit(main())
