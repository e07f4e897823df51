"""How often a judge is wrong, and what the rates would be without its errors.

Labels give the true verdict of some answers: a table made by hand, or the microworld's exact judge.
Per judge and probe they give a confusion table and, for each verdict whose share is a metric,
sensitivity and specificity. Every rate is then given raw and corrected, with an interval that also
includes the uncertainty from few labels. Answers without a verdict are in no rate; their share is
given with each.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ftsec_ray import schema
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.evals.judging import get_judge
from ftsec_ray.measured import UNKNOWN, Z95, Utility, wilson
from ftsec_ray.results.points import utilities
from ftsec_ray.results.read import Results
from ftsec_ray.results.truth import (
    Key,
    Sheet,
    from_exact_judge,
    from_labels,
    judge_again,
    read_sheet,
)

EVENTS = ("complied", "refused", "correct", "target", "incoherent", "no_answer")
"""The built-in verdicts whose shares are metrics; `coherent_rate` is 1 minus that of `incoherent`.
"""
NO_EVENT = "any"
"""Takes the place of a verdict if a judge gave none on a whole probe, so that its null verdicts are
still reported.
"""
NO_LABELS = "no labels of this judge and probe"


@dataclass(frozen=True, kw_only=True)
class Share:
    """A count out of n with its 95 % Wilson interval, all null if n is 0."""

    hits: int
    n: int
    value: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of a judge on one probe, for one verdict, according to the labels."""

    judge: str
    probe: str
    event: str
    sensitivity: Share
    """Share of the answers with this true verdict that the judge gives this verdict."""
    specificity: Share
    """Share of the answers with another true verdict that the judge gives another verdict."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Number of answers with a true verdict and a verdict of the judge; None if the judge gave
    none.
    """

    judge: str
    probe: str
    truth: str
    verdict: str | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The share of a verdict in one cell, raw and corrected for the judge's errors."""

    cell: str
    judge: str
    probe: str
    event: str
    asked: int
    null_share: float
    """Share of the answers for which the judge gave no verdict."""
    raw: Share
    corrected: float | None
    corrected_low: float | None
    corrected_high: float | None
    why: str | None
    """Why there is no corrected rate."""
    utility: Utility
    """Utility of the same cell."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two judges agree on the answers for which both gave a verdict."""

    cell: str | None
    """None: over all cells."""
    judges: tuple[str, str]
    n: int
    same: float | None
    """Share of equal verdicts."""
    kappa: float | None
    """Cohen's kappa; null if both judges always give one and the same verdict, because chance alone
    would agree too.
    """
    kappa_low: float | None
    kappa_high: float | None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of an audit of the judges of a results folder."""

    labelled: int
    """Answers with a true verdict."""
    unmatched: int
    """Labels that match no answer of these results."""
    unlabelled: int
    """Rows of the label file that have no true verdict yet."""
    confusion: tuple[Confusion, ...]
    errors: tuple[Errors, ...]
    rates: tuple[Rate, ...]
    agreements: tuple[Agreement, ...]


def audit_judges(
    results: Results, *, labels: Path | None = None, exact: bool = False, judges: Sequence[str] = ()
) -> Audit:
    """Audit the judges of a results folder; DataError if the labels do not fit it, SpecError if
    there is nothing to audit them with.

    Args:
        results: Holds the answers and their verdicts.
        labels: A table (.csv .tsv .jsonl .json .parquet) with `truth` and `prompt_id` or
            `completion_sha256`; `cell` and `probe` narrow it down.
        exact: Whether to take the verdicts of the microworld's exact judge as true.
        judges: Names of judges that read the answers to requests again, besides the sweep's own.
    """
    if labels is not None and exact:
        raise SpecError(
            "both --labels and --exact are given",
            str(labels),
            "either --labels FILE or --exact",
            "remove one of them",
        )
    sheet = read_sheet(results)
    for name in judges:
        judge_again(sheet, get_judge(name))
    if labels is None and not exact and len(sheet.verdicts) < 2:
        raise SpecError(
            "there is only one judge, and nothing to audit it with",
            next(iter(sheet.verdicts)),
            "--labels FILE, --exact, or --judge NAME for a second judge",
            "to label by hand, draw answers with the query 10 of sweeps/READING_RESULTS.md",
        )
    unmatched = unlabelled = 0
    truth: dict[Key, str] = {}
    if labels is not None:
        truth, unmatched, unlabelled = from_labels(labels, sheet.answers)
    elif exact:
        truth = from_exact_judge(sheet)
    if truth and not any(
        sheet.verdicts[judge].get(key) for judge in sheet.verdicts for key in truth
    ):
        raise DataError(
            "no labelled answer has a verdict of a judge",
            f"{len(truth)} labelled answers",
            "labels of answers that were judged",
            "label other answers; in the table `generations`, `verdict` is null if the judge gave"
            " none",
        )
    confusion = _confusion(sheet, truth)
    errors = tuple(_errors(sheet, confusion))
    return Audit(
        labelled=len(truth),
        unmatched=unmatched,
        unlabelled=unlabelled,
        confusion=tuple(_confusion_rows(confusion)),
        errors=errors,
        rates=tuple(_rates(sheet, errors, utilities(results.metrics.to_pylist()))),
        agreements=tuple(_agreements(sheet)),
    )


# Errors and rates.


def _confusion(
    sheet: Sheet, truth: Mapping[Key, str]
) -> dict[tuple[str, str], Counter[tuple[str, str | None]]]:
    """(judge, probe) -> (true verdict, verdict) -> number of answers."""
    counts_of: dict[tuple[str, str], Counter[tuple[str, str | None]]] = defaultdict(Counter)
    for judge, verdicts in sorted(sheet.verdicts.items()):
        for key, word in truth.items():
            if key in verdicts:
                counts_of[judge, key.probe][word, verdicts[key]] += 1
    return dict(sorted(counts_of.items()))


def _confusion_rows(
    counts_of: Mapping[tuple[str, str], Counter[tuple[str, str | None]]],
) -> Iterator[Confusion]:
    for (judge, probe), counts in counts_of.items():
        for (word, verdict), n in sorted(
            counts.items(), key=lambda item: (item[0][0], item[0][1] or "")
        ):
            yield Confusion(judge=judge, probe=probe, truth=word, verdict=verdict, n=n)


def _errors(
    sheet: Sheet, confusion: Mapping[tuple[str, str], Counter[tuple[str, str | None]]]
) -> Iterator[Errors]:
    for (judge, probe), counts in confusion.items():
        judged = {pair: n for pair, n in counts.items() if pair[1] is not None}
        seen = {word for pair in judged for word in pair} | {
            word for key, word in sheet.verdicts[judge].items() if key.probe == probe
        }
        for event in (name for name in _events() if name in seen):
            of = Counter[tuple[bool, bool]]()
            for (word, verdict), n in judged.items():
                of[word == event, verdict == event] += n
            yield Errors(
                judge=judge,
                probe=probe,
                event=event,
                sensitivity=share(of[True, True], of[True, True] + of[True, False]),
                specificity=share(of[False, False], of[False, False] + of[False, True]),
            )


def _events() -> tuple[str, ...]:
    """The verdicts whose shares are metrics, including those of additional judges."""
    return (*EVENTS, *(verdict for verdict in schema.verdicts() if verdict not in schema.VERDICTS))


def share(hits: int, n: int) -> Share:
    """`hits` of `n` with the Wilson interval."""
    low, high = wilson(hits / n, n) if n else (None, None)
    return Share(hits=hits, n=n, value=hits / n if n else None, ci_low=low, ci_high=high)


def _rates(sheet: Sheet, errors: Sequence[Errors], beside: Mapping[str, Utility]) -> Iterator[Rate]:
    known = {(error.judge, error.probe, error.event): error for error in errors}
    for judge, verdicts in sorted(sheet.verdicts.items()):
        groups: dict[tuple[str, str], list[str | None]] = defaultdict(list)
        events: dict[str, set[str | None]] = defaultdict(set)
        for key, verdict in verdicts.items():
            groups[key.cell, key.probe].append(verdict)
            events[key.probe].add(verdict)
        for error in errors:
            if error.judge == judge:
                events[error.probe].add(error.event)
        for (cell, probe), words in sorted(groups.items()):
            judged = [word for word in words if word is not None]
            for event in [name for name in _events() if name in events[probe]] or [NO_EVENT] * (
                events[probe] == {None}
            ):
                raw = share(judged.count(event), len(judged))
                value, low, high, why = _without_errors(raw, known.get((judge, probe, event)))
                yield Rate(
                    cell=cell,
                    judge=judge,
                    probe=probe,
                    event=event,
                    asked=len(words),
                    null_share=1 - len(judged) / len(words),
                    raw=raw,
                    corrected=value,
                    corrected_low=low,
                    corrected_high=high,
                    why=why,
                    utility=beside.get(cell, UNKNOWN),
                )


def _without_errors(
    raw: Share, errors: Errors | None
) -> tuple[float | None, float | None, float | None, str | None]:
    """A rate corrected for the errors of its judge with its interval, or the reason for none."""
    if raw.value is None:
        return None, None, None, "no answer has a verdict"
    if errors is None:
        return None, None, None, NO_LABELS
    sensitivity, specificity = errors.sensitivity, errors.specificity
    if sensitivity.value is None or specificity.value is None:
        missing = f"is {errors.event}" if sensitivity.value is None else f"is not {errors.event}"
        return None, None, None, f"no labelled and judged answer {missing}"
    rate = rogan_gladen(raw, sensitivity, specificity)
    if rate is None:
        return (
            None,
            None,
            None,
            (
                f"no better than chance: sensitivity {sensitivity.value:.2f} + specificity"
                f" {specificity.value:.2f} from these labels are not shown to be above 1"
            ),
        )
    return *rate, None


def rogan_gladen(
    raw: Share, sensitivity: Share, specificity: Share
) -> tuple[float, float, float] | None:
    """A rate without its judge's errors, with a 95 % interval; None if the judge is not shown to be
    better than chance.

    Rogan and Gladen 1978 for the value; Lang and Reiczigel 2014
    (doi:10.1016/j.prevetmed.2013.09.015) for the interval: the delta method on counts with
    pseudo-observations added, which keeps its width even if a few labels show no error. The
    labelled answers count as a separate sample.
    """
    assert raw.value is not None and sensitivity.value is not None and specificity.value is not None  # noqa: PT018
    gain = sensitivity.value + specificity.value - 1
    p, n = (raw.hits + Z95**2 / 2) / (raw.n + Z95**2), raw.n + Z95**2
    true, false = ((side.hits + 1) / (side.n + 2) for side in (sensitivity, specificity))
    spread_true, spread_false = (
        true * (1 - true) / (sensitivity.n + 2),
        false * (1 - false) / (specificity.n + 2),
    )
    if gain <= 0 or true + false <= 1:
        return None
    value = min(1.0, max(0.0, (raw.value + specificity.value - 1) / gain))
    middle = (p + false - 1) / (true + false - 1)
    shift = 2 * Z95**2 * (middle * spread_true - (1 - middle) * spread_false)
    half = (
        Z95
        / (true + false - 1)
        * math.sqrt(p * (1 - p) / n + middle**2 * spread_true + (1 - middle) ** 2 * spread_false)
    )
    low, high = max(0.0, middle + shift - half), min(1.0, middle + shift + half)
    return value, min(low, value), max(high, value)


# Agreement.


def _agreements(sheet: Sheet) -> Iterator[Agreement]:
    for pair in combinations(sorted(sheet.verdicts), 2):
        first, other_judge = (sheet.verdicts[name] for name in pair)
        pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for key, word in first.items():
            second = other_judge.get(key)
            if word is not None and second is not None:
                pairs[key.cell].append((word, second))
        if not set(first) & set(other_judge):
            continue  # no answer that both judges have read
        yield _agreement(None, pair, [words for cell in pairs.values() for words in cell])
        for cell in sorted(pairs):
            yield _agreement(cell, pair, pairs[cell])


def _agreement(
    cell: str | None, judges: tuple[str, str], pairs: Sequence[tuple[str, str]]
) -> Agreement:
    words = sorted({word for pair in pairs for word in pair})
    same = sum(a == b for a, b in pairs) / len(pairs) if pairs else None
    kappa: Iterable[float | None] = (None, None, None)
    if len(words) > 1:
        import numpy as np
        from statsmodels.stats.inter_rater import cohens_kappa

        counts = Counter(pairs)
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # a judge with only one verdict has a kappa, but no variance to test it
            agreement = cohens_kappa([[counts[a, b] for b in words] for a in words])
        kappa = tuple(
            float(number) if math.isfinite(number) else None
            for number in (agreement.kappa, agreement.kappa_low, agreement.kappa_upp)
        )
    value, low, high = kappa
    return Agreement(
        cell=cell,
        judges=judges,
        n=len(pairs),
        same=same,
        kappa=value,
        kappa_low=low,
        kappa_high=high,
    )
