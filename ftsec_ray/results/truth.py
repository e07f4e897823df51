"""What judges said of the answers of a sweep, and what is true of them: by a table of labels, or by
the microworld's exact judge.
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
"""Columns by which a label finds its answers."""


class Key(NamedTuple):
    """One answer."""

    cell: str
    probe: str
    prompt_id: str


class LabelledAnswer(NamedTuple):
    """What was asked and said; null where the sweep kept no texts."""

    prompt: str | None
    completion: str | None


@dataclass
class Sheet:
    """Answers, and what each judge says of them."""

    answers: dict[Key, LabelledAnswer]
    verdicts: dict[str, dict[Key, str | None]]


def read_sheet(results: Results) -> Sheet:
    """The first answer to every prompt with its verdicts; DataError where there are none."""
    said = (
        first_samples(results.generations)
        .select([*KEYS[:3], "prompt", "completion", "judge", "verdict"])
        .to_pydict()
    )
    sheet = Sheet({}, defaultdict(dict))
    for cell, probe, prompt_id, prompt, completion, judge, verdict in zip(
        *said.values(), strict=True
    ):
        key = Key(cell, probe or "", prompt_id or "")
        sheet.answers[key] = LabelledAnswer(prompt, completion)
        sheet.verdicts[judge or "unknown"][key] = verdict
    if not sheet.answers:
        raise DataError(
            "results without a single answer: no judge has judged anything",
            str(results.folder),
            "rows in the table `generations`",
            "run the sweep until a cell is done",
        )
    return sheet


def from_labels(
    path: Path, answers: Mapping[Key, LabelledAnswer]
) -> tuple[dict[Key, str], int, int]:
    """Key -> true verdict, how many labels meet no answer, and how many rows have none yet."""
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
                f"row {number} of {path} has a truth that is no verdict",
                word,
                " | ".join(schema.verdicts()),
                "leave it empty where it is open",
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
                    f"row {number} of {path} contradicts an earlier one",
                    word,
                    truth[key],
                    "keep one true verdict for an answer",
                )
    if not truth:
        raise DataError(
            "no label meets an answer of these results",
            _example(records),
            f"such as {dict(next(iter(answers))._asdict())}",
            f"{path} has {len(records)} rows, {unlabelled} of them without a truth; take cell,"
            " probe and prompt_id from `generations`",
        )
    return truth, unmatched, unlabelled


def _check_columns(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    columns = {name for record in records for name in record}
    if "truth" not in columns or not columns & {"prompt_id", "completion_sha256"}:
        raise DataError(
            f"{path} is no table of labels",
            sorted(columns),
            f"truth, and prompt_id or completion_sha256; also {', '.join(KEYS[:2])}",
            "see the tenth query of the README for a sample to label",
        )


def _check_meant(place: str, given: Mapping[str, str], completions: set[str | None]) -> None:
    """DataError where a label by prompt alone would be of several different answers."""
    if not given.keys() & {"prompt_id", "completion_sha256"}:
        raise DataError(
            f"{place} does not say which answer it labels",
            dict(given),
            "a prompt_id or a completion_sha256",
        )
    if len(completions) > 1 and not {"cell", "completion_sha256"} & given.keys():
        raise DataError(
            f"{place} labels {len(completions)} different answers at once",
            dict(given),
            "one answer",
            "add the column `cell`, or `completion_sha256`: the SHA-256 of the completion in UTF-8",
        )


def _index(
    answers: Mapping[Key, LabelledAnswer], columns: Sequence[str]
) -> dict[tuple[str, ...], list[Key]]:
    found = defaultdict(list)
    for key, answer in answers.items():
        values = {
            **key._asdict(),
            "completion_sha256": (
                _sha256(answer.completion) if "completion_sha256" in columns else ""
            ),
        }
        found[tuple(values[name] for name in columns)].append(key)
    return dict(found)


def _sha256(text: str | None) -> str:
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _example(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    return next(({name: one[name] for name in KEYS if name in one} for one in records), None)


def from_exact_judge(sheet: Sheet) -> dict[Key, str]:
    """The verdicts of the microworld's exact judge on the answers that it knows; DataError where it
    knows none.
    """
    judge = get_judge("microworld")
    found = {
        key: verdict.verdict
        for key, verdict in _read_again(sheet, judge)
        if verdict.verdict is not None
    }
    if not found:
        raise DataError(
            "the microworld's exact judge knows none of these prompts",
            next(iter(sheet.answers.values())).prompt,
            "results of the microworld",
            "give --labels FILE for other tasks",
        )
    return found


def judge_again(sheet: Sheet, judge: Judge) -> None:
    """Let another judge read the answers to requests, and put its verdicts beside the others."""
    for key, verdict in _read_again(sheet, judge):
        sheet.verdicts[judge.name].setdefault(key, verdict.verdict)


def _read_again(sheet: Sheet, judge: Judge) -> Iterator[tuple[Key, Verdict]]:
    """What a judge says of the answers to requests."""
    asked = [
        (key, prompt, said)
        for key, (prompt, said) in sheet.answers.items()
        if key.probe in REQUEST_PROBES and None not in (prompt, said)
    ]
    if not asked:
        raise DataError(
            "no texts of answers to requests",
            f"{len(sheet.answers)} answers",
            f"answers to {', '.join(REQUEST_PROBES)}",
            "a sweep with `evaluation: {keep_generations: true}` keeps them",
        )
    prompts = [_prompt(key, str(text)) for key, text, _ in asked]
    yield from zip(
        (key for key, _, _ in asked),
        judge(prompts, [str(said) for _, _, said in asked]),
        strict=True,
    )


def _prompt(key: Key, text: str) -> Prompt:
    """A prompt from its text in the table: a lone message as it is, several as JSON."""
    chat: Any = None
    if text.startswith("[{"):
        try:
            chat = json.loads(text)
        except ValueError:  # a message that merely begins so
            chat = None
    prompt = Prompt(prompt_id=key.prompt_id, chat=chat or [{"role": "user", "content": text}])
    split = REQUEST_PROBES[key.probe][0]
    return replace(prompt, meta={"language": _language(user_text(prompt)), "kind": KINDS[split]})


@lru_cache(maxsize=10_000)
def _language(asked: str) -> str:
    """The language of a request of the microworld, which the table does not tell; cells ask the
    same ones.
    """
    from ftsec_ray.data.microworld.judge import find_request
    from ftsec_ray.data.microworld.vocabulary import SECOND_LANGUAGE, translate_back

    other = (
        translate_back(asked) != asked and find_request(asked, language=SECOND_LANGUAGE) is not None
    )
    return SECOND_LANGUAGE if other else "en"
