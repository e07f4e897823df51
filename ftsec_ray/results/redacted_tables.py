"""Removes secrets from tables: any text in them that a model, a judge or a sweep wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from ftsec_ray.redact import Secrets, known_secrets
from ftsec_ray.secret_forms import HINTS

if TYPE_CHECKING:
    import pyarrow as pa

_JSON = frozenset({"attack_params", "defense_params", "against_params", "params", "training"})
_APART = frozenset({*_JSON, "prompt_id"})
"""Columns that identify rows: rows that differ only in a secret must still differ, and equal texts
must stay equal in all tables.
"""
_DIGESTS = frozenset(
    {"cell", "digest", "search", "template_hash", "train_template_hash", "serve_template_hash"}
)
"""Columns with digests from ftsec: a short secret that occurs in one by chance is not a leak."""


_GROUP = 1024
"""Number of chunks of a column that are checked together: a table has one chunk for each cell."""


def redacted_tables(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables with the secrets in their text columns, and lists of texts, redacted."""
    import pyarrow as pa

    secrets = known_secrets()
    replaced: dict[tuple[str, int], dict[str, str]] = {}
    of_keys: dict[str, str] = {}
    for name, table in tables.items():
        for number, texts in _texts_of(table):
            column = table.schema.names[number]
            instead = _instead(column, texts, secrets)
            if instead:
                replaced.setdefault((name, number), {}).update(instead)
            if column in _APART:
                of_keys |= instead
    apart = _apart(of_keys, {"redacted", *secrets.names.values()})
    cleaned = dict(tables)
    for (name, number), instead in replaced.items():
        field = tables[name].schema.field(number)
        own = apart if field.name in _APART else instead
        values = [_replaced(value, own) for value in tables[name].column(number).to_pylist()]
        cleaned[name] = cleaned[name].set_column(number, field, pa.array(values, field.type))
    return cleaned


def secret_in_table(table: pa.Table) -> tuple[str, str] | None:
    """(column, what it looks like) of the first secret that `redacted_tables` would remove; None if
    there is none.
    """
    secrets = known_secrets()
    for number, texts in _texts_of(table):
        column = table.schema.names[number]
        for text in _instead(column, texts, secrets):
            return f"`{column}`", secrets.kind_of(text) or "the value of a key"
    return None


def _texts_of(table: pa.Table) -> Iterator[tuple[int, pa.Array]]:
    """(number of the column, some of its distinct texts) for the columns that may hold a secret."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for number, field in enumerate(table.schema):
        is_list = pa.types.is_list(field.type)
        is_text = pa.types.is_string(field.type.value_type if is_list else field.type)
        if is_text and field.name not in _DIGESTS:
            column = table.column(number)
            for start in range(0, column.num_chunks, _GROUP):
                group = column.chunks[start : start + _GROUP]
                parts = [chunk.flatten() if is_list else chunk for chunk in group]
                yield number, pc.unique(pa.chunked_array(parts))


def _instead(column: str, texts: pa.Array, secrets: Secrets) -> dict[str, str]:
    """Text -> the text without its secrets, for texts that hold any. Arrow searches all texts, and
    only texts with a possible secret are read one by one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    hints = "|".join([HINTS, *map(re.escape, sorted(secrets.names))])
    odd = texts
    # A secret that is not UTF-8, or too long for a pattern of Arrow: read each text.
    with suppress(pa.ArrowInvalid, UnicodeEncodeError):
        is_odd = pc.match_substring_regex(texts, hints, ignore_case=True)
        odd = texts.filter(pc.fill_null(is_odd, False))  # noqa: FBT003
    pairs = [
        (text, _cleaned_json(text, secrets) if column in _JSON else secrets.cleaned(text))
        for text in odd.drop_null().to_pylist()
    ]
    return {text: clean for text, clean in pairs if clean != text}


def _cleaned_json(text: str, secrets: Secrets) -> str:
    """JSON stays valid JSON, whichever part of it is secret."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return secrets.cleaned(text)
    clean = secrets.taken_out_of(value)
    return text if clean == value else json.dumps(clean, sort_keys=True, separators=(",", ":"))


def _replaced(value: str | list[str] | None, instead: Mapping[str, str]) -> object:
    if isinstance(value, list):
        return [_replaced(item, instead) for item in value]
    return value if value is None else instead.get(value, value)


def _apart(instead: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """Distinguishes texts that became equal by a number: `[redacted]`, `[redacted, 2]`."""
    mark = re.compile(rf"\[({'|'.join(map(re.escape, names))})\]")
    seen: dict[str, int] = {}
    numbered = {}
    for text, clean in sorted(instead.items()):
        count = seen[clean] = seen.get(clean, 0) + 1
        numbered[text] = mark.sub(rf"[\1, {count}]", clean) if count > 1 else clean
    return numbered
