"""Columns of the tables that depend on the plan only, not on what ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.config.yaml_text import read_yaml
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.method import Method
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.stage import Cell
from ftsec_ray.registry import name_of
from ftsec_ray.results.search_results import attack_params
from ftsec_ray.success import success_metric


def cell_columns(sweep: str, cell: Cell) -> dict[str, Any]:
    """The columns of a row of `cells` that identify the cell."""
    return {
        "cell": cell.digest,
        "sweep": sweep,
        "model": cell.model.name,
        "family": cell.model.family,
        "aligned": cell.model.aligned,
        "measured": cell.model.measured,
        "task": cell.task.name,
        "attack": cell.attack_name,
        "attack_phase": cell.attack.PHASE,
        "attack_params": attack_params(cell),
        "success_metric": success_metric(cell.attack),
        "defenses": [name_of(defense) for defense in cell.defenses],
        "defense_phases": [defense.PHASE for defense in cell.defenses],
        "defense_params": canonical(list(cell.defenses)),
        "seed": cell.seed,
        "search": cell.searched.key if cell.searched else None,
        "search_trial": cell.searched.trial if cell.searched else None,
    }


def stage_columns(plan: Plan, digest: str) -> dict[str, Any]:
    """The columns of a row of `stages` that identify the stage."""
    stage = plan.stages[digest]
    return {
        "digest": digest,
        "kind": stage.kind,
        "method": stage.method,
        "cells_served": plan.cells_of(digest),
    }


def defense_facts(spec: SweepSpec) -> dict[str, Any]:
    """The properties of a sweep's defenses in `run.json`, for the comparisons; values as JSON has
    them, because they are compared with parameters that were read from it.
    """
    defenses = {name_of(defense): type(defense) for stack in spec.defenses for defense in stack}
    return {
        "defense_hooks": {name: list(hooks_of(defense)) for name, defense in defenses.items()},
        "controls": sorted(name for name, defense in defenses.items() if defense.IS_CONTROL),  # type: ignore[attr-defined]
        "own_controls": {
            name: json.loads(json.dumps(dict(defense.CONTROL)))
            for name, defense in defenses.items()
            if defense.CONTROL
        },
    }


def sweep_fields(spec: SweepSpec) -> str:
    """The sweep's own fields as JSON, methods by name; without resources."""

    def named(method: Method) -> Any:
        return {name_of(method): json.loads(canonical(method))}

    plain = {
        "name": spec.name,
        "question": spec.question,
        "models": [json.loads(canonical(one)) for one in spec.models],
        "task": [json.loads(canonical(one)) for one in spec.tasks],
        "attacks": [named(one) for one in spec.attacks],
        "searches": [
            {"attack": named(one.attack), **json.loads(canonical(one.search))}
            for one in spec.searches
        ],
        "defenses": [[named(one) for one in stack] for stack in spec.defenses],
        "seeds": list(spec.seeds),
        "exclude": [json.loads(canonical(one)) for one in spec.exclude],
        "training": json.loads(canonical(spec.training)),
        "evaluation": json.loads(canonical(spec.evaluation)),
    }
    return json.dumps(plain, indent=1, ensure_ascii=False)


def facts_that_differ(plan: Plan, meta: Mapping[str, Any], sweep_text: str) -> list[str]:
    """Keys of `run.json` whose value about the sweep differs from the sweep: the digest of a plan
    does not cover the question, the budget or the resources.

    Args:
        plan: Plan of the sweep.
        meta: Content of `run.json`.
        sweep_text: The sweep file.
    """
    planned = {
        "sweep": plan.spec.name,
        "question": plan.spec.question or "",
        **defense_facts(plan.spec),
    }
    stored = {**{name: meta.get(name) for name in planned}, "question": meta.get("question") or ""}
    wrong = [name for name, value in planned.items() if stored[name] != value]
    kept = str(meta.get("sweep_text"))
    if kept not in (sweep_text, sweep_fields(plan.spec)) and _values(kept) != _values(sweep_text):
        wrong.append("sweep_text")
    return wrong


def _values(text: str) -> object:
    """The values in a sweep file, without its comments."""
    return read_yaml(text, Faults("sweep"))
