"""Tables without secrets: whatever a model, a judge or a sweep wrote into a text of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ftsec_ray.redact import environment_secrets, redacted
from ftsec_ray.secret_forms import HINTS

if TYPE_CHECKING:
    import pyarrow as pa

_PARAMS = ("attack_params", "defense_params", "against_params")
"""Columns that tell cells apart: two that differ in a secret alone must still differ, and the same
has the same name in all tables.
"""
_MARK = re.compile(r"(\[(?:redacted|\w*[A-Z]\w*))\]")


def redacted_tables(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables with the secrets in their columns of texts, and of lists of texts, redacted."""
    import pyarrow as pa

    hints = "|".join([HINTS, *map(re.escape, sorted(environment_secrets()))])
    found: dict[tuple[str, int], dict[str, str]] = {}
    for name, table in tables.items():
        for number, field in enumerate(table.schema):
            is_list = pa.types.is_list(field.type)
            if pa.types.is_string(field.type.value_type if is_list else field.type):
                column = table.column(number).combine_chunks()
                instead = _instead(column.flatten() if is_list else column, hints)
                if instead:
                    found[name, number] = instead
    params: dict[str, str] = {}
    for (name, number), instead in found.items():
        if tables[name].schema.names[number] in _PARAMS:
            params |= instead
    apart = _apart(params)
    cleaned = dict(tables)
    for (name, number), instead in found.items():
        field = tables[name].schema.field(number)
        own = apart if field.name in _PARAMS else instead
        values = [_replaced(one, own) for one in tables[name].column(number).to_pylist()]
        cleaned[name] = cleaned[name].set_column(number, field, pa.array(values, field.type))
    return cleaned


def _instead(texts: pa.Array, hints: str) -> dict[str, str]:
    """Text -> the text without its secrets, of those that hold any. Arrow looks through all texts,
    and only those with a hint are read one by one.
    """
    import pyarrow.compute as pc

    is_odd = pc.fill_null(
        pc.match_substring_regex(texts, hints, ignore_case=True),
        False,  # noqa: FBT003
    )
    odd = pc.unique(texts.filter(is_odd)).to_pylist()
    return {text: clean for text in odd if (clean := redacted(text)) != text}


def _replaced(value: str | list[str] | None, instead: Mapping[str, str]) -> object:
    if isinstance(value, list):
        return [_replaced(one, instead) for one in value]
    return value if value is None else instead.get(value, value)


def _apart(instead: Mapping[str, str]) -> dict[str, str]:
    """Texts that became equal, told apart by a number: `[redacted]`, `[redacted, 2]`."""
    seen: dict[str, int] = {}
    found = {}
    for text, clean in sorted(instead.items()):
        count = seen[clean] = seen.get(clean, 0) + 1
        found[text] = _MARK.sub(rf"\1, {count}]", clean) if count > 1 else clean
    return found
