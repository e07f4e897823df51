"""`ftsec plan` and `ftsec status`: a sweep against what the store holds, without torch or ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftsec_ray import api
from ftsec_ray.cli.console import say, say_json
from ftsec_ray.cli.failure_text import Failure, show_failures
from ftsec_ray.code_versions import stage_code
from ftsec_ray.config.yaml_text import redacted_yaml
from ftsec_ray.plan.cost_estimate import shortfall, spent
from ftsec_ray.plan.durations import Costs, learned_from
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.show import duration, render, summarize
from ftsec_ray.plan.stage import Cell, cell_text
from ftsec_ray.registry import name_of
from ftsec_ray.results.read import run_meta
from ftsec_ray.results.remote_results import local_results
from ftsec_ray.results.stage_warnings import StageWarning, lines_of, warnings_of
from ftsec_ray.store.artifact_store import Store


def costs_of(plan: Plan, store: Store, done: set[str]) -> Costs:
    """Durations of stages, learned from records in the store."""
    return Costs(store.records(learned_from(plan, done)).values())


def made_by_other_code(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> Counter[str]:
    """Kind -> stages of a plan that other code of the same VERSION made, by their records."""
    return Counter(
        stage.kind
        for stage in plan.stages.values()
        if stage.digest in records
        and records[stage.digest].get("code")
        != stage_code(stage.kind, stage.params.get("methods", ()))
    )


def other_code_line(other: Counter[str], held: int) -> str:
    """The message about the stages of `made_by_other_code`; the store holds `held` stages."""
    are = "was" if held == 1 else "were"
    return (
        f"{other.total()} of {held} stages in the store {are} made by other code"
        f" ({', '.join(sorted(other))}); they are reused, because their VERSION is unchanged; see"
        " `ftsec verify`"
    )


def other_plan_line(plan: Plan, folder: Path, sweep_text: str | None) -> str | None:
    """The warning that a results folder holds another plan of the same name; None where it does
    not, or only lacks rounds of a search of the same sweep.
    """
    held = run_meta(folder)
    if held is None or held.get("plan") in (None, plan.digest):
        return None
    if plan.spec.searches and held.get("sweep_text") == redacted_yaml(sweep_text or ""):
        return None
    counts = held.get("counts")
    cells = sum(counts.values()) if isinstance(counts, dict) else "?"
    return (
        f"warning: {folder} holds the tables and the report of another plan named"
        f" {plan.spec.name!r} ({str(held['plan'])[:8]}, {cells} cells): running this plan"
        f" ({plan.digest[:8]}, {len(plan.cells)} cells) replaces them. To keep both, change the"
        " `name` of one sweep, or give another --results"
    )


def print_plan(
    sweep: Path,
    *,
    store: str,
    results: str,
    limit: int | None,
    as_json: bool,
    gpu_price: float | None,
) -> None:
    """Print what the plan of the first `limit` cells holds, what of it is done, and what the rest
    takes; nothing is run or written.
    """
    held = Store.open(store)
    whole = api.make_plan(sweep, held)
    plan = api.limited(whole, limit)
    done, records = held.sound(plan.kinds)
    took = spent(plan, records, held.failures()) if plan.spec.budget else None
    folder = api.results_folder(local_results(results), whole.spec.name)
    warning = other_plan_line(whole, folder, api.text_of(sweep))
    if warning:
        say(warning, err=True)
    summary = summarize(plan, done, costs=costs_of(plan, held, done), spent=took)
    gpu_hours = summary.bill.total.gpu_hours
    cost = None if gpu_price is None else gpu_hours * gpu_price
    other, warnings = made_by_other_code(plan, records), warnings_of(plan, records)
    if as_json:
        say_json(
            {
                **summary.to_json(),
                "total": asdict(summary.bill.total),
                "gpu_hours": gpu_hours,
                "cost": cost,
                "made_by_other_code": dict(sorted(other.items())),
                "warnings": [one.as_json() for one in warnings],
            }
        )
        return
    say(render(summary))
    if other:
        say(other_code_line(other, summary.done))
    for line in lines_of(warnings):
        say(line)
    if cost is not None:
        say(f"GPU hours: {gpu_hours:.2f}, at {gpu_price:g} per hour: {cost:.2f}")


def cell_statuses(plan: Plan, done: set[str], failed: set[str]) -> dict[str, str]:
    """Cell digest -> done, failed or pending, from the stages that the store holds."""
    found = {}
    for cell in plan.cells:
        if done.issuperset(cell.answers):
            found[cell.digest] = "done"
        else:
            blocked = any(digest in failed and digest not in done for digest in cell.stages)
            found[cell.digest] = "failed" if blocked else "pending"
    return found


def cell_name(cell: Cell) -> str:
    """A cell in words."""
    trial = (
        f", trial {cell.searched.trial}"
        if cell.searched and cell.searched.trial is not None
        else ""
    )
    stack = [name_of(defense) for defense in cell.defenses]
    names = cell.model.name, cell.task.name, cell.attack_name
    return f"{cell_text(*names, stack, cell.seed)}{trial}"


def print_status(sweep: Path, *, store: str, as_json: bool) -> None:
    """Print which cells of a sweep are done, failed or pending, and why the failed ones failed."""
    held = Store.open(store)
    plan = api.make_plan(sweep, held)
    done, records = held.sound(plan.kinds)
    failures = held.failures()
    statuses = cell_statuses(plan, done, set(failures))
    warnings = warnings_of(plan, records)
    if as_json:
        say_json(_status_json(plan, statuses, failures, warnings))
        return
    counts = Counter(statuses.values())
    summary = summarize(plan, done, costs=costs_of(plan, held, done))
    say(
        f"{plan.spec.name}: {counts['done']} of {len(plan.cells)} cells done, {counts['failed']}"
        f" failed, {counts['pending']} pending; {summary.done} of {summary.stages} stages in"
        f" the store, {summary.to_run} to run ({duration(summary.work_s)} of work)"
    )
    took = spent(plan, records, failures)
    over = shortfall(plan, took, summary.bill) if plan.spec.budget else None
    if over is not None:
        say(f"pending: {over.what}; allowed: {over.want}")
    for line in lines_of(warnings):
        say(line)
    broken = [cell for cell in plan.cells if statuses[cell.digest] == "failed"]
    if broken:
        say()
        show_failures((_failure(cell, plan, failures) for cell in broken), more="--json lists them")


def _first_failure(cell: Cell, failures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return next(failures[digest] for digest in cell.stages if digest in failures)


def _failure(cell: Cell, plan: Plan, failures: dict[str, dict[str, Any]]) -> Failure:
    verdict = _first_failure(cell, failures)
    stage = plan.stages[next(digest for digest in cell.stages if digest in failures)]
    return Failure(
        cell=cell_name(cell),
        stage=" ".join(filter(None, (stage.kind, stage.method))),
        error=str(verdict.get("error") or verdict.get("error_code") or ""),
    )


def _status_json(
    plan: Plan,
    statuses: dict[str, str],
    failures: dict[str, dict[str, Any]],
    warnings: list[StageWarning],
) -> dict[str, Any]:
    cells = []
    for cell in plan.cells:
        row: dict[str, Any] = {
            "cell": cell.digest,
            "name": cell_name(cell),
            "status": statuses[cell.digest],
        }
        if row["status"] == "failed":
            verdict = _first_failure(cell, failures)
            row |= {"error_code": verdict.get("error_code"), "error": verdict.get("error")}
        cells.append(row)
    return {
        "sweep": plan.spec.name,
        "plan": plan.digest,
        "counts": dict(Counter(statuses.values())),
        "warnings": [one.as_json() for one in warnings],
        "cells": cells,
    }
