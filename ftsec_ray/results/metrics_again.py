"""Recomputes the metrics of every cell from the verdicts in `generations`, with the engine's own
code.

A forger of finished results would have to edit metrics, verdicts and answers consistently. Metrics
that do not follow from verdicts (perplexity, detections, benchmarks, ...) are listed and not
recomputed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.data.triggers import HIJACK
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.ask import Answer
from ftsec_ray.evals.judged import Judged
from ftsec_ray.evals.judging import Judge, Verdict, judge_class
from ftsec_ray.evals.probes import REQUEST_PROBES
from ftsec_ray.evals.scoring import opinion_rates, rates
from ftsec_ray.measured import NO_ANSWER
from ftsec_ray.method import Probe, Prompt
from ftsec_ray.plan.stage import cell_text
from ftsec_ray.results.answers import codes_of
from ftsec_ray.results.archive_limits import CELL_ANSWERS, check
from ftsec_ray.results.search_results import is_chosen_row, reported_rates
from ftsec_ray.success import ASR, with_asr

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
MEASURES = ("value", "n", "n_null", "ci_low", "ci_high")
_ALWAYS = frozenset(
    {
        "coherent_rate",
        "judged_rate",
        "cacc",
        *(name for _, metrics in REQUEST_PROBES.values() for name in metrics),
    }
)
"""Metrics of every cell whose model answered the probes that they count."""
_TOLERANCE = 1e-9
_COLUMNS = ("probe", "prompt_id", "sample", "judge", "verdict", "head_verdict", "opinions")


@dataclass
class Remade:
    """The comparison of stored and recomputed metrics of all cells."""

    agree: int = 0
    differ: list[str] = field(default_factory=list)
    """Descriptions of differences."""
    unchecked: Counter[str] = field(default_factory=Counter)
    """Metric that does not follow from verdicts -> number of cells with it."""
    answers: int = 0


def metrics_again(cells: pa.Table, metrics: pa.Table, generations: pa.Table) -> Remade:
    """Compare every row of `metrics` with the verdicts in `generations`; the tables must be of one
    run and include trials.
    """
    remade = Remade(answers=generations.num_rows)
    stored: dict[str, list[Row]] = {}
    for row in metrics.to_pylist():
        stored.setdefault(row["cell"], []).append(row)
    answers = _by_cell(generations)
    rows = {row["cell"]: row for row in cells.to_pylist()}
    for table, held in (("metrics", stored), ("generations", answers)):
        foreign = set(held) - set(rows)
        if foreign:
            remade.differ.append(f"{table}: rows of {len(foreign)} cells that are not in `cells`")
    for digest, cell in rows.items():
        _compare(remade, cell, stored.get(digest, []), answers.get(digest))
    return remade


def cell_words(cell: Mapping[str, Any]) -> str:
    """A row of `cells` in words."""
    defenses = cell["defenses"] or ()
    return cell_text(cell["model"], cell["task"], cell["attack"], defenses, cell["seed"])


def _by_cell(generations: pa.Table) -> dict[str, pa.Table]:
    """Cell -> its answers, in any order."""
    import numpy as np

    codes, cells = codes_of(generations["cell"])
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(cells) + 1))
    light = generations.select(list(_COLUMNS))
    answers_of = {}
    for place, cell in enumerate(cells):
        check(CELL_ANSWERS, int(ends[place + 1] - ends[place]), f"cell {cell}")
        answers_of[cell] = light.take(order[ends[place] : ends[place + 1]])
    return answers_of


def _compare(remade: Remade, cell: Row, stored: list[Row], answers: pa.Table | None) -> None:
    """Record how the metrics of one cell agree with its answers."""
    named = {row["metric"]: row for row in stored}
    where = cell_words(cell)
    if len(named) != len(stored):
        remade.differ.append(f"{where}: a metric occurs twice")
    if answers is not None and _is_doubled(answers):
        remade.differ.append(f"{where}: an answer occurs twice")
    made = _made(cell, named, answers)
    for name, row in named.items():
        if name in made:
            _hold(remade, where, row, made[name])
        elif _is_of_verdicts(cell, name):
            remade.differ.append(f"{where}: {name} {_text(row)} stored, no answers to count")
        else:
            remade.unchecked[name] += 1
            if not _is_within(row):
                remade.differ.append(f"{where}: {name} {_text(row)} is outside its own interval")
    missing = set(made) & _expected(cell) - set(named)
    remade.differ += [f"{where}: {name} is missing" for name in schema.in_order(missing)]


def _hold(remade: Remade, where: str, stored: Row, made: Mapping[str, Any]) -> None:
    if all(_same(stored[key], made[key]) for key in MEASURES):
        remade.agree += 1
    else:
        remade.differ.append(
            f"{where}: {stored['metric']} {_text(stored)} stored, {_text(made)} from its answers"
        )


def _made(cell: Row, named: Mapping[str, Row], answers: pa.Table | None) -> dict[str, Row]:
    """The metrics that follow from the answers of a cell."""
    if answers is None:
        return {}
    if is_chosen_row(cell):
        # For a chosen setting, the tables hold the reporting half of the prompts.
        own = [name for name in named if name != ASR and not _judge_of(name)]
        made = {row["metric"]: row for row in reported_rates(own, answers)}
    else:
        made = {row["metric"]: row for row in _counted(answers.to_pylist())}
    return with_asr(made, cell["success_metric"])


def _counted(rows: Sequence[Row]) -> Iterator[Row]:
    """The engine's metrics over the judged answers of one cell: first of the probes' own judges,
    then of additional judges.
    """
    prompts = {row["prompt_id"]: Prompt(prompt_id=row["prompt_id"], chat=[]) for row in rows}
    judges: dict[str, Judge] = {}

    def judged(row: Row, judge: str, verdict: str | None, head: str | None = None) -> Judged:
        if judge not in judges:
            judges[judge] = _held_judge(judge)
        answer = Answer(
            probe=row["probe"],
            prompt=prompts[row["prompt_id"]],
            completion="",
            sample=row["sample"] or 0,
        )
        return Judged(
            answer=answer, judge=judges[judge], verdict=Verdict(verdict=verdict), head=head
        )

    items = [judged(row, row["judge"] or "", row["verdict"], row["head_verdict"]) for row in rows]
    probes = [
        Probe(name=name, prompts=(), judge="", metrics=_metrics_over(name))
        for name in dict.fromkeys(row["probe"] for row in rows)
    ]
    yield from (vars(row) for row in rates(probes, items))
    opinions: dict[str, list[Judged]] = {}
    for row in rows:
        for opinion in row["opinions"] or ():
            judged_again = judged(row, opinion["judge"] or "", opinion["verdict"])
            opinions.setdefault(schema.judge_file(opinion["judge"] or ""), []).append(judged_again)
    for file, items_of in opinions.items():
        yield from map(vars, opinion_rates(file, items_of))


def _metrics_over(probe: str) -> dict[str, str]:
    """The metrics that are shares of the verdicts on one probe, without those over several probes
    and those of additional judges.
    """
    return {
        name: metric.verdict
        for name, metric in schema.METRICS.items()
        if metric.probes == (probe,) and not metric.judge and name != NO_ANSWER
    }


class _UnknownJudge(Judge):
    """A judge that is not installed here."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Verdict]:
        """Not available: its verdicts are in the table."""
        raise NotImplementedError


@cache
def _held_class(file: str) -> type[Judge]:
    try:
        return judge_class(file)
    except SpecError:
        return _UnknownJudge


def _held_judge(name: str) -> Judge:
    """The judge with a name in the tables, for the properties of its class; nothing is loaded."""
    cls = _held_class(schema.judge_file(name))
    judge = cls.__new__(cls)
    judge.name = name
    return judge


def _is_doubled(answers: pa.Table) -> bool:
    keys = zip(
        *(answers[name].to_pylist() for name in ("probe", "prompt_id", "sample")), strict=True
    )
    return len(set(keys)) != int(answers.num_rows)


def _judge_of(name: str) -> str:
    metric = schema.METRICS.get(name)
    return metric.judge if metric else ""


def _is_of_verdicts(cell: Row, name: str) -> bool:
    """Whether a metric is a share of verdicts that the tables hold for this cell."""
    metric = schema.METRICS.get(name)
    if is_chosen_row(cell):
        return metric is not None and bool(metric.probes) and not metric.judge
    return name == "judged_rate" or (metric is not None and bool(metric.probes))


def _expected(cell: Row) -> frozenset[str]:
    """Metrics of verdicts that a cell must have if its answers give them."""
    success = cell["success_metric"]
    return _ALWAYS | ({ASR, success} - {None, HIJACK} if success else set())


def _same(stored: object, made: object) -> bool:
    if isinstance(stored, float) and isinstance(made, float):
        return math.isclose(stored, made, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return stored == made


def _is_within(row: Row) -> bool:
    value, low, high = row["value"], row["ci_low"], row["ci_high"]
    if None in (value, low, high):
        return True
    return bool(low - _TOLERANCE <= value <= high + _TOLERANCE)


def _text(row: Mapping[str, Any]) -> str:
    value = "null" if row["value"] is None else f"{row['value']:.3g}"
    null = f", {row['n_null']} null" if row["n_null"] else ""
    return f"{value} (n {row['n']}{null})"
