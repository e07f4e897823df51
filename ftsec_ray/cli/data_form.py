"""The form of a data file: which columns hold the prompt, the answer, the label or the whole
conversation, found from names and values.

What is found is a proposal for a person to check: each choice comes with the reason for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftsec_ray.data.cell_values import is_missing, label_text, plain_text
from ftsec_ray.data.conversations import COLUMNS, is_conversation
from ftsec_ray.data.not_rows import json_value
from ftsec_ray.data.records import Record, columns_of
from ftsec_ray.errors import DataError

MAX_LABELS = 20
"""Distinct values up to which a column is taken for labels."""
_LOOK_ROWS = 1_000
"""Rows whose values are looked at to tell texts and conversations."""
_PROMPTS = (
    *("prompt", "instruction", "question", "query", "request", "user", "problem", "input"),
    *("text", "sentence", "review", "content"),
)
_ANSWERS = (
    *("response", "output", "answer", "completion", "assistant", "reply", "solution"),
    *("target", "chosen"),
)
_LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "y")


@dataclass(frozen=True, kw_only=True)
class DataForm:
    """What a data file looks like."""

    columns: Mapping[str, str]
    """Key of a source (`prompt`, `label`, ...) -> column."""
    labels: tuple[str, ...] = ()
    """Label words; empty for a task with free answers."""
    reasons: tuple[str, ...] = ()
    """Why, one sentence each."""
    checks: tuple[str, ...] = ()
    """What the data did not tell, and its owner must check."""
    unused: tuple[str, ...] = ()
    """Columns that no key names."""


def form_of(records: Sequence[Record], place: str) -> DataForm:
    """The form of records; DataError when they hold nothing that a model could learn to answer.

    Args:
        records: All rows of a file, as `read_records` gives them.
        place: The file, for the message.
    """
    columns = columns_of(list(records))
    look = records[:_LOOK_ROWS]
    found = (
        _conversation(columns, look)
        or _pair(columns, look)
        or _exchange(columns, look)
        or _labelled(columns, records)
        or _guess(columns, look)
    )
    if found is None:
        raise DataError(
            f"{place} has a prompt but no answers that a model could be trained on",
            " | ".join(columns),
            "two columns of text (prompt and response), a text and a label, or a column of"
            " conversations (messages)",
            "add the column that is missing",
        )
    unused = tuple(name for name in columns if name not in found.columns.values())
    return replace(found, unused=unused)


def _conversation(columns: Sequence[str], records: Sequence[Record]) -> DataForm | None:
    held = [name for name in columns if all(_is_conversation(r.get(name)) for r in records)]
    if not held:
        return None
    if "chosen" in held and "rejected" in held:
        return DataForm(
            columns={"messages": "chosen", "rejected": "rejected"},
            reasons=("preference pairs: both columns hold whole conversations",),
        )
    name = next((known for known in COLUMNS if known in held), held[0])
    first = _decoded(records[0][name])[0]
    kind = "ShareGPT (from, value)" if "from" in first else "OpenAI (role, content)"
    return DataForm(
        columns={"messages": name}, reasons=(f"column {name!r} holds conversations: {kind}",)
    )


def _is_conversation(value: object) -> bool:
    return is_conversation(_decoded(value))


def _decoded(value: object) -> Any:
    """A value, read as JSON where a file keeps a list as text."""
    is_listed = isinstance(value, str) and value.lstrip().startswith("[")
    return json_value(str(value)) if is_listed else value


def _pair(columns: Sequence[str], records: Sequence[Record]) -> DataForm | None:
    texts = _texts(columns, records)
    if not {"prompt", "chosen", "rejected"} <= set(texts):
        return None
    return DataForm(
        columns={"prompt": "prompt", "response": "chosen", "rejected": "rejected"},
        reasons=("preference pairs: a prompt with a chosen and a rejected answer",),
    )


def _exchange(columns: Sequence[str], records: Sequence[Record]) -> DataForm | None:
    texts = _texts(columns, records)
    prompt = _named(texts, _PROMPTS)
    answer = _named([name for name in texts if name != prompt], _ANSWERS)
    if prompt is None or answer is None:
        return None
    chosen = {"prompt": prompt, "response": answer}
    extra = next((name for name in columns if name.lower() == "input" and name != prompt), None)
    if extra is not None and prompt.lower() == "instruction":
        chosen["append"] = extra
    return DataForm(columns=chosen, reasons=("prompt and answer, by the names of the columns",))


def _labelled(columns: Sequence[str], records: Sequence[Record]) -> DataForm | None:
    label = _named(columns, _LABELS)
    texts = [name for name in _texts(columns, records[:_LOOK_ROWS]) if name != label]
    if label is None or not texts:
        return None
    text = _named(texts, _PROMPTS) or _longest(texts, records[:_LOOK_ROWS])[0]
    words = sorted({(label_text(r.get(label)) or "").strip() for r in records} - {""})
    if len(words) > MAX_LABELS:
        return DataForm(
            columns={"prompt": text, "response": label},
            reasons=(
                f"column {label!r} has {len(words)} different values, more than {MAX_LABELS}:"
                " taken for free answers, not for labels",
            ),
            checks=(f"column {label!r} is the answer that the model shall learn",),
        )
    if len(words) < 2:  # noqa: PLR2004 (one value is nothing to learn)
        return None
    checks: tuple[str, ...] = ()
    if all(word.lstrip("-").isdecimal() for word in words):
        checks = (
            "the labels are numbers: write the word that each stands for into `labels`, in"
            " ascending order, since the model answers with these words",
        )
    return DataForm(
        columns={"prompt": text, "label": label},
        labels=tuple(sorted(words, key=_by_number)),
        reasons=(f"text and label: column {label!r} has {len(words)} different values",),
        checks=checks,
    )


def _by_number(word: str) -> tuple[int, str]:
    return (int(word), word) if word.isdecimal() and word.isascii() else (0, word)


def _guess(columns: Sequence[str], records: Sequence[Record]) -> DataForm | None:
    """The two columns with the longest texts, the earlier one as the prompt."""
    longest = _longest(_texts(columns, records), records)[:2]
    if len(longest) < 2:  # noqa: PLR2004 (a prompt and an answer)
        return None
    prompt, answer = sorted(longest, key=columns.index)
    return DataForm(
        columns={"prompt": prompt, "response": answer},
        reasons=("a guess: the two columns with the longest texts, in their order",),
        checks=(f"column {prompt!r} is the prompt and column {answer!r} its answer",),
    )


def _texts(columns: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Columns with a text in most rows."""
    return [
        name
        for name in columns
        if name.strip() and 2 * sum(_has_text(r.get(name)) for r in records) > len(records)
    ]


def _has_text(value: object) -> bool:
    return isinstance(value, str) and not is_missing(value, is_cell=True) and bool(value.strip())


def _longest(columns: Sequence[str], records: Sequence[Record]) -> list[str]:
    sizes = {name: sum(len(plain_text(r.get(name)) or "") for r in records) for name in columns}
    return sorted(columns, key=lambda name: -sizes[name])


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column whose name comes first among the known ones, in any case of letters."""
    by_name = {name.strip().lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)
