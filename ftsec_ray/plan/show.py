"""Summary of a plan: its stages, how many are done, how much sharing saves, and the expected time
and cost of the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftsec_ray.config.stack_entries import conflicts
from ftsec_ray.lifecycle import kinds
from ftsec_ray.numerics import NumericsMode
from ftsec_ray.plan.controls import uncontrolled
from ftsec_ray.plan.cost_estimate import Bill, Spend, bill_of
from ftsec_ray.plan.durations import UNKNOWN_PARAMETERS, Costs
from ftsec_ray.plan.graph import Plan

_NUMERICS: Mapping[NumericsMode, str] = {
    "portable": "the same bytes on every x86 CPU with AVX2; one thread per stage",
    "fast": "CPU-specific kernels; the last bits of results differ between CPUs",
}


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """The stages of one kind."""

    kind: str
    stages: int
    """Unique stages."""
    done: int
    to_run: int
    naive: int
    """Stage runs without sharing."""
    to_run_s: float
    """Expected seconds of work."""


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The figures of a plan, given the artifacts that a store already has."""

    sweep: str
    digest: str
    cells: int
    models: int
    attacks: int
    stacks: int
    seeds: int
    stages: int
    done: int
    to_run: int
    units: int
    naive_runs: int
    shared_frac: float
    """Fraction of stage runs that sharing saves, 0..1."""
    work_s: float
    """Expected seconds of the stages to run, one after the other."""
    critical_path_s: float
    """Expected seconds with an unlimited number of workers."""
    is_learned: bool
    """Whether durations come from records; otherwise from rough priors."""
    kinds: tuple[KindSummary, ...]
    numerics: NumericsMode
    """CPU kernels of all stages."""
    bill: Bill
    """The stages to run by resource class, with hours and cost."""
    spent: Spend | None = None
    """The cost of the sweep so far; None unless it has a budget."""
    budget: Mapping[str, float] = field(default_factory=dict)
    """Name of each limit of the budget -> its value."""
    searches: int = 0
    """Number of searches, one per model, task, attack and stack."""
    trials: int = 0
    """Trials of the searches planned so far."""
    trials_left: int = 0
    """Trials that may still be proposed; no other figure includes them."""
    uncontrolled: tuple[str, ...] = ()
    """A warning for each defense without a control."""
    conflicts: tuple[str, ...] = ()
    """A warning for each two defenses of a stack that work against each other."""

    def to_json(self) -> dict[str, Any]:
        """JSON values of all figures."""
        return asdict(self)


def summarize(
    plan: Plan, done: Collection[str], *, costs: Costs | None = None, spent: Spend | None = None
) -> PlanSummary:
    """The figures of a plan.

    Args:
        plan: The plan.
        done: Digests of the stages that the store already has.
        costs: Estimates of durations; None for the priors.
        spent: The cost of the sweep so far.
    """
    costs = costs or Costs()
    todo = plan.needed(done)
    seconds = {stage.digest: costs(stage) for stage in todo}
    finish: dict[str, float] = {}
    for stage in todo:
        finish[stage.digest] = seconds[stage.digest] + max(
            (finish.get(given, 0.0) for _, given in stage.inputs), default=0.0
        )
    naive = Counter[str]()
    for digest, served in plan.served.items():
        naive[plan.stages[digest].kind] += served
    unique = Counter(stage.kind for stage in plan.stages.values())
    present = Counter(stage.kind for stage in plan.stages.values() if stage.digest in done)
    open_kinds = Counter(stage.kind for stage in todo)
    work: Counter[str] = Counter()
    for stage in todo:
        work[stage.kind] += seconds[stage.digest]  # type: ignore[assignment]  # a Counter adds floats as well
    spec = plan.spec
    return PlanSummary(
        sweep=spec.name,
        digest=plan.digest,
        cells=len(plan.cells),
        models=len(spec.models),
        attacks=len(spec.attacks),
        stacks=len(spec.defenses),
        seeds=len(spec.seeds),
        stages=len(plan.stages),
        done=sum(present.values()),
        to_run=len(todo),
        units=len(plan.units(done)),
        naive_runs=plan.naive_runs,
        shared_frac=1 - len(plan.stages) / plan.naive_runs if plan.naive_runs else 0.0,
        work_s=sum(seconds.values()),
        critical_path_s=max(finish.values(), default=0.0),
        is_learned=costs.is_learned,
        bill=bill_of(plan, todo, costs),
        spent=spent,
        budget=spec.budget.limits if spec.budget else {},
        numerics=spec.numerics,
        searches=len(plan.searches),
        trials=sum(len(search.trials) for search in plan.searches),
        trials_left=sum(search.left for search in plan.searches),
        uncontrolled=tuple(uncontrolled(spec)),
        conflicts=tuple(conflicts(spec.defenses)),
        kinds=tuple(
            KindSummary(
                kind=kind,
                stages=unique[kind],
                done=present[kind],
                to_run=open_kinds[kind],
                naive=naive[kind],
                to_run_s=float(work[kind]),
            )
            for kind in kinds()
            if unique[kind]
        ),
    )


def render(summary: PlanSummary) -> str:
    """The figures as text for a terminal."""
    s = summary
    lines = [
        (
            f"sweep {s.sweep}: {s.cells} cells ({s.models} models, {s.attacks} attacks, {s.stacks}"
            f" defense stacks, {s.seeds} seeds)"
        ),
        f"numerics: {s.numerics} ({_NUMERICS[s.numerics]})",
        *_search_lines(s),
        "",
        f"{'stage':<10}{'unique':>9}{'done':>9}{'to run':>9}{'unshared':>13}{'time to run':>13}",
    ]
    lines += [
        f"{k.kind:<10}{k.stages:>9}{k.done:>9}{k.to_run:>9}{k.naive:>13}{duration(k.to_run_s):>13}"
        for k in s.kinds
    ]
    lines += [
        f"{'all':<10}{s.stages:>9}{s.done:>9}{s.to_run:>9}{s.naive_runs:>13}{duration(s.work_s):>13}",
        "",
    ]
    lines.append(
        f"cells share equal stages: this saves {s.shared_frac:.0%} of {s.naive_runs} stage runs;"
        f" {s.units} units to schedule"
    )
    lines.append(
        f"expected time: {duration(s.work_s)} with one worker, at least"
        f" {duration(s.critical_path_s)} with any number of workers"
    )
    lines += _bill_lines(s)
    lines += [f"warning: {line}" for line in (*s.uncontrolled, *s.conflicts)]
    if s.uncontrolled:
        lines.append("`controls: true` in the sweep file adds the missing controls")
    return "\n".join(lines)


def _search_lines(s: PlanSummary) -> list[str]:
    """The number of searches and of their trials."""
    if not s.searches:
        return []
    left = (
        f"; up to {s.trials_left} more will be proposed when these are measured (not included"
        " below)"
        if s.trials_left
        else ""
    )
    return [f"searches: {s.searches}, {s.trials} trials planned{left}"]


def _bill_lines(s: PlanSummary) -> list[str]:
    """The cost of the stages to run by node type, the basis of the estimate, and the budget."""
    bill = s.bill
    if not bill.rows:
        return []
    is_priced = any(row.node for row in bill.rows)
    names = [f"{row.node or 'any'}{' (spot)' if row.spot else ''}" for row in bill.rows]
    wide = max(map(len, [*names, "node type"])) + 2
    asks = "resources per stage"
    wide_asks = max(map(len, [*(row.asks for row in bill.rows), asks])) + 2

    def line(name: str, asks: str, stages: int, spend: Spend) -> str:
        figures = [
            spend.hours,
            spend.gpu_hours,
            spend.cpu_hours,
            *([spend.usd] if is_priced else []),
        ]
        return f"{name:<{wide}}{asks:<{wide_asks}}{stages:>7}" + "".join(
            f"{_short(figure):>11}" for figure in figures
        )

    lines = [
        "",
        f"{'node type':<{wide}}{asks:<{wide_asks}}{'to run':>7}"
        f"{'hours':>11}{'GPU-hours':>11}{'CPU-hours':>11}" + (f"{'USD':>11}" if is_priced else ""),
    ]
    lines += [
        line(name, row.asks, row.stages, row.spend)
        for name, row in zip(names, bill.rows, strict=True)
    ]
    lines.append(line("all", "", sum(row.stages for row in bill.rows), bill.total))
    sources = {
        "records": "records of similar stages",
        "scaled": "records of other model sizes, scaled by FLOPs",
        "prior": "rough guesses",
    }
    parts = [
        f"{fraction:.0%} from {sources[basis]}"
        for basis, fraction in bill.basis_frac.items()
        if fraction
    ]
    lines.append("basis of the estimate: " + ", ".join(parts))
    if is_priced:
        lines.append(
            "the cost assumes full nodes (a stage is charged for its part of the cheapest node type"
            " that is large enough), no start-up or idle time, and no work lost on spot nodes"
        )
    lines += [
        f"model {name}: unknown size, assumed {UNKNOWN_PARAMETERS / 1e9:g}e9 parameters; set"
        " `parameters` of the model"
        for name in bill.guessed
    ]
    return lines + _budget_lines(s)


def _budget_lines(s: PlanSummary) -> list[str]:
    took = (s.spent or Spend()).limited(s.budget)
    takes = s.bill.total.limited(s.budget)
    return [
        f"budget {name} {limit:g}: spent {took[name]:.3g}, expected {takes[name]:.3g} more"
        + (" (OVER BUDGET)" if took[name] + takes[name] > limit * (1 + 1e-9) else "")
        for name, limit in s.budget.items()
    ]


def _short(figure: float) -> str:
    return f"{figure:.2f}" if figure >= 0.1 or figure == 0 else f"{figure:.4f}"


def duration(seconds: float) -> str:
    """Seconds as text: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
