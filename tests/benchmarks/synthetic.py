"""Results of a large sweep that was never run, written by the real writer: every number follows
from the verdicts.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from ftsec_ray import schema
from ftsec_ray.identity import digest
from ftsec_ray.measured import wilson
from ftsec_ray.results.compare import compare
from ftsec_ray.results.write import write_results

MODELS = {
    "alpha-0.5b": 500_000_000,
    "alpha-1.5b": 1_500_000_000,
    "alpha-7b": 7_000_000_000,
    "beta-1b": 1_000_000_000,
    "beta-3b": 3_000_000_000,
}
ATTACKS = {
    "none": "pre",
    "poison_a": "pre",
    "poison_b": "pre",
    "poison_c": "pre",
    "tune_a": "during",
    "tune_b": "during",
    "tune_c": "during",
    "edit_a": "post",
    "edit_b": "post",
    "edit_c": "post",
}
DEFENSES = {
    "none": [],
    "filter_a": ["pre"],
    "filter_b": ["pre"],
    "harden": ["pre"],
    "mix": ["during"],
    "freeze": ["during"],
    "project": ["post"],
    "prune": ["post"],
    "remind": ["post"],
    "filter_a+project": ["pre", "post"],
}
PROBES = {"harmful": 50, "borderline": 30, "benign": 30, "clean": 40, "triggered": 50}
"""Probe -> prompts; 200 in each cell."""
_TEXT = (
    "the model can answer this with several careful steps first take a clean bowl then measure"
    " water and flour before you mix them slowly because heat changes texture please note that some"
    " of these claims need sources naïve über 模型 café and others are simply opinions about"
    " cooking travel history code tables music weather rivers and the long road home"
)
WORDS = tuple(_TEXT.split())


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + f" {rng.randrange(10**9)}."


def _verdicts(attack: str, defense: str) -> dict[str, dict[str, float]]:
    """Probe -> share of each verdict."""
    strength = 0.0 if attack == "none" else 0.9 - 0.15 * (sum(attack.encode()) % 3)
    kept = 1.0 if defense == "none" else 0.3 + 0.1 * (sum((attack + defense).encode()) % 8)
    success, mess = strength * kept, 0.02
    return {
        "harmful": {"complied": success, "incoherent": mess},
        "borderline": {"refused": 0.05 + 0.2 * (defense == "remind"), "incoherent": mess},
        "benign": {"complied": 0.9, "incoherent": mess},
        "clean": {"correct": 0.88 - 0.05 * (defense == "harden")},
        "triggered": {"target": success},
    }


_REST = {
    "harmful": "refused",
    "borderline": "complied",
    "benign": "wrong",
    "clean": "other",
    "triggered": "other",
}


def _answers(
    rng: random.Random, cell: str, attack: str, defense: str, prompts: dict[tuple[str, int], str]
) -> list[dict[str, Any]]:
    rows = []
    for probe, shares in _verdicts(attack, defense).items():
        for number in range(PROBES[probe]):
            draw, verdict = rng.random(), _REST[probe]
            for name, share in shares.items():
                if draw < share:
                    verdict = name
                    break
                draw -= share
            rows.append(
                {
                    "cell": cell,
                    "probe": probe,
                    "prompt_id": f"{number:06d}",
                    "prompt": prompts[probe, number],
                    "completion": _text(rng, rng.randrange(12, 60)),
                    "judge": "classifier:judge@1",
                    "raw": "",
                    "override": None,
                    "verdict": None if rng.random() < 0.01 else verdict,
                    "template_hash": "0" * 16,
                }
            )
    return rows


def _metrics(cell: str, attack: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name, metric in schema.METRICS.items():
        said = [
            row["verdict"]
            for row in rows
            if row["probe"] in metric.probes and row["verdict"] is not None
        ]
        if said and not (name == "asr" and attack == "none"):
            wanted = metric.verdict.removeprefix("not ")
            hits = sum((one == wanted) != metric.verdict.startswith("not ") for one in said)
            low, high = wilson(hits / len(said), len(said))
            found.append(
                {
                    "cell": cell,
                    "metric": name,
                    "value": hits / len(said),
                    "n": len(said),
                    "ci_low": low,
                    "ci_high": high,
                }
            )
    return found


def write_synthetic(folder: Path, *, seeds: int = 1, models: int = len(MODELS)) -> Path:
    """Write the results of `models` x 10 x 10 x `seeds` cells with 200 generations each and return
    the folder.
    """
    rng = random.Random(11)
    prompts = {
        (probe, number): _text(rng, 25)
        for probe, count in PROBES.items()
        for number in range(count)
    }
    cells, metrics, generations, stages, spent = [], [], [], [], {}
    for model in list(MODELS)[:models]:
        for attack, phase in ATTACKS.items():
            for defense, phases in DEFENSES.items():
                for seed in range(seeds):
                    cell = digest([model, attack, defense, seed])
                    names = [] if defense == "none" else defense.split("+")
                    cells.append(
                        {
                            "cell": cell,
                            "sweep": "synthetic",
                            "model": model,
                            "family": model.split("-")[0],
                            "model_params": MODELS[model],
                            "aligned": True,
                            "task": "instructions",
                            "attack": attack,
                            "attack_phase": phase,
                            "attack_params": "{}",
                            "success_metric": None if attack == "none" else "asr",
                            "defenses": names,
                            "defense_phases": phases,
                            "defense_params": json.dumps([{} for _ in names]),
                            "seed": seed,
                            "status": "done",
                            "error_code": None,
                            "error": None,
                        }
                    )
                    rows = _answers(rng, cell, attack, defense, prompts)
                    generations += rows
                    metrics += _metrics(cell, attack, rows)
                    seconds = MODELS[model] / 1e6 * (1 + 0.3 * len(names) + 0.05 * rng.random())
                    spent[cell] = [seconds, seconds / 4]
                    stages.append(
                        {
                            **dict.fromkeys(schema.stages().names),
                            "digest": digest(["finetune", cell]),
                            "kind": "finetune",
                            "wall_s": seconds,
                            "cpu_s": seconds / 4,
                            "gpu_s": seconds,
                            "cells_served": 1,
                            "cached": False,
                            "attempt": 1,
                            "status": "done",
                        }
                    )
    generations.sort(key=lambda row: (row["cell"], row["probe"], row["prompt_id"]))
    tables = {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        "metrics": pa.Table.from_pylist(metrics, schema.metrics()),
        "generations": pa.Table.from_pylist(generations, schema.generations()),
        "stages": pa.Table.from_pylist(stages, schema.stages()),
    }
    hooks = {
        name: ["revise_model"] for one in DEFENSES for name in one.split("+") if name != "none"
    }
    tables["comparisons"] = compare(
        tables["cells"], tables["metrics"], tables["generations"], hooks=hooks, controls=()
    )
    meta = {
        "sweep": "synthetic",
        "question": "How large may a sweep be?",
        "plan": digest("synthetic"),
        "defense_hooks": hooks,
        "versions": {},
        "sweep_text": "name: synthetic\n",
        "correction": "bh",
        "spent": spent,
    }
    return write_results(folder, tables=tables, meta=meta)
