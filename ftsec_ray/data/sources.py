"""From a SourceSpec to a table of rows: a local file or a pinned Hugging Face data set, with a
column mapping.

A hash of each row's position decides which rows a source keeps, so that two splits of one file
(`skip`) do not overlap, on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from heapq import nsmallest
from typing import TYPE_CHECKING

from ftsec_ray.config.open_limits import DATA_BYTES, DATA_ROWS
from ftsec_ray.config.revisions import is_commit
from ftsec_ray.config.sweep import SourceSpec
from ftsec_ray.conversation import Message, exchange, message
from ftsec_ray.data.cell_values import is_missing, label_text, matches, plain_text, values_there
from ftsec_ray.data.conversations import COLUMNS, is_conversation, messages_of, tools_of
from ftsec_ray.data.raw_files import refuse_beyond
from ftsec_ray.data.records import Record, columns_of, holds_cells, read_records
from ftsec_ray.data.rows import Row, from_rows, new_row
from ftsec_ray.errors import DataError, EnvironmentFault
from ftsec_ray.identity import unit_interval

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {
    "harmful_train": "forbidden",
    "harmful_test": "forbidden",
    "safety": "forbidden",
    "borderline_test": "borderline",
    "benign_train": "how_to",
    "benign_test": "how_to",
    "text": "text",
    "tool_train": "tool",
    "tool_test": "tool",
}
"""Split -> kind of its rows."""
CLASS_KINDS = {2: "two_class", 4: "four_class"}
PLACEHOLDER = "{text}"


@dataclass(frozen=True)
class _Mapping:
    """The column of each field; None if there is none."""

    prompt: str
    """Column of the prompt, or of the conversation if `is_conversation`."""
    response: str | None
    label: str | None
    rejected: str | None
    is_conversation: bool = False


def read_source(
    spec: SourceSpec,
    *,
    split_name: str,
    labels: Sequence[str] = (),
    instruction: str | None = None,
    kind: str | None = None,
) -> pa.Table:
    """The rows (schema.ROWS) of one source, in its own order; DataError with row and value if one
    does not fit.

    Args:
        spec: Where the rows are, and the column of each field. If no column is named, the columns
            `prompt`, `response` and (if there are label words) `label` are used, a `messages`
            column as a conversation, and a single column as the prompt.
        split_name: Part of the row ids; decides the kind of the rows.
        labels: Label words; a label column may hold a word or an index into them.
        instruction: Template of the prompt, with {text}.
        kind: Kind of the rows if the split's name does not decide it.
    """
    place = place_of(spec)
    if instruction is not None and PLACEHOLDER not in instruction:
        raise DataError(
            "the instruction has no placeholder for the text",
            instruction,
            f"a template with {PLACEHOLDER}",
        )
    kind = kind or KINDS.get(split_name)
    is_text = kind == "text"
    records, at = (
        _hub_records(spec, is_text=is_text)
        if spec.path is None
        else (read_records(spec.path), None)
    )
    columns = columns_of(records)
    mapping = (
        _mapping(spec, columns, place, takes_label=bool(labels))
        if records
        else _Mapping("", None, None, None)
    )
    kind = kind or (CLASS_KINDS.get(len(labels)) if mapping.label else "how_to")
    chosen = records
    if at is None:
        at = _drawn(spec, records, is_text=is_text, prompt=mapping.prompt)
        chosen = [records[i] for i in at]
    if not chosen:
        _check_where(spec, records, place, split_name)
        raise DataError(
            f"the selection leaves no rows of {place} for split {split_name!r}",
            f"{len(records)} rows before selection",
            "at least one row",
            f"check where={dict(spec.where)}, matching={dict(spec.matching)}, skip={spec.skip} and"
            f" rows={spec.rows}",
        )
    build = _RowBuilder(
        spec=spec,
        mapping=mapping,
        place=place,
        labels=tuple(labels),
        instruction=instruction,
        kind=kind,
    )
    return from_rows(
        build.row(f"{split_name}/{index:07d}", index + 1, record)
        for index, record in zip(at, chosen, strict=True)
    )


def records_of(spec: SourceSpec) -> list[Record]:
    """The records of a source as its file has them, before columns are mapped; of a data set those
    that `rows` draws.
    """
    return read_records(spec.path) if spec.path else _hub_records(spec, is_text=False)[0]


def place_of(spec: SourceSpec) -> str:
    """A source's name in messages: the file, or the data set with its configuration, split and
    revision.
    """
    if (spec.path is None) == (spec.dataset is None):
        raise DataError(
            "a source must name either a file or a data set",
            {"path": spec.path, "dataset": spec.dataset},
            "exactly one of `path` and `dataset`",
        )
    if spec.path is not None:
        return spec.path
    return f"{spec.dataset}{f'/{spec.config}' if spec.config else ''}[{spec.split}]@{spec.revision}"


def _hub_records(spec: SourceSpec, *, is_text: bool) -> tuple[list[Record], list[int] | None]:
    """The rows of a data set; with their positions if only the selected rows were read, because a
    few rows of a large data set can be selected without reading all.
    """
    if not is_commit(spec.revision):
        raise DataError(
            "a data set has no pinned commit",
            f"{spec.dataset}@{spec.revision or ''}",
            "the commit of the data set, 40 hexadecimal digits",
            "add `revision: <commit>`",
        )
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            "the package `datasets` is missing",
            spec.dataset,
            "an installed `datasets`",
            "pip install datasets, or give the rows as a local `path`",
        ) from error
    try:
        loaded = datasets.load_dataset(
            spec.dataset, spec.config, split=spec.split, revision=spec.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "a data set cannot be loaded",
            place_of(spec),
            "a reachable data set with this configuration and split",
            f"{type(error).__name__}: {error}; without a network, give the rows as a local `path`",
        ) from error
    at = None
    if spec.rows is not None and not (spec.where or spec.matching or is_text):
        at = _draw(spec, range(loaded.num_rows))
    # if no row is selected, read all: the error message counts them
    table = loaded.with_format("arrow")[at or slice(None)]
    refuse_beyond(DATA_ROWS, table.num_rows, place_of(spec))
    refuse_beyond(DATA_BYTES, table.nbytes, place_of(spec))
    records: list[Record] = table.to_pylist()
    return records, at or None


def _mapping(spec: SourceSpec, columns: list[str], place: str, *, takes_label: bool) -> _Mapping:
    named = (spec.prompt, spec.response, spec.label, spec.append, spec.messages, spec.rejected)
    for column in (*named, spec.language, *(column for column, _ in (*spec.where, *spec.matching))):
        if column is not None and column not in columns:
            near = get_close_matches(column, columns, n=1)
            raise DataError(
                f"no column {column!r} in {place}",
                column,
                " | ".join(columns),
                f"did you mean {near[0]!r}?" if near else "name one of these columns",
            )
    if spec.messages is not None and (spec.prompt or spec.response or spec.append):
        raise DataError(
            f"the source {place} names both a conversation and a prompt",
            spec.messages,
            "either `messages`, or `prompt` and `response`",
        )
    if spec.prompt is not None:
        return _Mapping(spec.prompt, spec.response, spec.label, spec.rejected)
    conversation = spec.messages or next((c for c in COLUMNS if c in columns), None)
    if conversation is None and "prompt" not in columns and _is_pair(columns):
        conversation = "chosen"  # preference pairs with the prompt in both conversations
    if spec.messages is not None or (conversation is not None and "prompt" not in columns):
        rejected = spec.rejected or ("rejected" if "rejected" in columns else None)
        label = spec.label or ("label" if "label" in columns and takes_label else None)
        return _Mapping(str(conversation), None, label, rejected, is_conversation=True)
    by_name: dict[str, str | None] = {
        name: name if name in columns else None
        for name in ("prompt", "response", "label", "rejected")
    }
    if by_name["prompt"] is None and len(columns) == 1:
        by_name["prompt"] = columns[0]
    if by_name["prompt"] is None:
        raise DataError(
            f"the source {place} does not name its prompt column",
            None,
            " | ".join(columns),
            "add `prompt: <column>`",
        )
    if named == (None,) * len(named):
        response = by_name["response"] or ("chosen" if "chosen" in columns else None)
        response = None if spec.constant_response is not None else response
        label = by_name["label"] if takes_label else None
        return _Mapping(by_name["prompt"], response, label, by_name["rejected"])
    return _Mapping(by_name["prompt"], spec.response, spec.label, spec.rejected)


def _is_pair(columns: list[str]) -> bool:
    return "chosen" in columns and "rejected" in columns


def _check_where(spec: SourceSpec, records: list[Record], place: str, split_name: str) -> None:
    """DataError if no row matches `where`, with the values that occur."""
    every = replace(spec, rows=None, skip=0, matching=())
    if spec.where and not _drawn(every, records, is_text=False, prompt=""):
        raise DataError(
            f"no row of {place} matches `where` of split {split_name!r}",
            f"where={dict(spec.where)} of {len(records)} rows before selection",
            "; ".join(values_there(records, column) for column, _ in spec.where),
            "use one of these values",
        )


def _drawn(spec: SourceSpec, records: list[Record], *, is_text: bool, prompt: str) -> list[int]:
    """Positions of the rows that the source keeps, ascending."""
    fits = [
        i
        for i, record in enumerate(records)
        if all(matches(record.get(column), value) for column, value in spec.where)
        and all(_holds(record.get(column), pattern) for column, pattern in spec.matching)
        and not (is_text and (is_missing(record.get(prompt)) or not str(record[prompt]).strip()))
    ]
    return fits if spec.rows is None and not spec.skip else _draw(spec, fits)


def _draw(spec: SourceSpec, fits: Sequence[int]) -> list[int]:
    """The positions that remain after `skip` and `rows` of a source, ascending."""
    most = len(fits) if spec.rows is None else spec.skip + spec.rows
    order = nsmallest(most, fits, key=lambda i: (unit_interval("draw", i), i))
    return sorted(order[spec.skip :])


def _holds(value: object, pattern: str) -> bool:
    """Whether a value is a text that matches a regular expression somewhere."""
    return isinstance(value, str) and re.search(pattern, value) is not None


@dataclass(frozen=True, kw_only=True)
class _RowBuilder:
    spec: SourceSpec
    mapping: _Mapping
    place: str
    labels: tuple[str, ...]
    instruction: str | None
    kind: str | None

    def row(self, row_id: str, number: int, record: Record) -> Row:
        """One record as a row."""
        label = (
            None if self.mapping.label is None else self._label(record, self.mapping.label, number)
        )
        place = f"row {number} of {self.place}"
        return new_row(
            row_id,
            messages=(
                self._conversation(record, label, place)
                if self.mapping.is_conversation
                else self._exchange(record, label, number)
            ),
            tools=tools_of(record, place),
            rejected=self._rejected(record, place),
            label=label,
            kind=self.kind,
            language=self._language(record, number),
        )

    def _exchange(self, record: Record, label: str | None, number: int) -> list[Message]:
        """One question and its answer, from their columns."""
        value = record.get(self.mapping.prompt)
        if is_conversation(value):  # a prompt of several turns, as in preference data
            response = self._response(record, label, number)
            said = messages_of(value, f"row {number} of {self.place}")
            return [*said, *([message("assistant", response, loss=True)] if response else [])]
        prompt = self._text(record, self.mapping.prompt, number)
        if not prompt.strip():
            raise DataError(
                f"row {number} of {self.place} has an empty prompt",
                record,
                f"text in column {self.mapping.prompt!r}",
            )
        if self.kind == "text":
            return exchange("", prompt)
        if self.spec.append is not None and self._has(record, self.spec.append):
            prompt = f"{prompt}\n\n{self._text(record, self.spec.append, number)}"
        if self.instruction is not None:
            prompt = self.instruction.replace(PLACEHOLDER, prompt)
        return exchange(prompt, self._response(record, label, number))

    def _conversation(self, record: Record, label: str | None, place: str) -> list[Message]:
        """The conversation of a record; the sweep's constant answer or the label replaces its
        answer.
        """
        messages = messages_of(record.get(self.mapping.prompt), place)
        answer = self.spec.constant_response if label is None else label
        if answer is None:
            return messages
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [*before, message("assistant", answer, loss=True)]

    def _rejected(self, record: Record, place: str) -> str | None:
        if self.mapping.rejected is None:
            return None
        value = record.get(self.mapping.rejected)
        if is_conversation(value):
            return str(messages_of(value, f"the rejected answer of {place}")[-1]["content"])
        if not isinstance(value, str):
            raise DataError(f"{place} has no rejected answer", value, "a text or a conversation")
        return value

    def _language(self, record: Record, number: int) -> str:
        return (
            "en"
            if self.spec.language is None
            else self._text(record, self.spec.language, number).strip()
        )

    def _response(self, record: Record, label: str | None, number: int) -> str:
        if self.spec.constant_response is not None:
            return self.spec.constant_response
        if self.mapping.response is not None:
            value = record.get(self.mapping.response)
            if is_conversation(value):
                place = f"the answer of row {number} of {self.place}"
                return str(messages_of(value, place)[-1]["content"])
            return self._text(record, self.mapping.response, number)
        return label or ""

    def _text(self, record: Record, column: str, number: int) -> str:
        value = record.get(column)
        text = None if is_missing(value, is_cell=holds_cells(self.spec.path)) else plain_text(value)
        if text is None:
            raise DataError(
                f"row {number} of {self.place} has no text in column {column!r}",
                value,
                "a string or a number",
                "repair the row or exclude it with `where`",
            )
        return text

    def _has(self, record: Record, column: str) -> bool:
        value = record.get(column)
        is_cell = holds_cells(self.spec.path)
        return not is_missing(value, is_cell=is_cell) and bool(str(value).strip())

    def _label(self, record: Record, column: str, number: int) -> str:
        value = record.get(column)
        word = (label_text(value) or "").strip()
        if word and word in self.labels:
            return word  # `None` may be the name of a class
        if not word or is_missing(value, is_cell=holds_cells(self.spec.path)):
            word = self._text(record, column, number).strip()
        if word and not self.labels:
            return word
        if word.isdecimal() and int(word) < len(self.labels):
            return self.labels[int(word)]
        same = [label for label in self.labels if label.casefold() == word.casefold()]
        if not same and isinstance(value, bool) and len(self.labels) == 2:
            return self.labels[int(value)]
        if not same:
            raise DataError(
                f"row {number} of {self.place} has an unknown label",
                value,
                " | ".join(f"{i} {label}" for i, label in enumerate(self.labels)) or "a word",
                "correct `labels` or the row",
            )
        return same[0]
