"""Results of sweeps that were never run, with rates that are known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from ftsec_ray import schema
from ftsec_ray.identity import digest
from ftsec_ray.measured import wilson
from ftsec_ray.registry import ATTACKS
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import TABLES, table_schema, write_results

SIZES = {"ladder:0.2m": 212_000, "ladder:1m": 1_050_000, "ladder:4m": 4_100_000}
PHASES = {
    "none": "pre",
    "badnets": "pre",
    "badedit": "pre",
    "tuba": "pre",
    "harmful_tuning": "during",
    "benign_selection": "during",
    "refusal_ablation": "post",
    "soft_prompt": "post",
    "onion": "pre",
    "lisa": "during",
    "safe_lora": "post",
}


@dataclass(frozen=True)
class MeasuredCondition:
    """A condition: each metric is one rate for all seeds, or one per seed."""

    attack: str
    metrics: dict
    model: str = "ladder:1m"
    defense: str | None = None
    params: dict = field(default_factory=dict)
    status: str = "done"
    family: str = "ladder"
    task: str = "microworld"


def results_of(
    folder: Path, made: list[MeasuredCondition], *, seeds: int = 3, prompts: int = 200
) -> Results:
    """The conditions as a results folder, opened."""
    cells, metrics = [], []
    for one in made:
        success = ATTACKS.get(one.attack).SUCCESS
        rates = dict(one.metrics)
        if "asr" in rates and success is not None:
            rates.setdefault(success, rates["asr"])  # the same number, as in collected results
        for seed in range(seeds):
            cell = digest([one.attack, one.model, one.defense, one.params, one.task, seed])
            defenses = [one.defense] if one.defense else []
            cells.append(
                {
                    "cell": cell,
                    "sweep": "made",
                    "model": one.model,
                    "family": one.family,
                    "model_params": SIZES.get(one.model),
                    "aligned": True,
                    "task": one.task,
                    "attack": one.attack,
                    "attack_phase": PHASES[one.attack],
                    "attack_params": json.dumps(one.params),
                    "success_metric": success,
                    "defenses": defenses,
                    "defense_phases": [PHASES[name] for name in defenses],
                    "defense_params": json.dumps([{} for _ in defenses]),
                    "seed": seed,
                    "status": one.status,
                    "error_code": None if one.status == "done" else "stage",
                    "error": None if one.status == "done" else "the loss is not a number",
                }
            )
            for name, value in rates.items() if one.status == "done" else ():
                rate = value[seed] if isinstance(value, (list, tuple)) else value
                n = prompts if schema.METRICS[name].proportion else 15
                low, high = (
                    wilson(rate, n)
                    if schema.METRICS[name].proportion and rate is not None
                    else (None, None)
                )
                metrics.append(
                    {
                        "cell": cell,
                        "metric": name,
                        "value": rate,
                        "n": n,
                        "ci_low": low,
                        "ci_high": high,
                    }
                )
    made_of = {"cells": cells, "metrics": metrics}
    tables = {
        name: pa.Table.from_pylist(made_of.get(name, []), table_schema(name)) for name in TABLES
    }
    return Results.open(
        write_results(
            folder, tables=tables, meta={"sweep": "made", "question": "?", "plan": digest("made")}
        )
    )
