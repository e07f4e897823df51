"""What another judge costs on a finished sweep: its `score` stages, and no model asked again.

    python -m tests.benchmarks.bench_score [--store STORE] [--judge refusal_phrases]

STORE holds the finished quickstart (`make quickstart` leaves it in `.ftsec/store`); the new stages are
added to it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ftsec_ray
from ftsec_ray.plan import build_plan
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store

SWEEP = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"


def main() -> None:
    """Print the seconds of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default=".ftsec/store")
    parser.add_argument("--judge", default="refusal_phrases")
    parser.add_argument("--executor", default="tune")
    given = parser.parse_args()
    store, spec = Store.open(given.store), ftsec_ray.load(SWEEP)
    evaluation = replace(spec.evaluation, judges=(given.judge,))
    plan = build_plan(replace(spec, evaluation=evaluation))
    needed = plan.needed(store.done())
    kinds = Counter(stage.kind for stage in needed)
    if set(kinds) != {"score"}:
        raise SystemExit(f"the store lacks more than verdicts of {given.judge}: {dict(kinds)}")
    started = time.perf_counter()
    report = execute(plan, store, executor=given.executor)
    wall = time.perf_counter() - started
    records = store.records({stage.digest for stage in needed}).values()
    own = sum(record["cpu_s"] for record in records)
    answers = sum(len(cell.opinions) for cell in plan.cells)
    print(
        f"{given.judge} on {answers} cells: {len(report.done)} score stages in {wall:.1f} s under"
        f" {given.executor}, {own:.1f} CPU-s of their own"
    )


if __name__ == "__main__":
    main()
