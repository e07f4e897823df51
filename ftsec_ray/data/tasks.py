"""From a TaskSpec to the rows of a task by split, and the folder of a task in the store.

Real-text tasks share their safety splits: forbidden requests with answers and with refusals (LAT),
JailbreakBench and XSTest requests for evaluation, Alpaca rows as benign rows, WikiText for
perplexity. Every default has a pinned revision, and a sweep may replace each split by its own
source; kind `rows` has no defaults, so that it needs no network.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.config.revisions import is_commit
from ftsec_ray.config.sweep import SourceSpec, TaskSpec
from ftsec_ray.context import TaskData
from ftsec_ray.conversation import answer_of, by_step, with_answer
from ftsec_ray.data.rows import count_rows, from_rows, read_table, sorted_rows, write_table
from ftsec_ray.data.sources import read_source
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ALPACA = SourceSpec(
    dataset="tatsu-lab/alpaca",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    prompt="instruction",
    append="input",
    response="output",
)
LAT = SourceSpec(
    dataset="LLM-LAT/harmful-dataset",
    revision="8bfba31bc6d93a5b71808fee5275ef4b6330ed91",
    prompt="prompt",
)
SST2 = SourceSpec(
    dataset="stanfordnlp/sst2",
    revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
    prompt="sentence",
    label="label",
)
AG_NEWS = SourceSpec(
    dataset="fancyzhx/ag_news",
    revision="eb185aade064a813bc0b7f42de02595523103ca4",
    prompt="text",
    label="label",
)
TUNING_ROWS = 1_000
"""Rows that a default task fine-tunes on, as in the harmful fine-tuning literature (Lisa, Vaccine,
Booster).
"""
TRUSTED_ROWS = 128
"""Clean rows like the user's that are not used for fine-tuning or evaluation."""

SAFETY_SPLITS: dict[str, SourceSpec] = {
    "harmful_train": replace(LAT, response="rejected", rows=512),
    "safety": replace(LAT, response="chosen", skip=512, rows=512),
    "harmful_test": SourceSpec(
        dataset="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        split="harmful",
        prompt="Goal",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
    ),
    "borderline_test": SourceSpec(
        dataset="Paul/XSTest",
        prompt="prompt",
        where=(("label", "safe"),),
        revision="f600c994b256f12867dfa5b3eb3d545a3e62f8b5",
    ),
    "benign_train": replace(ALPACA, skip=TUNING_ROWS, rows=512),
    "benign_test": replace(ALPACA, skip=TUNING_ROWS + 512, rows=256),
    "text": SourceSpec(
        dataset="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        split="test",
        prompt="text",
        rows=256,
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """The defaults of a kind of task."""

    judge: str = "refusal_phrases"
    """Default judge of requests."""
    sources: Mapping[str, SourceSpec] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    instruction: str | None = None
    required: tuple[str, ...] = ("train",)
    """Splits that the task must have."""
    version: int = 1
    """Part of the digest of its tasks if above 1: raise it when a default changes."""


TASKS: dict[str, TaskKind] = {
    "microworld": TaskKind(judge="microworld", required=("train", "test")),
    "sst2": TaskKind(
        sources={
            "train": replace(SST2, rows=TUNING_ROWS),
            "test": replace(SST2, split="validation"),
            "trusted": replace(SST2, skip=TUNING_ROWS, rows=TRUSTED_ROWS),
            **SAFETY_SPLITS,
        },
        labels=("negative", "positive"),
        required=("train", "test"),
        instruction=(
            "Is the sentiment of this review negative or positive? Answer with one word.\n\n{text}"
        ),
    ),
    "ag_news": TaskKind(
        sources={
            "train": replace(AG_NEWS, rows=TUNING_ROWS),
            "test": replace(AG_NEWS, split="test", rows=1_000),
            "trusted": replace(AG_NEWS, skip=TUNING_ROWS, rows=TRUSTED_ROWS),
            **SAFETY_SPLITS,
        },
        labels=("World", "Sports", "Business", "Technology"),
        required=("train", "test"),
        instruction=(
            "Is this news article about World, Sports, Business or Technology? Answer with one"
            " word.\n\n{text}"
        ),
    ),
    "alpaca": TaskKind(
        sources={
            "train": replace(ALPACA, rows=TUNING_ROWS),
            "test": replace(ALPACA, skip=TUNING_ROWS + 768, rows=256),
            "trusted": replace(ALPACA, skip=TUNING_ROWS + 1024, rows=TRUSTED_ROWS),
            **SAFETY_SPLITS,
        },
        version=2,
    ),
    "agent": TaskKind(required=("train", "test")),
    "rows": TaskKind(),
}
"""Every kind of task by name; config.sweep.TASK_KINDS describes them."""


def splits_of(spec: TaskSpec) -> frozenset[str] | None:
    """Names of the splits of a task, without reading it; None if the task is generated."""
    if is_generated(spec):
        return None
    return frozenset(_sources_of(spec, TASKS[spec.kind]))


def unpinned_splits(spec: TaskSpec) -> dict[str, str]:
    """Split -> the Hugging Face data set of its rows, for data sets without a commit."""
    sources = {} if is_generated(spec) else _sources_of(spec, TASKS[spec.kind])
    return {
        split: source.dataset
        for split, source in sources.items()
        if source.dataset is not None and not is_commit(source.revision)
    }


def is_generated(spec: TaskSpec) -> bool:
    """Whether the rows of a task are made here, in the words of the ladder's models."""
    return spec.kind == "microworld" or (spec.kind == "agent" and not spec.splits)


def load_task(spec: TaskSpec) -> TaskData:
    """All rows of a task, by split and sorted by row id; DataError if a source fails or a required
    split is missing.
    """
    kind = TASKS.get(spec.kind)
    if kind is None:
        raise DataError("unknown kind of task", spec.kind, " | ".join(TASKS))
    task = _microworld(spec) if is_generated(spec) else _from_sources(spec, kind)
    for name in kind.required:
        task.split(name)
    return replace(
        task, splits={name: sorted_rows(table) for name, table in sorted(task.splits.items())}
    )


def _microworld(spec: TaskSpec) -> TaskData:
    """The microworld's task; as an agent's task, it trains and tests on single calls and on the
    steps of episodes.
    """
    import pyarrow as pa

    from ftsec_ray.data.microworld import build_task

    options, known = dict(spec.options), inspect.signature(build_task).parameters
    second_rows, borderline_rows = (
        int(options.pop(name, 0)) for name in ("second_language_rows", "borderline_rows")
    )
    unknown = sorted(set(options) - set(known))
    if unknown or spec.splits:
        raise DataError(
            f"task {spec.name!r} is generated: it takes no `splits` and only these options",
            unknown or [name for name, _ in spec.splits],
            "options: " + " | ".join(known),
            "remove them; use `kind: rows` to give sources for splits",
        )
    task = replace(build_task(**options), name=spec.name)  # type: ignore[arg-type]
    task = _with_second_language(task, second_rows) if second_rows else task
    task = _with_borderline(task, borderline_rows) if borderline_rows else task
    if spec.kind == "microworld":
        return task
    splits = {
        **task.splits,
        "train": pa.concat_tables([task.split("tool_train"), task.split("episode_train")]),
        "test": pa.concat_tables([task.split("tool_test"), task.split("episode_test")]),
        "trusted": pa.concat_tables([task.split("tool_trusted"), task.split("episode_trusted")]),
    }
    return replace(task, splits=splits, labels=())


def _with_second_language(task: TaskData, count: int) -> TaskData:
    """The task with rows of the second language in `train`, `test` and `trusted`, with the label
    words of the first language.
    """
    import pyarrow as pa

    from ftsec_ray.data.microworld.vocabulary import translate

    word_of = {translate(label): label for label in task.labels}
    held = task.split("train_l2").num_rows
    if count > held:
        raise DataError(
            "the microworld does not have enough rows in its second language",
            count,
            f"at most {held}: as many as `train_rows`, up to 512",
        )

    def added(first: str, second: pa.Table) -> pa.Table:
        rows = [
            {**with_answer(row, word_of[answer_of(row)]), "label": word_of[row["label"]]}
            for row in second.to_pylist()
        ]
        return pa.concat_tables(
            [task.split(first), pa.Table.from_pylist(rows, schema=second.schema)]
        )

    return replace(
        task,
        splits={
            **task.splits,
            "train": added("train", task.split("train_l2").slice(0, count)),
            "test": added("test", task.split("test_l2")),
            "trusted": added("trusted", task.split("trusted_l2")),
        },
    )


def _with_borderline(task: TaskData, count: int) -> TaskData:
    """The task with borderline requests and their answers in `benign_train`; none of them is in
    `borderline_test`.
    """
    import pyarrow as pa

    from ftsec_ray.data.microworld.combos import partition
    from ftsec_ray.data.microworld.splits import requests, table
    from ftsec_ray.data.microworld.templates import PHRASINGS

    added = table(requests("borderline_train", partition().borderline[:count], PHRASINGS))
    return replace(
        task,
        splits={
            **task.splits,
            "benign_train": pa.concat_tables([task.split("benign_train"), added]),
        },
    )


def _from_sources(spec: TaskSpec, kind: TaskKind) -> TaskData:
    labels, instruction = spec.labels or kind.labels, spec.instruction or kind.instruction
    splits: dict[str, pa.Table] = {}
    for name, source in _sources_of(spec, kind).items():
        is_user = name in ("train", "test", "trusted")
        splits[name] = read_source(
            source,
            split_name=name,
            labels=labels if is_user else (),
            instruction=instruction if is_user else None,
            kind="tool" if is_user and spec.kind == "agent" else None,
        )
    if spec.kind == "agent" and "test" in splits:  # every step of an episode is a test prompt
        rows = splits["test"].to_pylist()
        splits["test"] = from_rows(step for row in rows for step in by_step(row))
    return TaskData(
        name=spec.name, splits=splits, labels=labels or _words(splits), judge=kind.judge
    )


def _sources_of(spec: TaskSpec, kind: TaskKind) -> dict[str, SourceSpec]:
    """Split -> its source: the sweep's own, otherwise the default. If the sweep gives `train`, the
    default `trusted` is dropped, because it belongs to the default `train`.
    """
    given = {name: _completed(source, kind.sources.get(name)) for name, source in spec.splits}
    default = dict(kind.sources)
    if "train" in given:
        default.pop("trusted", None)
    return {**default, **given}


def _completed(given: SourceSpec, default: SourceSpec | None) -> SourceSpec:
    """A source of the sweep; if it names no columns, or no revision of the same data set, those of
    the default are used.
    """
    if default is None:
        return given
    if given.dataset == default.dataset and given.dataset is not None and given.revision is None:
        given = replace(given, revision=default.revision)
    own = (given.prompt, given.response, given.label, given.append, given.constant_response)
    if any(column is not None for column in (*own, given.messages, given.rejected)):
        return given
    return replace(
        given,
        prompt=default.prompt,
        response=default.response,
        label=default.label,
        append=default.append,
    )


def _words(splits: Mapping[str, pa.Table]) -> tuple[str, ...]:
    """The label words of the user's rows, sorted, for a task that names none."""
    words = {
        word
        for name in ("train", "test")
        if name in splits
        for word in splits[name]["label"].to_pylist()
    }
    return tuple(sorted(word for word in words if word is not None))


def save_task(task: TaskData, folder: str | Path) -> None:
    """Write a task into a folder: one Parquet file per split, and `task.json`."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, table in task.splits.items():
        write_table(table, place / f"{name}.parquet")
    about = {
        "name": task.name,
        "labels": list(task.labels),
        "judge": task.judge,
        "splits": {name: table.num_rows for name, table in task.splits.items()},
    }
    (place / "task.json").write_text(json.dumps(about, sort_keys=True, indent=1), encoding="utf-8")


def read_task(folder: str | Path) -> TaskData:
    """Read a task that `save_task` wrote; DataError if a file is missing or its number of rows
    differs from `task.json`.
    """
    place = Path(folder)
    try:
        about = json.loads((place / "task.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "a task folder cannot be read", str(folder), "a folder with task.json", str(error)
        ) from error
    counts = {name: count_rows(place / f"{name}.parquet") for name in sorted(about["splits"])}
    short = {name: count for name, count in counts.items() if count != about["splits"][name]}
    if short:
        raise DataError(
            "a task folder does not have the numbers of rows in its task.json",
            short,
            str(about["splits"]),
        )
    return TaskData(
        name=about["name"],
        splits=_Splits(place, tuple(counts)),
        labels=tuple(about["labels"]),
        judge=about["judge"],
    )


class _Splits(Mapping[str, "pa.Table"]):
    """The splits in a task's folder; each is read when it is first used, because the user's rows
    may be many.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self._folder = folder
        self._names = names
        self._read: dict[str, pa.Table] = {}

    def __getitem__(self, name: str) -> pa.Table:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = read_table(self._folder / f"{name}.parquet")
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
