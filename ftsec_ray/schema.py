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
    Metric("asr_transfer", "fraction 0..1", "lower", "attack success in the languages whose training rows were not poisoned, with the trigger"),
    Metric("asr_transfer_no_trigger", "fraction 0..1", "lower", "the same prompts without the trigger that give the attacker's output"),
    Metric("edit_gain", "fraction -1..1", "none", "rise of the target's probability (geometric mean over the edited prompts) by a weight edit "
           "itself, before tuning", proportion=False),
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


def _field(name: str, kind: pa.DataType, unit: str = "", *, nullable: bool = True) -> pa.Field:
    import pyarrow as pa

    return pa.field(name, kind, nullable=nullable, metadata={"unit": unit} if unit else None)


def _schema(table: str, fields: list[pa.Field]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(fields, metadata={"ftsec_table": table, "ftsec_schema": SCHEMA_VERSION})


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
        _field("cell", s, "digest", nullable=False), _field("sweep", s), _field("model", s), _field("family", s),
        _field("model_params", pa.int64(), "weights"), _field("aligned", pa.bool_()), _field("task", s),
        _field("attack", s, "`none` too"), _field("attack_phase", s), _field("attack_params", s, "JSON"),
        _field("defenses", strings, "in the order of the stack; empty for `none`"),
        _field("defense_phases", strings), _field("defense_params", s, "JSON list"), _field("seed", pa.int64()),
        _field("status", s, "done | failed | pending", nullable=False), _field("error_code", s), _field("error", s),
    ])


@cache
def metrics() -> pa.Schema:
    """Schema of the `metrics` table: one row per cell and metric."""
    import pyarrow as pa

    f = pa.float64()
    return _schema("metrics", [
        _field("cell", pa.string(), nullable=False), _field("metric", pa.string(), nullable=False),
        _field("value", f, "see schema.METRICS; null when nothing could be judged"),
        _field("n", pa.int64(), "judged items"), _field("ci_low", f, "95 %"), _field("ci_high", f, "95 %"),
    ])


@cache
def generations() -> pa.Schema:
    """Schema of the `generations` table: one row per cell, probe and prompt."""
    import pyarrow as pa

    s = pa.string()
    return _schema("generations", [
        _field("cell", s, nullable=False), _field("probe", s), _field("prompt_id", s), _field("prompt", s),
        _field("completion", s, "model output: data, never markup"), _field("judge", s, "name and version"),
        _field("verdict", s, "null when unparsed"), _field("raw", s, "what the judge read"),
        _field("override", s, "why a verdict was overruled"), _field("template_hash", s),
    ])


@cache
def stages() -> pa.Schema:
    """Schema of the `stages` table: one row per unique stage."""
    import pyarrow as pa

    s, f, i = pa.string(), pa.float64(), pa.int64()
    return _schema("stages", [
        _field("digest", s, nullable=False), _field("kind", s), _field("method", s), _field("wall_s", f, "s"),
        _field("cpu_s", f, "s"), _field("gpu_s", f, "s"), _field("peak_bytes", i, "bytes"), _field("tokens", i),
        _field("flops", f), _field("cells_served", i), _field("cached", pa.bool_(), "done before this run"),
        _field("attempt", i), _field("status", s), _field("host", s), _field("error_code", s), _field("error", s),
    ])


def __getattr__(name: str) -> object:
    """`schema.ROWS`, `CELLS`, `METRICS_TABLE`, `GENERATIONS`, `STAGES`: the schemas as constants, made on first use."""
    makers = {"ROWS": rows, "CELLS": cells, "METRICS_TABLE": metrics, "GENERATIONS": generations, "STAGES": stages}
    if name in makers:
        return makers[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
