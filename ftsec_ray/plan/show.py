"""What a plan holds, what of it is done, what sharing saves, and how long the rest will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftsec_ray.lifecycle import kinds
from ftsec_ray.numerics import NumericsMode
from ftsec_ray.plan.controls import uncontrolled
from ftsec_ray.plan.cost_estimate import Bill, Spend, bill_of
from ftsec_ray.plan.durations import UNKNOWN_PARAMETERS, Costs
from ftsec_ray.plan.graph import Plan

_NUMERICS: Mapping[NumericsMode, str] = {
    "portable": "the same bytes on every x86 CPU with AVX2; one thread per stage",
    "fast": "the kernels of each CPU; last bits differ between CPUs",
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
    """Runs if every cell did its stages itself."""
    to_run_s: float
    """Expected seconds of work."""


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The figures of a plan against what a store holds."""

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
    """Share of the naive runs that merging equal stages saves, 0..1."""
    work_s: float
    """Expected seconds of the stages to run, one after the other."""
    critical_path_s: float
    """Expected seconds with any number of workers."""
    is_learned: bool
    """Whether durations come from records; otherwise from priors, which only order the work."""
    kinds: tuple[KindSummary, ...]
    numerics: NumericsMode
    """Which CPU kernels all stages take."""
    bill: Bill
    """The stages to run by what they ask for, with hours and money."""
    spent: Spend | None = None
    """What the sweep took so far; None unless it has a budget."""
    budget: Mapping[str, float] = field(default_factory=dict)
    """Limits of the sweep by what they limit."""
    searches: int = 0
    """Searches of attackers, one per model, task, attack and stack."""
    trials: int = 0
    """Their trials that are planned so far."""
    trials_left: int = 0
    """Their trials that may still be proposed, which no other figure covers."""
    uncontrolled: tuple[str, ...] = ()
    """Defenses that stand in the sweep without a control beside them, in words."""

    def to_json(self) -> dict[str, Any]:
        """JSON values of all figures."""
        return asdict(self)


def summarize(
    plan: Plan, done: Collection[str], *, costs: Costs | None = None, spent: Spend | None = None
) -> PlanSummary:
    """The figures of a plan when the stages `done` are in the store."""
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
        trials=sum(len(one.trials) for one in plan.searches),
        trials_left=sum(one.left for one in plan.searches),
        uncontrolled=tuple(uncontrolled(spec)),
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
        f"{'stage':<10}{'unique':>9}{'done':>9}{'to run':>9}{'if unshared':>13}{'work to do':>13}",
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
        f"sharing equal stages saves {s.shared_frac:.0%} of {s.naive_runs} stage runs; {s.units}"
        " units to schedule"
    )
    lines.append(
        f"work {duration(s.work_s)}; at least {duration(s.critical_path_s)} with any number of"
        " workers"
    )
    lines += _bill_lines(s)
    return "\n".join([*lines, *(f"warning: {line}" for line in s.uncontrolled)])


def _search_lines(s: PlanSummary) -> list[str]:
    """How far the searches of attackers have come."""
    if not s.searches:
        return []
    left = (
        f"; up to {s.trials_left} more will be proposed when these are measured, and are in no"
        " figure below"
        if s.trials_left
        else ""
    )
    return [f"searches: {s.searches}, {s.trials} trials planned{left}"]


def _bill_lines(s: PlanSummary) -> list[str]:
    """The stages to run by machine, what that is taken from, and the budget."""
    bill = s.bill
    if not bill.rows:
        return []
    is_priced = any(row.node for row in bill.rows)
    names = [f"{row.node or 'any'}{' (spot)' if row.spot else ''}" for row in bill.rows]
    wide = max(map(len, [*names, "node type"])) + 2
    asks = "a stage asks for"
    wide_asks = max(map(len, [*(row.asks for row in bill.rows), asks])) + 2

    def line(name: str, asks: str, stages: int, spend: Spend) -> str:
        figures = [
            spend.hours,
            spend.gpu_hours,
            spend.cpu_hours,
            *([spend.usd] if is_priced else []),
        ]
        return f"{name:<{wide}}{asks:<{wide_asks}}{stages:>7}" + "".join(
            f"{_short(one):>11}" for one in figures
        )

    lines = [
        "",
        f"{'node type':<{wide}}{asks:<{wide_asks}}{'to run':>7}"
        f"{'hours':>11}{'GPU-hours':>11}{'CPU-hours':>11}" + (f"{'usd':>11}" if is_priced else ""),
    ]
    lines += [
        line(name, row.asks, row.stages, row.spend)
        for name, row in zip(names, bill.rows, strict=True)
    ]
    lines.append(line("all", "", sum(row.stages for row in bill.rows), bill.total))
    told = {
        "records": "records of like stages",
        "scaled": "records of other sizes, scaled with flops",
        "prior": "priors (rough)",
    }
    lines.append(
        "estimated from "
        + ", ".join(f"{told[one]} {part:.0%}" for one, part in bill.basis_frac.items() if part)
    )
    if is_priced:
        lines.append(
            "assumed: full nodes (a stage pays for its share of the cheapest node type with room),"
            " no start-up or idle time, nothing lost on spot"
        )
    lines += [
        f"model {name}: size unknown, taken as {UNKNOWN_PARAMETERS / 1e9:g}e9 weights; give"
        " `parameters`"
        for name in bill.guessed
    ]
    return lines + _budget_lines(s)


def _budget_lines(s: PlanSummary) -> list[str]:
    took = (s.spent or Spend()).limited(s.budget)
    takes = s.bill.total.limited(s.budget)
    return [
        f"budget {name} {limit:g}: spent {took[name]:.3g}, to come {takes[name]:.3g}"
        + (", MORE THAN ALLOWED" if took[name] + takes[name] > limit * (1 + 1e-9) else "")
        for name, limit in s.budget.items()
    ]


def _short(figure: float) -> str:
    return f"{figure:.2f}" if figure >= 0.1 or figure == 0 else f"{figure:.4f}"


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
