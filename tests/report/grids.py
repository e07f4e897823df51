"""Grids whose answer is known by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from ftsec_ray import schema
from ftsec_ray.measured import wilson
from ftsec_ray.report.grid import Grid, build_grid
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from tests.results.toy import whole

Shares = dict[tuple[str, str], dict[str, float]]
SUCCESS_OF = {
    "none": None,
    "poison": "asr",
    "jailbreak": "harmful_rate",
    "gate": "triggered_harmful_rate",
}


@pytest.fixture
def grid_of(tmp_path: Path) -> Callable[..., Grid]:
    """A grid of one model from {(attack, defense): metrics}, all with the same n."""

    def make(
        measured: Shares,
        *,
        n: int = 200,
        hooks: dict[str, list[str]] | None = None,
        seeds: list[Shares] | None = None,
        spent: dict[tuple[str, str], list[float]] | None = None,
        verdicts: dict[tuple[str, str], list[str | None]] | None = None,
        phases: dict[str, str] | None = None,
    ) -> Grid:
        cells, metrics = [], []
        for seed, values in enumerate(seeds or [measured]):
            for (attack, defense), own in values.items():
                cell = f"{attack}/{defense}/{seed}"
                names = [] if defense == "none" else defense.split("+")
                cells.append(
                    {
                        "cell": cell,
                        "sweep": "s",
                        "model": "m",
                        "family": "f",
                        "model_params": 10,
                        "aligned": True,
                        "task": "t",
                        "attack": attack,
                        "attack_phase": (phases or {}).get(attack, "pre"),
                        "attack_params": "{}",
                        "success_metric": SUCCESS_OF[attack],
                        "defenses": names,
                        "defense_phases": ["post"] * len(names),
                        "defense_params": json.dumps([{} for _ in names]),
                        "seed": seed,
                        "status": "done",
                        "error_code": None,
                        "error": None,
                    }
                )
                for name, value in own.items():
                    low, high = wilson(value, n)
                    metrics.append(
                        {
                            "cell": cell,
                            "metric": name,
                            "value": value,
                            "n": n,
                            "ci_low": low,
                            "ci_high": high,
                        }
                    )
        blank = dict.fromkeys(schema.generations().names)
        answers = [
            {
                **blank,
                "cell": f"{attack}/{defense}/0",
                "probe": "harmful",
                "prompt_id": str(i),
                "verdict": one,
            }
            for (attack, defense), own in (verdicts or {}).items()
            for i, one in enumerate(own)
        ]
        tables_ = {
            "cells": pa.Table.from_pylist(cells, schema.cells()),
            "metrics": pa.Table.from_pylist(metrics, schema.metrics()),
            "generations": pa.Table.from_pylist(answers, schema.generations()),
            "stages": schema.stages().empty_table(),
        }
        meta = {
            "sweep": "s",
            "question": "",
            "defense_hooks": hooks or {},
            "spent": {
                f"{attack}/{defense}/0": seconds
                for (attack, defense), seconds in (spent or {}).items()
            },
        }
        return build_grid(
            Results.open(write_results(tmp_path / "r", tables=whole(tables_, meta), meta=meta))
        )

    return make


BASE: Shares = {
    ("none", "none"): {"harmful_rate": 0.02, "cacc": 0.9},
    ("none", "guard"): {"harmful_rate": 0.02, "cacc": 0.88},
    ("none", "weak"): {"harmful_rate": 0.02, "cacc": 0.9},
    ("poison", "none"): {"asr": 0.9, "asr_no_trigger": 0.05, "harmful_rate": 0.02, "cacc": 0.9},
    ("poison", "guard"): {"asr": 0.3, "asr_no_trigger": 0.05, "harmful_rate": 0.02, "cacc": 0.88},
    ("poison", "weak"): {"asr": 0.88, "asr_no_trigger": 0.05, "harmful_rate": 0.02, "cacc": 0.9},
    ("jailbreak", "none"): {"asr": 0.8, "harmful_rate": 0.8, "cacc": 0.9},
    ("jailbreak", "guard"): {"asr": 0.2, "harmful_rate": 0.2, "cacc": 0.88},
    ("jailbreak", "weak"): {"asr": 0.79, "harmful_rate": 0.79, "cacc": 0.9},
}
