"""What each method costs beside a plain fine-tune, as the records of a sweep's store say.

    python -m tests.benchmarks.bench_method_cost [SWEEP] [--store STORE] [--model NAME] [--write]

A cell with one method is compared with its twin: the cell without attack and defense of the same
model, task and seed. Only stages that one of the two has and the other lacks count, so shared ones
cancel out. The unit is the fine-tune of the twin, in the same run and on the same machine. A ratio
is the median over seeds, with the lowest and the highest.

- extra CPU, extra time: CPU seconds and seconds of the stages that make or inspect the model.
- training FLOP: what training in these stages adds, which no other process on the machine changes.
- peak memory: the largest of these stages, over the twin's fine-tune. A process that trains a model
  of the ladder is nearly all libraries: read this column on a real model.
- answering: CPU seconds per prompt over those of the twin, for methods that act while the model
  answers; what a method prepares there (an optimised prompt) is in it.

`--write` puts the figures into `ftsec_ray/cli/method_costs.json`, which `ftsec show METHOD` reads;
methods that the sweep lacks keep theirs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ftsec_ray import api
from ftsec_ray.cli.method_costs import FILE, MeasuredCost, Ratio, costs_of, text_of_costs
from ftsec_ray.config.method_entries import NONE
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import hooks_of, kind_of
from ftsec_ray.method import Method
from ftsec_ray.plan import Cell, Plan
from ftsec_ray.registry import name_of
from ftsec_ray.store import Store

ASKING = ("generate", "score", "benchmark", "win_rate")
"""Stages that measure, with or without a method."""
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One cell beside its twin, as ratios."""

    cpu: float
    wall: float
    flops: float
    peak: float | None
    answering: float | None


def methods_of(cell: Cell) -> list[Method]:
    """The methods of a cell without `none`."""
    return [method for method in (cell.attack, *cell.defenses) if name_of(method) != NONE]


def only_method(cell: Cell) -> Method | None:
    """The method of a cell that has exactly one, and no search."""
    methods = methods_of(cell)
    return methods[0] if len(methods) == 1 and cell.searched is None else None


def making(cell: Cell, plan: Plan) -> set[str]:
    """Digests of the stages that make or inspect the cell's model."""
    return {digest for digest in cell.stages if plan.stages[digest].kind not in ASKING}


def prompts_of(store: Store, digest: str) -> int:
    """Number of answers in an artifact of kind `generate`."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(store.fetch(digest) / "completions.parquet").num_rows)


def tune_of(cell: Cell) -> str | None:
    """Digest of the fine-tune of a cell; None for a model that is measured before it."""
    return next((step.digest for step in cell.steps if kind_of(step.kind).tunes), None)


def sample(
    cell: Cell, twin: Cell, plan: Plan, store: Store, records: Mapping[str, Record]
) -> Sample | None:
    """The ratios of a cell; None if a stage has no record, or the twin has no fine-tune."""
    tune = tune_of(twin)
    own, other = making(cell, plan), making(twin, plan)
    apart = own ^ other
    asked = [(c.of_kind("generate")[0].digest, c) for c in (cell, twin)]
    if tune is None or not (apart | {tune} | {digest for digest, _ in asked}) <= records.keys():
        return None

    def extra(field: str) -> float:
        signed = ((1 if d in own else -1) * (records[d].get(field) or 0.0) for d in apart)
        return float(sum(signed) / records[tune][field])

    answering = None
    method = only_method(cell)
    if method is not None and "wrap_generation" in hooks_of(type(method)):
        mine, theirs = (records[d]["cpu_s"] / prompts_of(store, d) for d, _ in asked)
        answering = mine / theirs
    peaks = [records[d]["peak_bytes"] for d in own - other if records[d].get("peak_bytes")]
    return Sample(
        cpu=extra("cpu_s"),
        wall=extra("wall_s"),
        flops=extra("flops"),
        peak=max(peaks) / records[tune]["peak_bytes"] if peaks else None,
        answering=answering,
    )


def ratio(values: Sequence[float | None]) -> Ratio | None:
    """The median, the lowest and the highest of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return Ratio(median(known), min(known), max(known)) if known else None


def settings_of(methods: Sequence[Method]) -> dict[str, str]:
    """A method's canonical parameters -> those of its parameters that vary in the sweep, as
    text."""
    given = {canonical(method): json.loads(canonical(method)) for method in methods}
    names = {name for params in given.values() for name in params}
    varying = sorted(
        name for name in names if len({json.dumps(p.get(name)) for p in given.values()}) > 1
    )
    return {
        key: ", ".join(
            f"{name} {json.dumps(params.get(name))}".replace('"', "") for name in varying
        )
        for key, params in given.items()
    }


def measured(plan: Plan, store: Store, model: str | None = None) -> tuple[list[MeasuredCost], int]:
    """The costs of every setting of every method that stands alone in a cell, and how many such
    cells have no complete records."""
    cells = [cell for cell in plan.cells if model in (None, cell.model.name)]
    twins = {(c.model.name, c.task.name, c.seed): c for c in cells if not methods_of(c)}
    records = store.records(store.done() & plan.stages.keys())
    samples: dict[tuple[str, str, str, str], list[Sample]] = defaultdict(list)
    methods: dict[tuple[str, str], dict[str, Method]] = defaultdict(dict)
    missing = 0
    for cell in cells:
        method, twin = only_method(cell), twins.get((cell.model.name, cell.task.name, cell.seed))
        if method is None:
            continue
        found = sample(cell, twin, plan, store, records) if twin else None
        if found is None:
            missing += 1
            continue
        place = (method.KIND, name_of(method))
        methods[place][canonical(method)] = method
        samples[*place, canonical(method), cell.model.name].append(found)
    texts = {place: settings_of(list(known.values())) for place, known in methods.items()}
    rows = [
        MeasuredCost(
            kind=kind, method=name, setting=texts[kind, name][key], model=on,
            sweep=plan.spec.name, seeds=len(each),
            cpu=ratio([s.cpu for s in each]), wall=ratio([s.wall for s in each]),
            flops=ratio([s.flops for s in each]), peak=ratio([s.peak for s in each]),
            answering=ratio([s.answering for s in each]),
        )
        for (kind, name, key, on), each in samples.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row.kind, row.method, row.model)), missing


def table(rows: Sequence[MeasuredCost]) -> str:
    """The Markdown table of `sweeps/RESULTS.md`."""
    lines = [
        "| method | setting | model | seeds | extra CPU | extra time | training FLOP | peak memory |"
        " answering |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = (row.cpu, row.wall, row.flops, row.peak, row.answering)
        shown = (str(one) if one else "–" for one in ratios)
        lines.append(
            f"| {row.method} | {row.setting or '–'} | {row.model} | {row.seeds} |"
            f" {' | '.join(shown)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table; with `--write`, also update the file that `ftsec show` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", default="sweeps/quickstart.yaml")
    parser.add_argument("--store", default=".ftsec/store")
    parser.add_argument("--model", default=None, help="cells of one model only")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    store = Store.open(given.store)
    rows, missing = measured(api.make_plan(given.sweep, store), store, given.model)
    print(table(rows))
    if missing:
        print(f"\n{missing} cells with one method have no twin or no complete records")
    if given.write:
        new = {(row.kind, row.method) for row in rows}
        kept = [row for row in costs_of() if (row.kind, row.method) not in new]
        FILE.write_text(text_of_costs([*kept, *rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
