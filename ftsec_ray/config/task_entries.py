"""The task axis of a sweep: a kind, or a mapping with sources and columns -> TaskSpec.

    task:
      kind: rows
      splits: {train: {path: rows.jsonl, prompt: text, label: label}}
      labels: [negative, positive]

`columns` gives the column mapping once for all splits. A split may be a path or Hugging Face id
alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path

from ftsec_ray.config.faults import Faults, name_or_none, nearest
from ftsec_ray.config.local_files import named_path
from ftsec_ray.config.revisions import check_revision
from ftsec_ray.config.sweep import TASK_KINDS, TASK_OPTIONS, SourceSpec, TaskSpec
from ftsec_ray.config.typed import build, unknown_keys

_KEYS = ("kind", "name", "source", "splits", "columns", "labels", "instruction", "options")
COLUMNS = (
    "prompt",
    "response",
    "label",
    "language",
    "append",
    "where",
    "matching",
    "constant_response",
)
"""Keys of SourceSpec that `columns` may set for all splits."""
SPLITS = (
    "train",
    "test",
    "trusted",
    "harmful_train",
    "harmful_test",
    "safety",
    "borderline_test",
    "benign_train",
    "benign_test",
    "tool_train",
    "tool_test",
    "text",
)
"""Splits that a task may have; methods and evaluations use these names."""
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_FILES = f"a file that ends with {' '.join(_SUFFIXES)}, or one of these with .gz"


def tasks_of(given: object, base: Path, faults: Faults) -> tuple[TaskSpec, ...]:
    """The tasks of a sweep; relative paths start at `base`."""
    place_of = "task[{}]".format if isinstance(given, (list, tuple)) else lambda index: "task"
    entries = given if isinstance(given, (list, tuple)) else [given]
    if not entries or entries == [None]:
        faults.add(
            "task", "no task", given, "one of: " + " | ".join(TASK_KINDS), "see `ftsec list tasks`"
        )
        return ()
    by_name: dict[str, TaskSpec] = {}
    for index, entry in enumerate(entries):
        place = place_of(index)
        task = _task({"kind": entry} if isinstance(entry, str) else entry, place, base, faults)
        if task is not None and task.name in by_name:
            faults.add(
                place,
                "two tasks have the same name",
                task.name,
                "a unique name for each task",
                "write {kind: ..., name: ...}",
            )
        elif task is not None:
            by_name[task.name] = task
    return tuple(by_name.values())


def _task(given: object, place: str, base: Path, faults: Faults) -> TaskSpec | None:
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "not a task",
            given,
            "a kind such as microworld, or a mapping with kind, splits, ...",
        )
        return None
    before = len(faults.found)
    unknown_keys(given, _KEYS, place, faults)
    kind = given.get("kind", "rows" if "splits" in given or "source" in given else "microworld")
    if not isinstance(kind, str) or kind not in TASK_KINDS:
        faults.add(
            f"{place}.kind" if len(given) > 1 else place,
            "unknown kind of task",
            kind,
            " | ".join(TASK_KINDS),
            nearest(kind, TASK_KINDS),
        )
        return None
    name = name_or_none(given.get("name", kind), f"{place}.name", faults)
    splits = _splits(given, place, base, faults)
    no_train = not any(split == "train" for split, _ in splits)
    if kind == "rows" and no_train and len(faults.found) == before:
        faults.add(
            f"{place}.splits",
            "kind: rows needs a source of rows",
            [split for split, _ in splits],
            "at least the split train",
            "splits: {train: {path: rows.jsonl, prompt: ..., response: ...}}",
        )
    if kind == "microworld" and splits:
        faults.add(
            f"{place}.splits",
            "a generated task has no sources",
            [split for split, _ in splits],
            "no splits",
            "to use your own rows, write kind: rows",
        )
    options = _options(str(kind), given.get("options"), f"{place}.options", faults)
    values = {key: given[key] for key in ("labels", "instruction") if key in given}
    if isinstance(values.get("instruction"), str) and "{text}" not in str(values["instruction"]):
        faults.add(
            f"{place}.instruction",
            "the template lacks {text}",
            values["instruction"],
            "a text that contains {text}",
        )
    task = build(
        TaskSpec, values, place, faults, name=name, kind=kind, splits=splits, options=options
    )
    return task if len(faults.found) == before else None


def _options(
    kind: str, given: object, place: str, faults: Faults
) -> tuple[tuple[str, int | float | str | bool], ...]:
    if given is None:
        return ()
    cls = TASK_OPTIONS.get(kind)
    if cls is None or not isinstance(given, Mapping):
        want = "a mapping" if cls else f"no options for {kind}"
        faults.add(
            place,
            "invalid options",
            given,
            want,
            "only generated tasks have options: " + " | ".join(TASK_OPTIONS),
        )
        return ()
    options = build(cls, given, place, faults)
    if options is None:
        return ()
    # Writing out a default must not change the task's identity.
    return tuple(
        (f.name, getattr(options, f.name))
        for f in fields(cls)
        if getattr(options, f.name) != f.default
    )


def _splits(
    given: Mapping[str, object], place: str, base: Path, faults: Faults
) -> tuple[tuple[str, SourceSpec], ...]:
    columns = given.get("columns") or {}
    if not isinstance(columns, Mapping):
        faults.add(
            f"{place}.columns",
            "not a mapping",
            columns,
            "{prompt: column, response: column, label: column}",
        )
        columns = {}
    unknown_keys(columns, COLUMNS, f"{place}.columns", faults)
    sources = given.get("splits", given.get("source"))
    key = "splits" if "splits" in given else "source"
    if "splits" in given and "source" in given:
        faults.add(f"{place}.source", "source and splits together", given["source"], "one of them")
    if isinstance(sources, str):
        # The train and test splits of a data set; local files need one entry per split.
        sources = {split: {"dataset": sources, "split": split} for split in ("train", "test")}
    if sources is None:
        return ()
    if not isinstance(sources, Mapping):
        faults.add(
            f"{place}.{key}",
            "not a mapping",
            sources,
            "{train: ..., test: ...}, or a Hugging Face id",
        )
        return ()
    unknown_keys(sources, SPLITS, f"{place}.{key}", faults)
    splits = []
    for split, entry in sources.items():
        source = _source(entry, columns, f"{place}.{key}.{split}", base, faults)
        if source is not None and split in SPLITS:
            splits.append((split, source))
    return tuple(sorted(splits, key=lambda item: SPLITS.index(item[0])))


def _source(
    given: object, columns: Mapping[str, object], place: str, base: Path, faults: Faults
) -> SourceSpec | None:
    if isinstance(given, str):
        local = given.startswith((".", "/", "~")) or given.removesuffix(".gz").endswith(_SUFFIXES)
        given = {"path" if local else "dataset": given}
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "not a source",
            given,
            "a path, a Hugging Face id, or a mapping with path or dataset",
        )
        return None
    values = {**columns, **given}
    if (given.get("path") is None) == (given.get("dataset") is None):
        faults.add(
            place, "a source needs either path or dataset", dict(given), "one of: path, dataset"
        )
        return None
    where = _where(values.pop("where", None), f"{place}.where", faults)
    matching = _matching(values.pop("matching", None), f"{place}.matching", faults)
    fixed: dict[str, object] = {"where": where, "matching": matching}
    if values.get("path") is not None:
        fixed["path"] = _file(values.pop("path"), f"{place}.path", base, faults)
    elif (
        not isinstance(values["dataset"], str)
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", values["dataset"])
        or ".." in values["dataset"]
    ):
        faults.add(
            f"{place}.dataset",
            "not a Hugging Face dataset id",
            values["dataset"],
            "owner/name",
            "for a local file, use the key path",
        )
    check_revision(values.get("revision"), f"{place}.revision", faults)
    return build(SourceSpec, values, place, faults, **fixed)


def _file(given: object, place: str, base: Path, faults: Faults) -> str | None:
    if not isinstance(given, str) or not given:
        faults.add(place, "not a path", given, _FILES)
        return None
    named = named_path(given, base, place, faults)
    if named is None:
        return None
    path = named.resolve()
    if not path.name.removesuffix(".gz").endswith(_SUFFIXES):
        faults.add(place, "unknown file type", given, _FILES)
    elif not path.is_file():
        faults.add(
            place,
            "no such file",
            given,
            "an existing file",
            f"searched for {path.name!r} in {path.parent}",
        )
    return str(path)


def _where(given: object, place: str, faults: Faults) -> tuple[tuple[str, str], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not all(
        v is None or isinstance(v, (str, int, float, bool, date)) for v in given.values()
    ):
        faults.add(place, "not a row filter", given, "{column: value, ...}; a value may be null")
        return ()
    return tuple(
        sorted(
            (str(column), value if isinstance(value, str) else _text(value))
            for column, value in given.items()
        )
    )


def _matching(given: object, place: str, faults: Faults) -> tuple[tuple[str, str], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not all(isinstance(v, str) for v in given.values()):
        faults.add(place, "not a row filter", given, "{column: regular expression, ...}")
        return ()
    for column, pattern in given.items():
        try:
            re.compile(pattern)
        except re.error as error:
            faults.add(
                f"{place}.{column}",
                "not a regular expression",
                pattern,
                "a pattern of Python's `re`",
                str(error),
            )
    return tuple(sorted((str(column), pattern) for column, pattern in given.items()))


def _text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
