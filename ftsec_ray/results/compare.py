"""The `comparisons` table: which stack of defenses is better than which, against one attack on one
model.

Every stack is compared with `none`; every stack of several defenses with its best single member;
and every stack with the stacks in which a control replaces one member: a trivial control
(`IS_CONTROL`, for defenses that act at the same hook), or the member with its own mechanism
switched off (`CONTROL`). A stack that is there as such a control of another one is compared with
`none` and with its best member, but with no control. If a sweep also measures before the fine-tune,
every point is compared with itself before it (kind `before`), which shows the effect of the
fine-tune. Both sides answered the same prompts in the same seeds; `paired` describes the tests. The
best member is the coherent one with the lowest attack success in these same results, which makes
"better" than it harder to reach and "worse" a little easier.

Gibberish is never safe: if one side mostly answers gibberish, or if at least half of a drop in
fulfilled requests is due to requests that now get gibberish, the conclusion is `incoherent`.

A pair that cannot be tested has a row with the reason; a pair without any metric has one row for
its attack success.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.config.sweep import BEFORE
from ftsec_ray.measured import NO_ANSWER
from ftsec_ray.results.answers import GIBBERISH, Answers, answers_of
from ftsec_ray.results.paired import ALPHA, Correction, Paired, corrected, detectable, paired, plain
from ftsec_ray.results.points import GridPoint, points_of
from ftsec_ray.success import ASR, source_of

if TYPE_CHECKING:
    import pyarrow as pa

MOMENT = "before"
"""Kind of a comparison with the same cells before the fine-tune."""
CONTROL = "control"
"""Kind of a comparison with a control in the place of one member."""
MEMBER = "member"
"""Kind of a comparison with the best single member of a stack."""
Member = tuple[str, str]
"""Name and parameters (JSON) of one defense."""
Stack = tuple[Member, ...]
Row = dict[str, Any]
CHUNK = 4_000_000
"""Answers compared in one batch, to limit memory."""


def compare(
    cells: pa.Table,
    metrics: pa.Table,
    generations: pa.Table,
    *,
    hooks: Mapping[str, Sequence[str]],
    controls: Sequence[str],
    own_controls: Mapping[str, Mapping[str, Any]] | None = None,
    correction: Correction = "bh",
) -> pa.Table:
    """The comparisons of a run (schema.comparisons), sorted.

    Args:
        cells: Table `cells` of the run.
        metrics: Table `metrics` of the run.
        generations: Table `generations` of the run; its verdicts count, its texts may be missing.
        hooks: Defense -> the hooks that it defines.
        controls: Defenses that are trivial controls.
        own_controls: Defense -> parameters that switch off its own mechanism.
        correction: Benjamini-Hochberg, or Holm.
    """
    import pyarrow as pa

    points = points_of(cells.to_pylist(), metrics.to_pylist())
    grid = _Grid(points, hooks, frozenset(controls), own_controls or {})
    answers = answers_of(cells["cell"].to_pylist(), generations, points)
    rows = [row for pair in grid.pairs() for row in _rows(grid, answers, pair)]
    _test(rows, answers, correction)
    _conclude(rows)
    columns = schema.comparisons().names
    compared = [{name: row.shown[name] for name in columns} for row in rows]
    compared.sort(
        key=lambda row: (
            [row[name] or "" for name in ("model", "task", "attack", "attack_params")]
            + [
                repr(row[name])
                for name in ("defenses", "defense_params", "kind", "against", "against_params")
            ]
            + [row["metric"]]
        )
    )
    return pa.Table.from_pylist(compared, schema.comparisons())


@dataclass(frozen=True)
class _Pair:
    """Two stacks against one attack on one model."""

    place: tuple[Any, ...]
    """model, task, attack, attack_params."""
    kind: str
    stack: Stack
    against: Stack

    @property
    def other_place(self) -> tuple[Any, ...]:
        """The place of `against`: the same, or that of the model before the fine-tune."""
        model, *others = self.place
        return (f"{model}{BEFORE}", *others) if self.kind == MOMENT else self.place


@dataclass
class _Grid:
    """The points of a run by place and stack."""

    points: Sequence[GridPoint]
    hooks: Mapping[str, Sequence[str]]
    controls: frozenset[str]
    own_controls: Mapping[str, Mapping[str, Any]]

    @cached_property
    def arms(self) -> dict[tuple[Any, ...], dict[Stack, GridPoint]]:
        """Place -> stack -> its point."""
        arms: dict[tuple[Any, ...], dict[Stack, GridPoint]] = defaultdict(dict)
        for point in self.points:
            arms[point.model, point.task, point.attack, point.cell["attack_params"]][
                point.stack
            ] = point
        return arms

    def pairs(self) -> Iterator[_Pair]:
        """Every pair in the plan of this run."""
        for place, stacks in self.arms.items():
            controls = self._controls_in(stacks)
            for stack in stacks:
                before = _Pair(place, MOMENT, stack, stack)
                if stack in self.arms.get(before.other_place, ()):
                    yield before
                if not self._acts(stack):
                    continue
                if () in stacks:
                    yield _Pair(place, "none", stack, ())
                best = self._best_member(place, stack)
                if best is not None:
                    yield _Pair(place, MEMBER, stack, best)
                for other in controls[stack]:
                    yield _Pair(place, CONTROL, stack, other)

    def _controls_in(self, stacks: Iterable[Stack]) -> dict[Stack, list[Stack]]:
        """Stack -> the others that hold a control of it; none for a stack that is one of the others
        with the mechanism of a member switched off.
        """
        found = {
            stack: [other for other in stacks if self._is_controlled_by(stack, other)]
            for stack in stacks
        }
        own = {
            other
            for stack, others in found.items()
            for other in others
            if _names(other) == _names(stack)
        }
        return {stack: [] if stack in own else others for stack, others in found.items()}

    def _acts(self, stack: Stack) -> bool:
        """Whether a stack changes the model or its answers: detectors alone do not."""
        return any(set(self.hooks.get(name, ("?",))) - {"inspect"} for name, _ in stack)

    def _best_member(self, place: tuple[Any, ...], stack: Stack) -> Stack | None:
        """The member with the lowest attack success; incoherent members come last, and members
        without a result after them.
        """
        if len(stack) < 2:
            return None
        stacks = self.arms[place]

        def rank(single: Stack) -> tuple[bool, bool, float]:
            success = stacks[single].value()
            return (
                success is None,
                stacks[single].is_incoherent,
                0.0 if success is None else success.value,
            )

        return min(
            ((member,) for member in stack if (member,) in stacks and self._acts((member,))),
            key=rank,
            default=None,
        )

    def _is_controlled_by(self, stack: Stack, other: Stack) -> bool:
        """Whether `other` is the stack with a control in place of one member."""
        if len(stack) != len(other):
            return False
        differ = [pair for pair in zip(stack, other, strict=True) if pair[0] != pair[1]]
        if len(differ) != 1:
            return False
        (name, params), (other_name, other_params) = differ[0]
        if name == other_name:
            return self._is_switched_off(name, params, other_params)
        return (
            name not in self.controls
            and other_name in self.controls
            and bool(set(self.hooks.get(name, ())) & set(self.hooks.get(other_name, ())))
        )

    def _is_switched_off(self, name: str, params: str, other: str) -> bool:
        """Whether `other` are the parameters of a defense with its own mechanism switched off."""
        off = self.own_controls.get(name)
        return off is not None and {**json.loads(params), **off} == json.loads(other)


def _names(stack: Stack) -> list[str]:
    return [name for name, _ in stack]


@dataclass
class _Row:
    """A row while it is computed."""

    shown: Row
    source: str = ""
    """The metric whose answers are compared."""
    lines: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Rows of the matrix on both sides, one per seed; empty if nothing can be tested."""
    incoherent: tuple[str, ...] = ()
    """Sides that mostly answer gibberish."""
    gibberish: float = 0.0
    """Rise in the share of forbidden requests that get gibberish or no answer, if the metric is the
    share that are fulfilled.
    """
    pair: _Pair | None = None
    is_success: bool = False
    """Whether the metric is the success of the attack."""

    @property
    def test(self) -> _Test:
        """What identifies the test of this row: rows of equal answers of a pair share it."""
        return self.pair, self.source


_Test = tuple[_Pair | None, str]


_EMPTY = dict.fromkeys(
    (
        "rate",
        "rate_against",
        "effect",
        "ci_low",
        "ci_high",
        "n_prompts",
        "n_dropped",
        "n_null",
        "n_null_against",
        "test",
        "p",
        "q",
        "detectable",
        "note",
    )
)


def _rows(grid: _Grid, answers: Answers, pair: _Pair) -> Iterator[_Row]:
    """The rows of a pair, one per metric of either side."""
    points = grid.arms[pair.place][pair.stack], grid.arms[pair.other_place][pair.against]
    names = {name for point in points for name in point.values} - set(schema.ABOUT_DEFENSES)
    names = names or {points[0].success_metric}
    planned = len({seed for point in points for seed in point.seeds.values()})
    for metric in [name for name in schema.in_order(names) if name in schema.METRICS]:
        shared = sorted(set.intersection(*(set(point.runs(metric)) for point in points)))
        sides = [[point.cell_of[seed] for seed in shared] for point in points]
        incoherent = tuple(
            who
            for who, point in zip(("the stack", "`against`"), points, strict=True)
            if (share := _mean(point, "coherent_rate", shared)) is not None
            and share < schema.INCOHERENT_BELOW
        )
        head = dict(zip(("model", "task", "attack", "attack_params"), pair.place, strict=True))
        row = {
            **head,
            "defenses": [name for name, _ in pair.stack],
            "defense_params": points[0].cell["defense_params"],
            "against": [name for name, _ in pair.against],
            "against_params": points[1].cell["defense_params"],
            "kind": pair.kind,
            "metric": metric,
            "better": schema.METRICS[metric].better,
            **_EMPTY,
            "n_seeds": len(shared),
            "conclusion": "not tested",
            "utility": "not tested",
            **{name: _mean(points[0], name, shared) for name in schema.UTILITY},
        }
        if shared:
            row |= _means(points, metric, shared)
            row["note"] = (
                f"{len(shared)} of {planned} seeds have both" if len(shared) < planned else None
            )
        source = _source(points[0], answers, metric, sides)
        why = _untested(points, answers, metric, source, sides)
        if why:
            row["note"] = why
        lines = (
            ((), ())
            if why
            else (
                tuple(answers.line[cell] for cell in sides[0]),
                tuple(answers.line[cell] for cell in sides[1]),
            )
        )
        unanswered = sum(answers.rise(name, lines) for name in (GIBBERISH.name, NO_ANSWER))
        gibberish = unanswered if source == "harmful_rate" else 0.0
        is_success = metric in (ASR, points[0].cell["success_metric"])  # null: no attack
        yield _Row(row, source, lines, incoherent, gibberish, pair, is_success)


def _mean(point: GridPoint, metric: str, seeds: Sequence[int]) -> float | None:
    """Mean of a metric over those of the seeds that have it."""
    runs = point.runs(metric)
    known = [runs[seed].value for seed in seeds if seed in runs]
    return fmean(known) if known else None


def _means(points: Sequence[GridPoint], metric: str, seeds: Sequence[int]) -> Row:
    runs = [[point.runs(metric)[seed] for seed in seeds] for point in points]
    rate, against = (fmean(run.value for run in side) for side in runs)
    nulls = [[run.n_null for run in side if run.n_null is not None] for side in runs]
    return {
        "rate": rate,
        "rate_against": against,
        "effect": rate - against,
        "n_null": sum(nulls[0]) if nulls[0] else None,
        "n_null_against": sum(nulls[1]) if nulls[1] else None,
    }


def _source(point: GridPoint, answers: Answers, metric: str, sides: Sequence[Sequence[str]]) -> str:
    """The metric that holds the verdicts of a metric."""
    if any(answers.asked(cell, metric) for side in sides for cell in side):
        return metric
    return source_of(metric, point.success_metric)


def _untested(
    points: Sequence[GridPoint],
    answers: Answers,
    metric: str,
    source: str,
    sides: Sequence[Sequence[str]],
) -> str | None:
    """Why a pair cannot be tested; None if it can."""
    if not sides[0]:
        lacks = {
            who: point.unjudged.get(metric)
            for who, point in zip(("the stack", "`against`"), points, strict=True)
            if metric not in point.values
        }
        what = "no judged answer" if all(lacks.values()) else "no result"
        return f"{what} of {' and of '.join(lacks)}" if lacks else "no seed has both sides"
    if not schema.METRICS[metric].probes:
        return "not a share of verdicts per prompt"
    cells = [cell for side in sides for cell in side]
    if not all(answers.asked(cell, source) for cell in cells):
        return "no verdicts per prompt are stored"
    if any((cell, source) in answers.foreign for cell in cells) or any(
        _value(point, metric, cell) != _value(point, source, cell)
        for point, side in zip(points, sides, strict=True)
        for cell in side
    ):
        return "the stored verdicts do not give this metric"
    return None


def _value(point: GridPoint, metric: str, cell: str) -> tuple[float, int | None] | None:
    run = point.values.get(metric, {}).get(cell)
    return None if run is None else (run.value, run.n)


_Results = list[tuple[Paired, int, list[list[_Row]]]]
"""Results of comparisons, the number of seeds, and the rows of each comparison."""


def _test(rows: Sequence[_Row], answers: Answers, correction: Correction) -> None:
    """Test each set of answers once, and correct for multiple tests: over all tests of attack
    success, which a sweep is made to compare, and apart from them over all others.
    """
    tested = _tested([row for row in rows if row.lines[0]], answers)
    successes = {row.test for row in rows if row.is_success}
    for is_success in (True, False):
        family: _Results = [
            (
                result,
                seeds,
                [[r for r in same if (r.test in successes) == is_success] for same in held],
            )
            for result, seeds, held in tested
        ]
        _correct(family, correction)


def _tested(rows: Iterable[_Row], answers: Answers) -> _Results:
    """Every comparison that rows ask for, made once."""
    import numpy as np

    groups: dict[tuple[str, int], dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Row]]] = (
        defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        groups[row.source, len(row.lines[0])][row.lines].append(row)
    results: _Results = []
    for (source, seeds), asked in groups.items():
        matrix, wanted = answers.hits[source], list(asked)
        step = max(1, CHUNK // (2 * seeds * matrix.shape[1]))
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            result = paired(
                matrix[np.array([first for first, _ in part])],
                matrix[np.array([second for _, second in part])],
            )
            results.append((result, seeds, [asked[lines] for lines in part]))
    return results


def _correct(results: _Results, correction: Correction) -> None:
    """Write the results of a family into its rows, with the corrected p."""
    import numpy as np

    family: dict[_Test, tuple[float, float]] = {}
    for result, seeds, held in results:
        _enter(result, seeds, held, family)
    p, least_p = np.array(list(family.values()), dtype=float).reshape(-1, 2).T
    q, needed = corrected(p, least_p, correction)
    q_of = dict(zip(family, q.tolist(), strict=True))
    for result, seeds, held in results:
        smallest = detectable(result, seeds, needed)
        for index, same in enumerate(held):
            for row in same:
                row.shown["q"] = q_of.get(row.test)
                row.shown["detectable"] = plain(smallest[index])


def _enter(
    result: Paired,
    seeds: int,
    held: Sequence[Sequence[_Row]],
    family: dict[_Test, tuple[float, float]],
) -> None:
    """Write the results into their rows, and every p, with the least that it could be, once into
    the family: `asr` and the metric that it is derived from are the same test.
    """
    for index, same in enumerate(held):
        n, p = int(result.prompts[index]), plain(result.p[index])
        for row in same:
            row.shown |= {"n_prompts": n, "n_dropped": int(result.dropped[index])}
            if p is None:
                row.shown["note"] = "no prompt was judged on both sides in every seed"
                continue
            row.shown |= {
                "rate": float(result.rate[index]),
                "rate_against": float(result.rate_against[index]),
                "effect": float(result.effect[index]),
                "ci_low": float(result.low[index]),
                "ci_high": float(result.high[index]),
                "p": p,
                "test": "mcnemar_exact" if seeds == 1 else "sign_flip_and_t",
            }
            family[row.test] = p, float(result.least_p[index])


def _conclude(rows: Sequence[_Row]) -> None:
    """The conclusions: first of each row, then on the utility of its pair."""
    lost: dict[_Pair | None, list[str]] = defaultdict(list)
    tested: set[_Pair | None] = set()
    for row in rows:
        shown = row.shown
        if shown["q"] is not None:
            is_lower = shown["effect"] < 0
            good = is_lower == (shown["better"] == "lower")
            shown["conclusion"] = (
                "no difference shown" if shown["q"] > ALPHA else "better" if good else "worse"
            )
        reason = ""
        if row.incoherent and shown["metric"] in schema.SAFETY:
            reason = f"{' and '.join(row.incoherent)} mostly answers gibberish"
        elif shown["conclusion"] == "better" and row.gibberish >= -shown["effect"] / 2 > 0:
            reason = (
                f"{row.gibberish:.2f} more of the forbidden requests get gibberish or no answer,"
                " which is at least half of the drop"
            )
        if reason:
            shown["conclusion"] = "incoherent"
            shown["note"] = f"{shown['note']}; {reason}" if shown["note"] else reason
        if shown["metric"] in (*schema.UTILITY, NO_ANSWER) and shown["q"] is not None:
            tested.add(row.pair)
            if shown["conclusion"] == "worse":
                lost[row.pair].append(shown["metric"])
    for row in rows:
        if row.pair in tested:
            row.shown["utility"] = (
                f"worse: {', '.join(lost[row.pair])}" if row.pair in lost else "no loss shown"
            )
