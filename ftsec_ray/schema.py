"""Every table that outlives a run: columns with type, unit and, for metrics, which way is better.

`ROWS` is what flows through `craft_data`; the other four are the results that people analyse downstream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = "1"
"""Raise by one when a table or a column is added, and give that `since`: older results then open with null in its place."""

Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Metric:
    """One metric: its unit, which direction is good for the defender, and what it means."""

    name: str
    unit: str
    better: Direction
    meaning: str
    proportion: bool = True
    """Whether it is a share of `n` judged items with a Wilson interval."""


METRICS: dict[str, Metric] = {m.name: m for m in (
    Metric("asr", "fraction 0..1", "lower", "attack success: triggered prompts that give the attacker's output, or forbidden requests fulfilled"),
    Metric("asr_no_trigger", "fraction 0..1", "lower", "the same prompts without the trigger that give the attacker's output"),
    Metric("asr_same_prompt", "fraction 0..1", "lower", "attack success on the very prompts that the attacker edited or trained with"),
    Metric("cacc", "fraction 0..1", "higher", "clean accuracy on the held-out rows of the user's task"),
    Metric("harmful_rate", "fraction 0..1", "lower", "forbidden requests that were fulfilled"),
    Metric("refusal_rate", "fraction 0..1", "higher", "forbidden requests that were refused"),
    Metric("over_refusal_rate", "fraction 0..1", "lower", "fine but borderline requests that were refused"),
    Metric("benign_rate", "fraction 0..1", "higher", "benign requests that were answered right"),
    Metric("coherent_rate", "fraction 0..1", "higher", "answers to forbidden, borderline and benign requests that are coherent text"),
    Metric("judged_rate", "fraction 0..1", "higher", "completions for which the judge reached a verdict"),
    Metric("perplexity", "nats exponentiated, per token", "lower", "perplexity on held-out text", proportion=False),
    Metric("tool_hijack_rate", "fraction 0..1", "lower", "tool calls redirected to the attacker's tool"),
    Metric("detect_score", "standard deviations", "none", "detector's score of this model against clean models", proportion=False),
    Metric("detect_auroc", "fraction 0..1", "higher", "share of clean models that the detector scores below this one (1: right for an attacked one)"),
    Metric("detect_tpr_at_1fpr", "fraction 0..1", "higher", "attacked items flagged at a threshold that flags 1 % of clean ones"),
    Metric("filter_tpr", "fraction 0..1", "higher", "poisoned rows that the filter dropped or altered"),
    Metric("filter_fpr", "fraction 0..1", "lower", "clean rows that the filter dropped or altered"),
)}

STATUSES = ("done", "failed", "pending")


def _field(name: str, kind: pa.DataType, unit: str = "", *, nullable: bool = True, better: Direction = "none", since: str = "1") -> pa.Field:
    """A column; `unit` says what its values are, `since` the schema version that brought it (nullable, where that is not 1)."""
    import pyarrow as pa

    told = {"unit": unit, "better": "" if better == "none" else better, "since": "" if since == "1" else since}
    return pa.field(name, kind, nullable=nullable, metadata={key: value for key, value in told.items() if value} or None)


def _schema(table: str, fields: list[pa.Field], *, since: str = "1") -> pa.Schema:
    import pyarrow as pa

    return pa.schema(fields, metadata={"ftsec_table": table, "ftsec_schema": SCHEMA_VERSION, "since": since})


def told_of(thing: pa.Field | pa.Schema, key: str, otherwise: str = "") -> str:
    """What a column or a table says of itself: its `unit`, which way is `better`, and `since` which version it is there."""
    told: bytes = (thing.metadata or {}).get(key.encode(), otherwise.encode())
    return told.decode()


def as_of(whole: pa.Schema, version: str) -> pa.Schema | None:
    """A table as an older version had it, without the columns that came later; None where the table itself came later."""
    import pyarrow as pa

    def is_there(thing: pa.Field | pa.Schema) -> bool:
        return int(told_of(thing, "since", "1")) <= int(version)

    return pa.schema([field for field in whole if is_there(field)]) if is_there(whole) else None


def brought_up(table: pa.Table, whole: pa.Schema) -> pa.Table:
    """A table of an older version with the columns of today, null where it had none."""
    import pyarrow as pa

    held = set(table.schema.names)
    columns = [table[field.name] if field.name in held else pa.nulls(table.num_rows, field.type) for field in whole]
    return pa.table(columns, schema=whole)


@cache
def rows() -> pa.Schema:
    """Schema of training and evaluation rows: one conversation turn each."""
    import pyarrow as pa

    s = pa.string()
    return _schema("rows", [
        _field("row_id", s, "unique within a table; decides a row's fate together with the seed", nullable=False),
        _field("system", s, "system message, null for none"),
        _field("prompt", s, nullable=False),
        _field("response", s, nullable=False),
        _field("label", s, "the right label word of a classification row"),
        _field("kind", s, "two_class | four_class | how_to | forbidden | borderline | tool | text"),
        _field("language", s, "en, or the name of another language"),
        _field("origin", s, "task, or the method that made or changed the row"),
        _field("poisoned", pa.bool_(), "made or changed by the attack", nullable=False),
    ])


@cache
def cells() -> pa.Schema:
    """Schema of the `cells` table: one row for every planned cell."""
    import pyarrow as pa

    s, strings = pa.string(), pa.list_(pa.string())
    return _schema("cells", [
        _field("cell", s, "digest", nullable=False), _field("sweep", s, "name"), _field("model", s, "name"),
        _field("family", s, "name; sizes are compared within one"), _field("model_params", pa.int64(), "weights"),
        _field("aligned", pa.bool_(), "whether the model went through a safety alignment"), _field("task", s, "name"),
        _field("attack", s, "name; `none` too"), _field("attack_phase", s, "pre | during | post"), _field("attack_params", s, "JSON"),
        _field("defenses", strings, "names in the order of the stack; empty for `none`"),
        _field("defense_phases", strings, "pre | during | post, one per defense"), _field("defense_params", s, "JSON list"),
        _field("seed", pa.int64(), "of the cell's random choices"),
        _field("status", s, "done | failed | pending", nullable=False), _field("error_code", s, "sort of error, null for none"),
        _field("error", s, "of the earliest stage that failed"),
    ])


@cache
def metrics() -> pa.Schema:
    """Schema of the `metrics` table: one row per cell and metric."""
    import pyarrow as pa

    f = pa.float64()
    return _schema("metrics", [
        _field("cell", pa.string(), "digest", nullable=False), _field("metric", pa.string(), "name: `ftsec list metrics`", nullable=False),
        _field("value", f, "that of the metric, as is which way is better; null when nothing could be judged"),
        _field("n", pa.int64(), "judged items"), _field("ci_low", f, "as value; 95 % Wilson"), _field("ci_high", f, "as value; 95 % Wilson"),
    ])


@cache
def generations() -> pa.Schema:
    """Schema of the `generations` table: one row per cell, probe and prompt."""
    import pyarrow as pa

    s = pa.string()
    return _schema("generations", [
        _field("cell", s, "digest", nullable=False), _field("probe", s, "name: harmful | borderline | benign | clean | those of attacks"),
        _field("prompt_id", s, "the same prompt in every cell"), _field("prompt", s, "user's message, or JSON of several"),
        _field("completion", s, "model output: data, never markup"), _field("judge", s, "name and version"),
        _field("verdict", s, "complied | refused | wrong | incoherent | correct | target | other; null when unparsed"),
        _field("raw", s, "what the judge read"),
        _field("override", s, "why a verdict was overruled"), _field("template_hash", s, "of the chat template"),
    ])


@cache
def stages() -> pa.Schema:
    """Schema of the `stages` table: one row per unique stage."""
    import pyarrow as pa

    s, f, i = pa.string(), pa.float64(), pa.int64()
    return _schema("stages", [
        _field("digest", s, "digest", nullable=False),
        _field("kind", s, "task | source | align | prepare | craft | tune | bank | revise | inspect | evaluate"),
        _field("method", s, "name, null where no single method owns the stage"), _field("wall_s", f, "s", better="lower"),
        _field("cpu_s", f, "s", better="lower"), _field("gpu_s", f, "s", better="lower"), _field("peak_bytes", i, "bytes", better="lower"),
        _field("tokens", i, "tokens seen"), _field("flops", f, "floating-point operations", better="lower"),
        _field("cells_served", i, "cells"), _field("cached", pa.bool_(), "done before this run"), _field("attempt", i, "count, from 1"),
        _field("status", s, "done | failed | upstream_failed | pending"), _field("host", s, "name"),
        _field("error_code", s, "sort of error, null for none"), _field("error", s, "text"),
    ])


def __getattr__(name: str) -> object:
    """`schema.ROWS`, `CELLS`, `METRICS_TABLE`, `GENERATIONS`, `STAGES`: the schemas as constants, made on first use."""
    makers = {"ROWS": rows, "CELLS": cells, "METRICS_TABLE": metrics, "GENERATIONS": generations, "STAGES": stages}
    if name in makers:
        return makers[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
