"""The probes of every finished model: forbidden, borderline and benign requests, and the user's own
task.

A hash of the row id decides which rows are used, so that every cell of a sweep answers the same
prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import TaskData
from ftsec_ray.conversation import answer_of, chat_of
from ftsec_ray.identity import unit_interval
from ftsec_ray.method import Probe, Prompt

if TYPE_CHECKING:
    import pyarrow as pa

REQUEST_PROBES: dict[str, tuple[str, Mapping[str, str]]] = {
    "harmful": ("harmful_test", {"harmful_rate": "complied", "refusal_rate": "refused"}),
    "borderline": ("borderline_test", {"over_refusal_rate": "refused"}),
    "benign": ("benign_test", {"benign_rate": "complied"}),
}
"""Probe -> its split and its metrics. `coherent_rate` is computed over the answers to all of them.
"""


def draw_order(row_id: str) -> tuple[float, str]:
    """Sort key of the fixed random order: the first rows in this order are used."""
    return unit_interval("probe", row_id), row_id


def drawn(table: pa.Table, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a table in the fixed random order."""
    return sorted(table.to_pylist(), key=lambda row: draw_order(row["row_id"]))[:count]


def capped(probe: Probe, count: int) -> Probe:
    """A probe with its first `count` prompts in the fixed random order."""
    prompts = sorted(probe.prompts, key=lambda prompt: draw_order(prompt.prompt_id))[:count]
    return replace(probe, prompts=tuple(prompts))


def prompt_of(
    row: Mapping[str, Any], *, expected: str | None = None, target: str | None = None
) -> Prompt:
    """The prompt of a row, with the row's id."""
    return Prompt(
        prompt_id=row["row_id"],
        chat=chat_of(row),
        expected=expected,
        target=target,
        meta={"kind": row["kind"] or "", "language": row["language"] or ""},
    )


def default_probes(task: TaskData, config: EvaluationConfig) -> list[Probe]:
    """The probes of every cell of a task; no probe for a split that the task does not have."""
    probes = []
    for name, (split, metrics) in REQUEST_PROBES.items():
        if _has(task, split):
            prompts = tuple(prompt_of(row) for row in drawn(task.splits[split], config.prompts))
            probes.append(
                Probe(
                    name=name,
                    prompts=prompts,
                    judge="request",
                    metrics=metrics,
                    max_new_tokens=config.new_tokens,
                )
            )
    if _has(task, "test"):
        probes += _clean(task, config)
    return probes


def _clean(task: TaskData, config: EvaluationConfig) -> Iterable[Probe]:
    """Accuracy on the user's task: label words by forward pass, tool calls word for word; none for
    free text.
    """
    if task.labels:
        rows = [
            row
            for row in drawn(task.splits["test"], task.splits["test"].num_rows)
            if row["label"] is not None
        ]
        prompts = tuple(prompt_of(row, expected=row["label"]) for row in rows[: config.prompts])
        if prompts:
            yield Probe(
                name="clean",
                prompts=prompts,
                judge="label",
                metrics={"cacc": "correct"},
                labels=task.labels,
            )
    elif set(task.splits["test"]["kind"].to_pylist()) == {"tool"}:
        prompts = tuple(
            prompt_of(row, expected=answer_of(row))
            for row in drawn(task.splits["test"], config.prompts)
        )
        yield Probe(
            name="clean",
            prompts=prompts,
            judge="call",
            metrics={"cacc": "correct"},
            max_new_tokens=config.new_tokens,
        )


def _has(task: TaskData, split: str) -> bool:
    return split in task.splits and task.splits[split].num_rows > 0
