"""The verdicts of judges on the answers of a sweep, and the true verdicts: from a table of labels,
or from the microworld's exact judge.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ftsec_ray import schema
from ftsec_ray.data.cell_values import is_missing
from ftsec_ray.data.records import holds_cells, read_records
from ftsec_ray.data.sources import KINDS
from ftsec_ray.errors import DataError
from ftsec_ray.evals.judging import Judge, Verdict, get_judge, user_text
from ftsec_ray.evals.probes import REQUEST_PROBES
from ftsec_ray.method import Prompt
from ftsec_ray.results.answers import first_samples
from ftsec_ray.results.read import Results

KEYS = ("cell", "probe", "prompt_id", "completion_sha256")
"""Columns by which a label is matched to its answers."""


class Key(NamedTuple):
    """Identifies one answer."""

    cell: str
    probe: str
    prompt_id: str


class LabelledAnswer(NamedTuple):
    """Prompt and completion; null if the sweep did not keep texts."""

    prompt: str | None
    completion: str | None


@dataclass
class Sheet:
    """Answers, and each judge's verdicts on them."""

    answers: dict[Key, LabelledAnswer]
    verdicts: dict[str, dict[Key, str | None]]


def read_sheet(results: Results) -> Sheet:
    """The first answer to every prompt with its verdicts; DataError if there are none."""
    columns = (
        first_samples(results.generations)
        .select([*KEYS[:3], "prompt", "completion", "judge", "verdict"])
        .to_pydict()
    )
    sheet = Sheet({}, defaultdict(dict))
    for cell, probe, prompt_id, prompt, completion, judge, verdict in zip(
        *columns.values(), strict=True
    ):
        key = Key(cell, probe or "", prompt_id or "")
        sheet.answers[key] = LabelledAnswer(prompt, completion)
        sheet.verdicts[judge or "unknown"][key] = verdict
    if not sheet.answers:
        raise DataError(
            "the results hold no answer, so that there is nothing to audit",
            str(results.folder),
            "rows in the table `generations`",
            "run the sweep until a cell is done",
        )
    return sheet


def from_labels(
    path: Path, answers: Mapping[Key, LabelledAnswer]
) -> tuple[dict[Key, str], int, int]:
    """Key -> true verdict; number of labels that match no answer, and of rows without a label."""
    records = read_records(str(path))
    _check_columns(path, records)
    indexes: dict[tuple[str, ...], dict[tuple[str, ...], list[Key]]] = {}
    truth: dict[Key, str] = {}
    unmatched = unlabelled = 0
    is_cell = holds_cells(str(path))
    for number, row in enumerate(records, start=1):
        record = {
            name: value for name, value in row.items() if not is_missing(value, is_cell=is_cell)
        }
        word = str(record.get("truth") or "").strip()
        if not word:
            unlabelled += 1
            continue
        if word not in schema.verdicts():
            raise DataError(
                f"row {number} of {path} has an unknown verdict in `truth`",
                word,
                " | ".join(schema.verdicts()),
                "leave it empty if the answer is not labelled yet",
            )
        given = {
            name: str(record[name]).strip() for name in KEYS if record.get(name) not in (None, "")
        }
        columns = tuple(given)
        if columns not in indexes:
            indexes[columns] = _index(answers, columns)
        keys = indexes[columns].get(tuple(given.values()), []) if columns else []
        _check_meant(f"row {number} of {path}", given, {answers[key].completion for key in keys})
        unmatched += not keys
        for key in keys:
            if truth.setdefault(key, word) != word:
                raise DataError(
                    f"row {number} of {path} contradicts an earlier row",
                    word,
                    truth[key],
                    "keep one true verdict per answer",
                )
    if not truth:
        raise DataError(
            "no label matches an answer of these results",
            _example(records),
            f"such as {dict(next(iter(answers))._asdict())}",
            f"{path} has {len(records)} rows, {unlabelled} of them without `truth`; copy cell,"
            " probe and prompt_id from the table `generations`",
        )
    return truth, unmatched, unlabelled


def _check_columns(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    columns = {name for record in records for name in record}
    if "truth" not in columns or not columns & {"prompt_id", "completion_sha256"}:
        raise DataError(
            f"{path} is not a table of labels",
            sorted(columns),
            f"truth, and prompt_id or completion_sha256; also {', '.join(KEYS[:2])}",
            "draw a sample to label with the query 10 of sweeps/READING_RESULTS.md",
        )


def _check_meant(place: str, given: Mapping[str, str], completions: set[str | None]) -> None:
    """DataError if a label that names only a prompt matches several different answers."""
    if not given.keys() & {"prompt_id", "completion_sha256"}:
        raise DataError(
            f"{place} does not identify the answer that it labels",
            dict(given),
            "a prompt_id or a completion_sha256",
        )
    if len(completions) > 1 and not {"cell", "completion_sha256"} & given.keys():
        raise DataError(
            f"{place} matches {len(completions)} different answers",
            dict(given),
            "one answer",
            "add the column `cell`, or `completion_sha256`: the SHA-256 of the completion in UTF-8",
        )


def _index(
    answers: Mapping[Key, LabelledAnswer], columns: Sequence[str]
) -> dict[tuple[str, ...], list[Key]]:
    index = defaultdict(list)
    for key, answer in answers.items():
        values = {
            **key._asdict(),
            "completion_sha256": (
                _sha256(answer.completion) if "completion_sha256" in columns else ""
            ),
        }
        index[tuple(values[name] for name in columns)].append(key)
    return dict(index)


def _sha256(text: str | None) -> str:
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _example(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    return next(
        ({name: record[name] for name in KEYS if name in record} for record in records), None
    )


def from_exact_judge(sheet: Sheet) -> dict[Key, str]:
    """The verdicts of the microworld's exact judge on the answers to its prompts; DataError if
    there are none.
    """
    judge = get_judge("microworld")
    truth = {
        key: verdict.verdict
        for key, verdict in _read_again(sheet, judge)
        if verdict.verdict is not None
    }
    if not truth:
        raise DataError(
            "the microworld's exact judge recognises none of these prompts",
            next(iter(sheet.answers.values())).prompt,
            "results of the microworld",
            "use --labels FILE for other tasks",
        )
    return truth


def judge_again(sheet: Sheet, judge: Judge) -> None:
    """Let another judge read the answers to requests, and add its verdicts."""
    for key, verdict in _read_again(sheet, judge):
        sheet.verdicts[judge.name].setdefault(key, verdict.verdict)


def _read_again(sheet: Sheet, judge: Judge) -> Iterator[tuple[Key, Verdict]]:
    """A judge's verdicts on the answers to requests."""
    asked = [
        (key, prompt, said)
        for key, (prompt, said) in sheet.answers.items()
        if key.probe in REQUEST_PROBES and None not in (prompt, said)
    ]
    if not asked:
        raise DataError(
            "the results hold no texts of answers to requests",
            f"{len(sheet.answers)} answers",
            f"answers to {', '.join(REQUEST_PROBES)}",
            "run the sweep with `evaluation: {keep_generations: true}`",
        )
    prompts = [_prompt(key, str(text)) for key, text, _ in asked]
    yield from zip(
        (key for key, _, _ in asked),
        judge(prompts, [str(said) for _, _, said in asked]),
        strict=True,
    )


def _prompt(key: Key, text: str) -> Prompt:
    """A prompt from its text in the table: a single message as it is, several as JSON."""
    chat: Any = None
    if text.startswith("[{"):
        try:
            chat = json.loads(text)
        except ValueError:  # a message that only begins like JSON
            chat = None
    prompt = Prompt(prompt_id=key.prompt_id, chat=chat or [{"role": "user", "content": text}])
    split = REQUEST_PROBES[key.probe][0]
    return replace(prompt, meta={"language": _language(user_text(prompt)), "kind": KINDS[split]})


@lru_cache(maxsize=10_000)
def _language(asked: str) -> str:
    """The language of a microworld request, which the table does not hold; cached, because cells
    share requests.
    """
    from ftsec_ray.data.microworld.judge import find_request
    from ftsec_ray.data.microworld.vocabulary import SECOND_LANGUAGE, translate_back

    is_second = (
        translate_back(asked) != asked and find_request(asked, language=SECOND_LANGUAGE) is not None
    )
    return SECOND_LANGUAGE if is_second else "en"
