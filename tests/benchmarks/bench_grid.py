"""How much faster a whole grid is here than with every cell run alone: `python
tests/benchmarks/bench_grid.py`.

Both sides start from the same aligned models, made first and outside both clocks, and have the same
slots. Grid: from planning to the last artifact, start and stop of Ray included. Naive: every cell
is a process of its own that does all of its work by itself with `trl.SFTTrainer` and
`model.generate` (naive_cell.py), as many at a time as there are slots; its total is the sum of the
cells' times over the slots, the best that any queue could do. A second ratio leaves out the start
and the imports of the naive processes, though not those of Ray's, and a third adds the models to
both sides: once to the grid, to every cell of the naive side. A sample of cells may stand for all
of them: the 95 % interval is that of the sample. The grid is timed before and after it, since a
machine's speed drifts, and the mean counts. The metrics of both sides are printed beside each
other, since a ratio means something only if both did the same work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sampling import Ran, attack_of, draw, estimate, grouped, model_of, shown, stack_of

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import EnvironmentFault, FtsecError, SpecError, StageError
from ftsec_ray.identity import canonical
from ftsec_ray.plan import Cell, Plan, build_plan
from ftsec_ray.registry import name_of
from ftsec_ray.schedule.execution import execute, runtime_of
from ftsec_ray.store import Store

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("harmful_rate", "cacc", "asr")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
BUSY_LOAD = 0.5


def bases_of(plan: Plan, cell: Cell) -> dict[str, str]:
    """Digests of the models that a cell starts from: `reference`, and `unaligned` where there is
    one.
    """
    stage = plan.stages[cell.score]
    needed = [plan.stages[one].input("unaligned") for one in cell.stages]
    while stage.kind not in ("source", "align"):
        stage = plan.stages[stage.input("completions") or stage.input("model") or ""]
    twin = stage.input("model") or next((digest for digest in needed if digest), None)
    return {"reference": stage.digest, **({"unaligned": twin} if twin else {})}


def make_models(plan: Plan, store: Store) -> set[str]:
    """Make the models that cells start from where the store lacks them; returns their digests."""
    from ftsec_ray.execute.session import Session
    from ftsec_ray.execute.unit import cpu_threads, run_unit

    wanted = {digest for cell in plan.cells for digest in bases_of(plan, cell).values()}
    session = Session(store, runtime_of(plan), 4.0)
    for stage in plan.with_ancestors(
        [one for one in sorted(wanted) if not store.has(one)], has=store.has
    ):
        say(f"making {stage.kind} {stage.where.get('model', '')} ...")
        cpu_threads(1)
        (verdict,) = run_unit([stage], store, session)
        if not verdict.is_good:
            raise StageError(
                f"a {stage.kind} stage failed before the clocks started", verdict.error
            )
    return wanted


def model_seconds(plan: Plan, store: Store, wanted: Iterable[str]) -> float:
    """Seconds that making these models took, with whatever they are made from, each stage once."""
    return sum(
        float(store.record(stage.digest)["wall_s"])
        for stage in plan.with_ancestors(sorted(wanted), has=lambda _: False)
    )


def run_grid(
    spec: SweepSpec, models: Store, bases: set[str], store: Store, *, workers: int
) -> float:
    """Seconds of the whole grid in a store that holds nothing but the models."""
    for digest in sorted(bases):
        folder = store.scratch(digest)
        shutil.copytree(models.fetch(digest), folder, dirs_exist_ok=True)
        store.publish(digest, folder, models.record(digest))
    started = time.perf_counter()
    report = execute(build_plan(spec), store, executor="tune", workers=workers)
    seconds = time.perf_counter() - started
    if not report.is_complete:
        verdict = next(iter(report.failed.values()))
        raise StageError(
            "the grid has failed stages",
            f"{len(report.failed)}, the first: {verdict.error}",
            "none",
        )
    return seconds


def run_naive(plan: Plan, cell: Cell, models: Store, folder: Path, *, batch: int) -> Ran:
    """Run one cell in a process of its own."""
    task = next(plan.stages[one] for one in cell.stages if plan.stages[one].kind == "task")
    bases = bases_of(plan, cell)
    asked = {
        "models": {role: str(models.fetch(digest)) for role, digest in bases.items()},
        "task": task.to_json(),
        "info": models.read_json(bases["reference"], "model.json")["info"],
        "seed": cell.seed,
        "batch": batch,
        "device": runtime_of(plan).device,
        "training": asdict(plan.spec.training),
        "evaluation": asdict(plan.spec.evaluation),
        "methods": [
            {"kind": m.KIND, "name": name_of(m), "params": json.loads(canonical(m))}
            for m in (cell.attack, *cell.defenses)
        ],
    }
    given, result = (
        folder / f"{cell.digest}.{batch}.json",
        folder / f"{cell.digest}.{batch}.result.json",
    )
    given.write_text(json.dumps(asked), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        str(Path(__file__).with_name("naive_cell.py")),
        str(given),
        str(result),
    ]
    started = time.perf_counter()
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.perf_counter() - started
    if done.returncode:
        raise StageError(f"the naive cell {shown(cell)} failed", done.stderr[-2000:])
    found = json.loads(result.read_text(encoding="utf-8"))
    say(f"naive, batch {batch}: {shown(cell)} {wall_s:.1f} s")
    outside = wall_s - sum(found["parts"].values())
    return Ran(
        cell=cell,
        wall_s=wall_s,
        parts={"process": outside, **found["parts"]},
        metrics=found["metrics"],
    )


def say(line: str) -> None:
    """Progress, apart from the figures."""
    print(line, file=sys.stderr, flush=True)


def figures(
    plan: Plan, models: Store, ran: Sequence[Ran], grid_s: float, *, batch: int, workers: int
) -> dict[str, Any]:
    """Seconds per cell, the naive total by the clock, and the ratio with its interval; printed and
    returned.
    """
    print(
        f"\nnaive, generate with batch {batch}: {len(ran)} of {len(plan.cells)} cells measured,"
        f" {workers} at a time"
    )
    for title, key in (("attack", attack_of), ("defenses", stack_of), ("model", model_of)):
        print(f"  seconds per cell by {title}")
        for name, values in sorted(grouped(ran, key).items()):
            print(f"    {name:24} {sum(values) / len(values):8.1f}  n={len(values)}")
    parts = {part: sum(one.parts[part] for one in ran) / len(ran) for part in ran[0].parts}
    print(
        "  seconds per cell by part: "
        + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
    )
    out: dict[str, Any] = {"batch": batch, "measured": len(ran), "parts_s": parts}
    for name, seconds in (
        ("every cell a process", Ran.whole),
        ("start and imports left out", Ran.work),
    ):
        found = estimate(plan.cells, ran, seconds=seconds, slots=workers)
        print(
            f"  {name:26}: naive {found.total:7.0f} s ({found.low:.0f} to {found.high:.0f}), grid"
            f" {grid_s:.0f} s, ratio {found.total / grid_s:.1f}x ({found.low / grid_s:.1f} to"
            f" {found.high / grid_s:.1f})"
        )
        out[name] = {**asdict(found), "ratio": found.total / grid_s}
    # the grid is charged as if nothing else had run while its models were made
    made = [(one, model_seconds(plan, models, bases_of(plan, one).values())) for one in plan.cells]
    extra = sum(seconds for _, seconds in made) / workers
    once = model_seconds(
        plan, models, {digest for one, _ in made for digest in bases_of(plan, one).values()}
    )
    naive, grid = out["every cell a process"]["total"] + extra, grid_s + once
    print(
        f"  from nothing, where a naive cell makes its model too: naive {naive:7.0f} s, grid"
        f" {grid:.0f} s at most, ratio {naive / grid:.1f}x or more"
    )
    out["from nothing"] = {"total": naive, "grid_s": grid, "ratio": naive / grid}
    cells = [
        {"cell": shown(one.cell), "wall_s": one.wall_s, "parts": one.parts, "metrics": one.metrics}
        for one in ran
    ]
    return {**out, "cells": cells}


def agreement(ran: Sequence[Ran], store: Store) -> dict[str, float]:
    """Mean absolute difference of every compared metric, with both sides of every cell printed."""
    from pyarrow import parquet

    print("\nmetrics, naive | grid")
    gaps: dict[str, list[float]] = {name: [] for name in COMPARED}
    for one in ran:
        rows = parquet.read_table(store.fetch(one.cell.score) / "metrics.parquet").to_pylist()
        grid = {row["metric"]: row["value"] for row in rows}
        both = {
            name: (one.metrics[name], grid[name])
            for name in COMPARED
            if one.metrics.get(name) is not None and grid.get(name) is not None
        }
        for name, (left, right) in both.items():
            gaps[name].append(abs(left - right))
        print(
            f"  {shown(one.cell)}  "
            + "  ".join(f"{name} {left:.2f} | {right:.2f}" for name, (left, right) in both.items())
        )
    means = {name: sum(values) / len(values) for name, values in gaps.items() if values}
    print(
        "  mean absolute difference: "
        + ", ".join(f"{name} {value:.3f} (n={len(gaps[name])})" for name, value in means.items())
    )
    return means


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole benchmark, with scratch in `folder`."""
    spec = load_sweep(args.sweep)
    names = [model.name for model in spec.models]
    unknown = sorted(set(args.models or ()) - set(names))
    if unknown:
        raise SpecError("no such model in the sweep", unknown, " | ".join(names))
    spec = replace(
        spec, models=tuple(m for m in spec.models if not args.models or m.name in args.models)
    )
    plan, models, store = (
        build_plan(spec),
        Store.open(args.store or folder / "models"),
        Store.open(folder / "grid"),
    )
    bases = make_models(plan, models)
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        say(f"this machine is busy (load {load:.1f}): both sides suffer, and not equally")
    grids = [run_grid(spec, models, bases, store, workers=args.workers)]
    naive: dict[int, list[Ran]] = {}
    if not args.grid_only:
        chosen = draw(plan.cells, args.sample, seed=args.seed)
        for batch in args.naive_batch:
            with ThreadPoolExecutor(args.workers) as pool:
                naive[batch] = list(
                    pool.map(
                        lambda cell, b=batch: run_naive(plan, cell, models, folder, batch=b), chosen
                    )
                )
        grids.append(
            run_grid(spec, models, bases, Store.open(folder / "again"), workers=args.workers)
        )
    grid_s, runs = sum(grids) / len(grids), len(plan.stages) - len(bases)
    print(
        f"grid: {len(plan.cells)} cells, {runs} stage runs ({plan.naive_runs} without sharing),"
        f" {grid_s:.1f} s on {args.workers} workers ({', '.join(f'{one:.1f}' for one in grids)})"
    )
    out: dict[str, Any] = {
        "sweep": spec.name,
        "cells": len(plan.cells),
        "stages": runs,
        "grid_s": grid_s,
        "grids_s": grids,
        "load": load,
        "workers": args.workers,
        "cpus": os.cpu_count(),
        "naive": [],
    }
    for batch, ran in naive.items():
        found = figures(plan, models, ran, grid_s, batch=batch, workers=args.workers)
        out["naive"].append({**found, "mean_abs_difference": agreement(ran, store)})
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; the exit code of the fault where there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=Path, default=ROOT / "sweeps" / "quickstart.yaml")
    parser.add_argument(
        "--models", nargs="+", help="names of the sweep's models to keep; all without this"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=42,
        help="naive cells to run, spread over attack x defenses; 0 runs all",
    )
    parser.add_argument(
        "--grid-only", action="store_true", help="time the grid and leave out the naive side"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=2, help="slots of both sides")
    parser.add_argument(
        "--naive-batch",
        type=int,
        nargs="+",
        default=[1],
        help="prompts per generate of the naive side; one table each",
    )
    parser.add_argument(
        "--store",
        help="where the models are kept from run to run; the grid itself always starts empty",
    )
    parser.add_argument("--json", type=Path, help="write all figures here too")
    args = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    os.environ.pop("RAY_ADDRESS", None)  # a Ray that is already running is not ours to time
    try:
        if not args.grid_only and importlib.util.find_spec("trl") is None:
            raise EnvironmentFault(
                "trl, the naive side, is not installed",
                None,
                "trl>=1.0",
                "pip install -e '.[bench]'",
            )
        with TemporaryDirectory(prefix="bench-grid-") as scratch:
            found = measure(args, Path(scratch))
    except FtsecError as fault:
        say(str(fault))
        return fault.exit_code
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
