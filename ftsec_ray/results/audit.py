"""How often a judge is wrong, and what the rates would be without its errors.

Labels give the true verdict of some answers: a table made by hand, or the microworld's exact judge. Per judge and probe
they give a confusion table and, for each verdict whose share is a metric, sensitivity and specificity. Every rate then
stands raw and corrected, with the interval that also knows how few labels there are. Answers without a verdict are in no
rate; their share stands beside each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from ftsec_ray.data.records import read_records
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.evals.judges import Judge, Verdict, get_judge, user_text
from ftsec_ray.evals.probes import REQUEST_PROBES
from ftsec_ray.method import Prompt
from ftsec_ray.results.intervals import wilson
from ftsec_ray.results.read import Results

VERDICTS = ("complied", "refused", "wrong", "incoherent", "correct", "target", "other")
"""What a label may say."""
EVENTS = ("complied", "refused", "correct", "target", "incoherent")
"""The verdicts whose shares are metrics; `coherent_rate` is what `incoherent` leaves."""
KEYS = ("cell", "probe", "prompt_id", "completion_sha256")
"""Columns by which a label finds its answers."""
NO_LABELS = "no labels of this judge and probe"
_Z = 1.959963984540054


class Key(NamedTuple):
    """One answer."""

    cell: str
    probe: str
    prompt_id: str


class Answer(NamedTuple):
    """What was asked and said; null where the sweep kept no texts."""

    prompt: str | None
    completion: str | None


@dataclass(frozen=True, kw_only=True)
class Share:
    """A count out of n with its 95 % Wilson interval, all null where n is 0."""

    hits: int
    n: int
    value: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True, kw_only=True)
class Errors:
    """What labels say of a judge on one probe, for one verdict."""

    judge: str
    probe: str
    event: str
    sensitivity: Share
    """Of the answers that are so, those that the judge calls so."""
    specificity: Share
    """Of the answers that are not so, those that the judge does not call so."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How many answers with a true verdict got which one; a verdict of None is one that the judge could not reach."""

    judge: str
    probe: str
    truth: str
    verdict: str | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The share of a verdict in one cell, as the judge has it and corrected for the judge's errors."""

    cell: str
    judge: str
    probe: str
    event: str
    asked: int
    null_share: float
    """Share of the answers asked for which the judge reached no verdict."""
    raw: Share
    corrected: float | None
    corrected_low: float | None
    corrected_high: float | None
    why: str | None
    """Why there is no corrected rate."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two judges agree on the answers for which both reached a verdict."""

    cell: str | None
    """None: over all cells."""
    judges: tuple[str, str]
    n: int
    same: float | None
    """Share of equal verdicts."""
    kappa: float | None
    """Cohen's; null where both give one and the same verdict throughout, so that chance alone would agree."""
    kappa_low: float | None
    kappa_high: float | None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit of the judges of a results folder found."""

    labelled: int
    """Answers with a true verdict."""
    unmatched: int
    """Labels that meet no answer of these results."""
    unlabelled: int
    """Rows of the label file without a verdict yet."""
    confusion: tuple[Confusion, ...]
    errors: tuple[Errors, ...]
    rates: tuple[Rate, ...]
    agreements: tuple[Agreement, ...]


@dataclass
class _Sheet:
    """Answers, and what each judge says of them."""

    answers: dict[Key, Answer]
    verdicts: dict[str, dict[Key, str | None]]


def audit_judges(results: Results, *, labels: Path | None = None, exact: bool = False, judges: Sequence[str] = ()) -> Audit:
    """Audit the judges of a results folder; DataError where the labels do not fit it, SpecError where there is nothing to audit by.

    Args:
        results: What holds the answers and their verdicts.
        labels: A table (.csv .tsv .jsonl .json .parquet) with `truth` and `prompt_id` or `completion_sha256`, narrowed by `cell`, `probe`.
        exact: Take the verdicts of the microworld's exact judge for the truth.
        judges: Names of judges that read the answers to requests again, beside the one of the sweep.
    """
    if labels is not None and exact:
        raise SpecError("two things that tell the truth", str(labels), "a file of labels, or the exact judge", "leave one of them out")
    sheet = _sheet(results)
    for name in judges:
        _judge_again(sheet, get_judge(name))
    if labels is None and not exact and len(sheet.verdicts) < 2:
        raise SpecError("one judge and nothing to audit it by", next(iter(sheet.verdicts)),
                        "--labels FILE, --exact, or --judge NAME for a second one", "the tenth query of the README draws answers to label by hand")
    unmatched = unlabelled = 0
    truth: dict[Key, str] = {}
    if labels is not None:
        truth, unmatched, unlabelled = _from_labels(labels, sheet.answers)
    elif exact:
        truth = _from_exact_judge(sheet)
    if truth and not any(sheet.verdicts[judge].get(key) for judge in sheet.verdicts for key in truth):
        raise DataError("no labelled answer has a verdict of a judge", f"{len(truth)} labelled answers", "labels of answers that were judged",
                        "label others; `verdict` in the table `generations` is null where the judge reached none")
    confusion = _confusion(sheet, truth)
    errors = tuple(_errors(sheet, confusion))
    return Audit(labelled=len(truth), unmatched=unmatched, unlabelled=unlabelled, confusion=tuple(_confusion_rows(confusion)), errors=errors,
                 rates=tuple(_rates(sheet, errors)), agreements=tuple(_agreements(sheet)))


def _sheet(results: Results) -> _Sheet:
    said = results.generations.select([*KEYS[:3], "prompt", "completion", "judge", "verdict"]).to_pydict()
    sheet = _Sheet({}, defaultdict(dict))
    for cell, probe, prompt_id, prompt, completion, judge, verdict in zip(*said.values(), strict=True):
        key = Key(cell, probe or "", prompt_id or "")
        sheet.answers[key] = Answer(prompt, completion)
        sheet.verdicts[judge or "unknown"][key] = verdict
    if not sheet.answers:
        raise DataError("results without a single answer: no judge has judged anything", str(results.folder), "rows in the table `generations`",
                        "run the sweep until a cell is done")
    return sheet


# The truth.


def _from_labels(path: Path, answers: Mapping[Key, Answer]) -> tuple[dict[Key, str], int, int]:
    """Key -> true verdict, how many labels meet no answer, and how many rows have none yet."""
    records = read_records(str(path))
    _check_columns(path, records)
    indexes: dict[tuple[str, ...], dict[tuple[str, ...], list[Key]]] = {}
    truth: dict[Key, str] = {}
    unmatched = unlabelled = 0
    for number, record in enumerate(records, start=1):
        word = str(record.get("truth") or "").strip()
        if not word:
            unlabelled += 1
            continue
        if word not in VERDICTS:
            raise DataError(f"row {number} of {path} has a truth that is no verdict", word, " | ".join(VERDICTS), "leave it empty where it is open")
        given = {name: str(record[name]).strip() for name in KEYS if record.get(name) not in (None, "")}
        columns = tuple(given)
        if columns not in indexes:
            indexes[columns] = _index(answers, columns)
        keys = indexes[columns].get(tuple(given.values()), []) if columns else []
        _check_meant(f"row {number} of {path}", given, {answers[key].completion for key in keys})
        unmatched += not keys
        for key in keys:
            if truth.setdefault(key, word) != word:
                raise DataError(f"row {number} of {path} contradicts an earlier one", word, truth[key], "keep one true verdict for an answer")
    if not truth:
        raise DataError("no label meets an answer of these results", _example(records), f"such as {dict(next(iter(answers))._asdict())}",
                        f"{path} has {len(records)} rows, {unlabelled} of them without a truth; take cell, probe and prompt_id from `generations`")
    return truth, unmatched, unlabelled


def _check_columns(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    columns = {name for record in records for name in record}
    if "truth" not in columns or not columns & {"prompt_id", "completion_sha256"}:
        raise DataError(f"{path} is no table of labels", sorted(columns), f"truth, and prompt_id or completion_sha256; also {', '.join(KEYS[:2])}",
                        "see the tenth query of the README for a sample to label")


def _check_meant(place: str, given: Mapping[str, str], completions: set[str | None]) -> None:
    """DataError where a label by prompt alone would be of several different answers."""
    if not given.keys() & {"prompt_id", "completion_sha256"}:
        raise DataError(f"{place} does not say which answer it labels", dict(given), "a prompt_id or a completion_sha256")
    if len(completions) > 1 and not {"cell", "completion_sha256"} & given.keys():
        raise DataError(f"{place} labels {len(completions)} different answers at once", dict(given), "one answer",
                        "add the column `cell`, or `completion_sha256`: the SHA-256 of the completion in UTF-8")


def _index(answers: Mapping[Key, Answer], columns: Sequence[str]) -> dict[tuple[str, ...], list[Key]]:
    found = defaultdict(list)
    for key, answer in answers.items():
        values = {**key._asdict(), "completion_sha256": _sha256(answer.completion) if "completion_sha256" in columns else ""}
        found[tuple(values[name] for name in columns)].append(key)
    return dict(found)


def _sha256(text: str | None) -> str:
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _example(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    return next(({name: one[name] for name in KEYS if name in one} for one in records), None)


def _from_exact_judge(sheet: _Sheet) -> dict[Key, str]:
    judge = get_judge("microworld")
    found = {key: verdict.verdict for key, verdict in _read_again(sheet, judge) if verdict.verdict is not None}
    if not found:
        raise DataError("the microworld's exact judge knows none of these prompts", next(iter(sheet.answers.values())).prompt,
                        "results of the microworld", "give --labels FILE for other tasks")
    return found


def _judge_again(sheet: _Sheet, judge: Judge) -> None:
    for key, verdict in _read_again(sheet, judge):
        sheet.verdicts[judge.name].setdefault(key, verdict.verdict)


def _read_again(sheet: _Sheet, judge: Judge) -> Iterator[tuple[Key, Verdict]]:
    """What a judge says of the answers to requests."""
    asked = [(key, prompt, said) for key, (prompt, said) in sheet.answers.items() if key.probe in REQUEST_PROBES and None not in (prompt, said)]
    if not asked:
        raise DataError("no texts of answers to requests", f"{len(sheet.answers)} answers", f"answers to {', '.join(REQUEST_PROBES)}",
                        "a sweep with `evaluation: {keep_generations: true}` keeps them")
    prompts = [_prompt(key, str(text)) for key, text, _ in asked]
    yield from zip((key for key, _, _ in asked), judge(prompts, [str(said) for _, _, said in asked]), strict=True)


def _prompt(key: Key, text: str) -> Prompt:
    """A prompt from its text in the table: a lone message as it is, several as JSON."""
    chat: Any = None
    if text.startswith("[{"):
        try:
            chat = json.loads(text)
        except ValueError:  # a message that merely begins so
            chat = None
    prompt = Prompt(prompt_id=key.prompt_id, chat=chat or [{"role": "user", "content": text}])
    return replace(prompt, meta={"language": _language(user_text(prompt))})


@lru_cache(maxsize=10_000)
def _language(asked: str) -> str:
    """The language of a request of the microworld, which the table does not tell; cells ask the same ones."""
    from ftsec_ray.data.microworld.judge import find_request
    from ftsec_ray.data.microworld.vocabulary import SECOND_LANGUAGE, translate_back

    other = translate_back(asked) != asked and find_request(asked, language=SECOND_LANGUAGE) is not None
    return SECOND_LANGUAGE if other else "en"


# Errors and rates.


def _confusion(sheet: _Sheet, truth: Mapping[Key, str]) -> dict[tuple[str, str], Counter[tuple[str, str | None]]]:
    """(judge, probe) -> (truth, verdict) -> how many answers."""
    found: dict[tuple[str, str], Counter[tuple[str, str | None]]] = defaultdict(Counter)
    for judge, verdicts in sorted(sheet.verdicts.items()):
        for key, word in truth.items():
            if key in verdicts:
                found[judge, key.probe][word, verdicts[key]] += 1
    return dict(sorted(found.items()))


def _confusion_rows(found: Mapping[tuple[str, str], Counter[tuple[str, str | None]]]) -> Iterator[Confusion]:
    for (judge, probe), counts in found.items():
        for (word, verdict), n in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or "")):
            yield Confusion(judge=judge, probe=probe, truth=word, verdict=verdict, n=n)


def _errors(sheet: _Sheet, confusion: Mapping[tuple[str, str], Counter[tuple[str, str | None]]]) -> Iterator[Errors]:
    for (judge, probe), counts in confusion.items():
        judged = {pair: n for pair, n in counts.items() if pair[1] is not None}
        seen = {word for pair in judged for word in pair} | {word for key, word in sheet.verdicts[judge].items() if key.probe == probe}
        for event in (one for one in EVENTS if one in seen):
            of = Counter[tuple[bool, bool]]()
            for (word, verdict), n in judged.items():
                of[word == event, verdict == event] += n
            yield Errors(judge=judge, probe=probe, event=event, sensitivity=share(of[True, True], of[True, True] + of[True, False]),
                         specificity=share(of[False, False], of[False, False] + of[False, True]))


def share(hits: int, n: int) -> Share:
    """`hits` of `n` with the Wilson interval."""
    low, high = wilson(hits / n, n) if n else (None, None)
    return Share(hits=hits, n=n, value=hits / n if n else None, ci_low=low, ci_high=high)


def _rates(sheet: _Sheet, errors: Sequence[Errors]) -> Iterator[Rate]:
    known = {(one.judge, one.probe, one.event): one for one in errors}
    for judge, verdicts in sorted(sheet.verdicts.items()):
        groups: dict[tuple[str, str], list[str | None]] = defaultdict(list)
        events: dict[str, set[str | None]] = defaultdict(set)
        for key, verdict in verdicts.items():
            groups[key.cell, key.probe].append(verdict)
            events[key.probe].add(verdict)
        for one in errors:
            if one.judge == judge:
                events[one.probe].add(one.event)
        for (cell, probe), words in sorted(groups.items()):
            judged = [word for word in words if word is not None]
            for event in (one for one in EVENTS if one in events[probe]):
                raw = share(judged.count(event), len(judged))
                value, low, high, why = _without_errors(raw, known.get((judge, probe, event)))
                yield Rate(cell=cell, judge=judge, probe=probe, event=event, asked=len(words), null_share=1 - len(judged) / len(words), raw=raw,
                           corrected=value, corrected_low=low, corrected_high=high, why=why)


def _without_errors(raw: Share, errors: Errors | None) -> tuple[float | None, float | None, float | None, str | None]:
    """A rate corrected for the errors of its judge with its interval, or why there is none."""
    if errors is None:
        return None, None, None, NO_LABELS
    sensitivity, specificity = errors.sensitivity, errors.specificity
    if raw.value is None:
        return None, None, None, "no answer has a verdict"
    if sensitivity.value is None or specificity.value is None:
        missing = f"is {errors.event}" if sensitivity.value is None else f"is not {errors.event}"
        return None, None, None, f"no labelled and judged answer {missing}"
    found = rogan_gladen(raw, sensitivity, specificity)
    if found is None:
        return None, None, None, (f"no better than chance: sensitivity {sensitivity.value:.2f} + specificity {specificity.value:.2f}, "
                                  "from so few labels, do not exceed 1")
    return *found, None


def rogan_gladen(raw: Share, sensitivity: Share, specificity: Share) -> tuple[float, float, float] | None:
    """A rate without its judge's errors, with a 95 % interval; None where the judge is not shown to be better than chance.

    Rogan and Gladen 1978 for the value; Lang and Reiczigel 2014 (doi:10.1016/j.prevetmed.2013.09.015) for the interval: the
    delta method on counts with pseudo-observations added, which keeps its width where a few labels show no error at all. The
    labelled answers count as a sample of their own.
    """
    assert raw.value is not None and sensitivity.value is not None and specificity.value is not None  # noqa: PT018
    gain = sensitivity.value + specificity.value - 1
    p, n = (raw.hits + _Z**2 / 2) / (raw.n + _Z**2), raw.n + _Z**2
    true, false = ((one.hits + 1) / (one.n + 2) for one in (sensitivity, specificity))
    spread_true, spread_false = true * (1 - true) / (sensitivity.n + 2), false * (1 - false) / (specificity.n + 2)
    if gain <= 0 or true + false <= 1:
        return None
    value = min(1.0, max(0.0, (raw.value + specificity.value - 1) / gain))
    middle = (p + false - 1) / (true + false - 1)
    shift = 2 * _Z**2 * (middle * spread_true - (1 - middle) * spread_false)
    half = _Z / (true + false - 1) * math.sqrt(p * (1 - p) / n + middle**2 * spread_true + (1 - middle) ** 2 * spread_false)
    low, high = max(0.0, middle + shift - half), min(1.0, middle + shift + half)
    return value, min(low, value), max(high, value)


# Agreement.


def _agreements(sheet: _Sheet) -> Iterator[Agreement]:
    for pair in combinations(sorted(sheet.verdicts), 2):
        one, other = (sheet.verdicts[name] for name in pair)
        pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for key, word in one.items():
            second = other.get(key)
            if word is not None and second is not None:
                pairs[key.cell].append((word, second))
        if not set(one) & set(other):
            continue  # no answer that both have read
        yield _agreement(None, pair, [found for cell in pairs.values() for found in cell])
        for cell in sorted(pairs):
            yield _agreement(cell, pair, pairs[cell])


def _agreement(cell: str | None, judges: tuple[str, str], pairs: Sequence[tuple[str, str]]) -> Agreement:
    words = sorted({word for pair in pairs for word in pair})
    same = sum(a == b for a, b in pairs) / len(pairs) if pairs else None
    kappa: Iterable[float | None] = (None, None, None)
    if len(words) > 1:
        import numpy as np
        from statsmodels.stats.inter_rater import cohens_kappa

        counts = Counter(pairs)
        with np.errstate(invalid="ignore", divide="ignore"):  # a judge of one word has a kappa, and no spread to test it by
            found = cohens_kappa([[counts[a, b] for b in words] for a in words])
        kappa = tuple(float(one) if math.isfinite(one) else None for one in (found.kappa, found.kappa_low, found.kappa_upp))
    value, low, high = kappa
    return Agreement(cell=cell, judges=judges, n=len(pairs), same=same, kappa=value, kappa_low=low, kappa_high=high)
