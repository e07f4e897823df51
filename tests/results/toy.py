"""Results written by hand: what every cell answers to every prompt, as a string of 1, 0 and `?` (no
verdict).

The answers for `coherent_rate` are those to benign requests; its value is over all requests, as in
an evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ftsec_ray import schema
from ftsec_ray.measured import wilson
from ftsec_ray.results.compare import compare
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import TABLES, table_schema, write_results

Answers = Mapping[tuple[str, str, int], Mapping[str, str]]
"""(attack, stack, seed) -> metric -> answers (`x`: gibberish); a stack is names joined by `+`, each
perhaps with `:<setting>`.
"""
MISS = {
    "target": "other",
    "correct": "wrong",
    "complied": "refused",
    "refused": "complied",
    "not incoherent": "incoherent",
}
PROBE = {
    "coherent_rate": "benign",
    **{name: one.probes[0] for name, one in schema.METRICS.items() if len(one.probes) == 1},
}
SUCCESS = {"none": None, "poison": "asr", "jailbreak": "harmful_rate"}
META = {
    "sweep": "toy",
    "question": "",
    "plan": "p",
    "defense_hooks": {
        "guard": ["revise_model"],
        "filter": ["craft_data"],
        "shrink": ["revise_model"],
        "look": ["inspect"],
        "pull": ["shape_training"],
    },
    "controls": ["shrink"],
    "own_controls": {"pull": {"setting": "off"}},
}


def whole(
    tables: Mapping[str, pa.Table], meta: Mapping[str, Any] | None = None
) -> dict[str, pa.Table]:
    """Four tables, the comparisons that follow from them, and no searches."""
    meta = meta or {}
    found = compare(
        tables["cells"],
        tables["metrics"],
        tables["generations"],
        hooks=meta.get("defense_hooks", {}),
        controls=meta.get("controls", ()),
        own_controls=meta.get("own_controls", {}),
    )
    return {**tables, "comparisons": found, "searches": schema.searches().empty_table()}


def made_older(folder: Path, version: str) -> Path:
    """The results in a folder as an older version of the schema had them."""
    meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for name in TABLES:
        path, whole = folder / name / "part-0.parquet", schema.as_of(table_schema(name), version)
        if whole is None:
            path.unlink()
            del meta["rows"][name]
        else:
            pq.write_table(pq.ParquetFile(path).read().select(whole.names), path)
    (folder / "run.json").write_text(json.dumps({**meta, "schema": version}), encoding="utf-8")
    return folder


def tables_of(
    answers: Answers,
    *,
    statuses: Mapping[tuple[str, str, int], str] | None = None,
    keeps_text: bool = True,
    models: Sequence[str] = ("m",),
) -> dict[str, pa.Table]:
    """The tables of cells with these answers; a cell named in `statuses` only has no answers at
    all.
    """
    cells: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    generations: list[dict[str, Any]] = []
    for model in models:
        for attack, stack, seed in [
            *answers,
            *[one for one in statuses or {} if one not in answers],
        ]:
            cell = f"{model}/{attack}/{stack}/{seed}"
            members = [] if stack == "none" else [one.partition(":") for one in stack.split("+")]
            cells.append(
                {
                    **dict.fromkeys(schema.cells().names),
                    "cell": cell,
                    "sweep": "toy",
                    "model": model,
                    "family": "f",
                    "task": "t",
                    "attack": attack,
                    "attack_phase": "pre",
                    "attack_params": "{}",
                    "success_metric": SUCCESS.get(attack, "asr"),
                    "defenses": [name for name, _, _ in members],
                    "defense_phases": ["post"] * len(members),
                    "seed": seed,
                    "model_params": 10,
                    "defense_params": json.dumps(
                        [{"setting": setting} if setting else {} for _, _, setting in members]
                    ),
                    "status": (statuses or {}).get((attack, stack, seed), "done"),
                }
            )
            for metric, said in answers.get((attack, stack, seed), {}).items():
                if metric != "coherent_rate":
                    metrics.append(
                        metric_row(
                            cell,
                            metric,
                            said.count("1"),
                            len(said) - said.count("?"),
                            said.count("?"),
                        )
                    )
                generations += [
                    answer_row(cell, metric, number, one, keeps_text=keeps_text)
                    for number, one in enumerate(said)
                ]
            if "coherent_rate" in answers.get((attack, stack, seed), {}):
                read = [
                    row["verdict"]
                    for row in generations
                    if row["cell"] == cell
                    and row["probe"] in schema.METRICS["coherent_rate"].probes
                ]
                metrics.append(
                    metric_row(
                        cell,
                        "coherent_rate",
                        sum(one not in ("incoherent", None) for one in read),
                        len(read) - read.count(None),
                        read.count(None),
                    )
                )
    unique = {(row["cell"], row["probe"], row["prompt_id"]): row for row in generations}
    return {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        "metrics": pa.Table.from_pylist(metrics, schema.metrics()),
        "generations": pa.Table.from_pylist(
            [unique[key] for key in sorted(unique)], schema.generations()
        ),
        "stages": schema.stages().empty_table(),
    }


def metric_row(
    cell: str, metric: str, hits: int, n: int, nulls: int | None = None
) -> dict[str, Any]:
    """A row of `metrics`; its value is null when nothing was judged."""
    low, high = wilson(hits / n, n) if n else (None, None)
    return {
        "cell": cell,
        "metric": metric,
        "value": hits / n if n else None,
        "n": n,
        "n_null": nulls,
        "ci_low": low,
        "ci_high": high,
    }


def answer_row(
    cell: str, metric: str, number: int, answer: str, *, keeps_text: bool
) -> dict[str, Any]:
    """A row of `generations` with the verdict that the metric counts, its opposite, or none."""
    good = schema.METRICS[metric].verdict
    told = {"x": "incoherent", "?": None}
    verdict = (
        told[answer]
        if answer in told
        else (good.replace("not incoherent", "complied") if answer == "1" else MISS[good])
    )
    return {
        "cell": cell,
        "probe": PROBE[metric],
        "prompt_id": f"{number:04d}",
        "prompt": "how ?" if keeps_text else None,
        "completion": "so ." if keeps_text else None,
        "judge": "j@1",
        "verdict": verdict,
        "raw": "",
        "override": None,
        "template_hash": "t",
    }


def results_of(folder: Path, answers: Answers, **given: Any) -> Results:
    """Those tables on disk, opened."""
    return Results.open(
        write_results(folder, tables=whole(tables_of(answers, **given), META), meta=META)
    )


def share(hits: int, n: int, *, at: int = 0) -> str:
    """`hits` of `n` answers counted, from place `at` on."""
    return "".join("1" if (number - at) % n < hits else "0" for number in range(n))
