"""Seconds and memory to plan a grid of 100,000 cells on one core: `python -m
tests.benchmarks.bench_plan`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import fields, replace

from ftsec_ray.config.sweep import ModelSpec, SweepSpec, TaskSpec
from ftsec_ray.method import Method
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.show import summarize
from ftsec_ray.registry import ATTACKS, DEFENSES

LIMIT_S, LIMIT_BYTES = 10.0, 2**30


def varied(cls: type[Method], count: int) -> list[Method]:
    """So many instances that differ in their first number."""
    method = cls()
    name = next(f.name for f in fields(cls) if type(getattr(method, f.name)) in (int, float))
    return [replace(method, **{name: type(getattr(method, name))(i)}) for i in range(1, count + 1)]


def grid() -> SweepSpec:
    """5 models x 20 attacks x 50 stacks x 20 seeds, with methods at every hook."""
    models = (
        *(
            ModelSpec(name=f"m{i}", source="ladder:1m", family="ladder", aligned=True)
            for i in range(4)
        ),
        ModelSpec(
            name="hub",
            source="owner/model-1b",
            family="hub",
            aligned=True,
            unaligned="owner/base-1b",
        ),
    )
    attacks = (
        ATTACKS.get("none")(),
        *varied(ATTACKS.get("badnets"), 10),
        *varied(ATTACKS.get("refusal_ablation"), 9),
    )
    by_name = {
        name: varied(DEFENSES.get(name), 10)
        for name in ("onion", "vaccine", "lisa", "safe_lora", "weight_statistics")
    }
    stacks = (
        (),
        *(
            (method,)
            for name in ("onion", "vaccine", "lisa", "safe_lora")
            for method in by_name[name]
        ),
        *(
            tuple(by_name[name][i] for name in ("onion", "lisa", "safe_lora", "weight_statistics"))
            for i in range(9)
        ),
    )
    return SweepSpec(
        name="grid",
        models=models,
        tasks=(TaskSpec(name="microworld"),),
        attacks=attacks,
        defenses=stacks,
        seeds=tuple(range(20)),
    )


def main() -> int:
    """Print the figures; 1 when a limit is exceeded."""
    spec = grid()
    started = time.perf_counter()
    plan = build_plan(spec)
    built_s = time.perf_counter() - started
    started = time.perf_counter()
    summary = summarize(plan, set())
    shown_s = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "cells": summary.cells,
                "stages": summary.stages,
                "naive_runs": summary.naive_runs,
                "units": summary.units,
                "build_s": round(built_s, 2),
                "limit_s": LIMIT_S,
                "summarize_s": round(shown_s, 2),
                "peak_mib": peak // 2**20,
                "limit_mib": LIMIT_BYTES // 2**20,
            }
        )
    )
    return int(built_s > LIMIT_S or peak > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
