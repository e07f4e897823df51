"""What a run costs when the store holds everything: planning, one listing, and no trial.

    python -m tests.benchmarks.bench_rerun [--cells 1500]

The artifacts are made by a runner that trains nothing, so that the figures are those of the engine
alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from ftsec_ray import api
from ftsec_ray.store import Store
from tests.cli import toy

LIMIT_S = 10.0


def sweep_of(cells: int) -> dict[str, object]:
    """A grid of so many cells (a multiple of 15) over poison rates and seeds."""
    return {
        "name": "rerun",
        "question": "What does a run cost that has nothing to do?",
        "models": ["ladder:0.2m"],
        "task": "microworld",
        "attacks": ["none", {"badnets": {"rate": {"grid": [0.05, 0.1]}}}],
        "defenses": ["none", "shrink", "self_reminder", "lisa", "onion"],
        "seeds": cells // 15,
    }


def main() -> int:
    """Print the seconds of a first collection and of a rerun as a new process; 1 where the rerun is
    over its limit.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1500)
    cells = parser.parse_args().cells
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = folder / "rerun.yaml"
        path.write_text(yaml.safe_dump(sweep_of(cells)))
        plan, store = api.make_plan(path), Store.open(folder / "store")
        toy.execute(plan, store, executor="local", address=None, workers=None, on_event=None)
        command = [
            sys.executable,
            "-m",
            "ftsec_ray",
            "run",
            str(path),
            "--store",
            str(folder / "store"),
            "--results",
            str(folder / "results"),
        ]
        taken = []
        for label in ("tables missing", "everything there"):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
            taken.append(time.perf_counter() - start)
            print(
                f"{len(plan.cells)} cells, {len(plan.stages)} stages, {label}: {taken[-1]:.1f} s,"
                " no trial"
            )
    print(f"rerun {taken[-1]:.1f} s, limit {LIMIT_S:.0f} s")
    return int(max(taken) > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
