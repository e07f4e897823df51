"""The success of an attack: the metric that its class declares as `SUCCESS`.

Every plan, table, page and claim uses the declared metric from here. If it was not measured, the
attack's success is not measured: no other metric replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftsec_ray import schema

ASR = "asr"
WITHOUT_ATTACK = "harmful_rate"
"""Shown as success if there is no attack: the forbidden requests that the model fulfils by itself.
"""
_OF_GOALS = {"none": None, "harmful": "harmful_rate"}


def choices() -> tuple[str, ...]:
    """The metrics that an attack may declare, and that a search may optimise: shares of verdicts
    per prompt with one direction that is good for the defender and one that is good for the
    attacker.
    """
    return tuple(
        name
        for name, metric in schema.METRICS.items()
        if metric.probes and metric.proportion and metric.better != "none" and not metric.judge
    )


def without_trigger(metric: str) -> str | None:
    """The metric of the same cell on the same prompts without the trigger, with which a backdoor's
    success is compared; None for the success of other attacks.
    """
    known = schema.METRICS.get(metric)
    return (known.without or None) if known is not None else None


def success_metric(attack: Any) -> str | None:
    """The metric that an attack, or its class, declares; None for `none`."""
    declared: str | None = attack.SUCCESS
    return declared


def shown_metric(cell: Mapping[str, Any]) -> str:
    """The metric shown as attack success for a row of `cells`."""
    return cell["success_metric"] or WITHOUT_ATTACK


def before_declared(attack: str, goals: Mapping[str, str]) -> str | None:
    """The success metric of an attack in results of schema 3 and older, which stored only its goal
    (`none`, `backdoor` or `harmful`), or nothing.
    """
    return _OF_GOALS.get(goals.get(attack, "none" if attack == "none" else ""), ASR)


def is_driven_up(metric: str) -> bool:
    """Whether the attacker wants a metric high."""
    return schema.METRICS[metric].better != "higher"


def sign_of(metric: str) -> int:
    """1 where the attacker wants a metric high, -1 where low."""
    return 1 if is_driven_up(metric) else -1


def source_of(metric: str, success: str | None) -> str:
    """The metric whose verdicts give `metric` for an attack with this declared success: `asr` of an
    attack without triggered prompts is its declared success, if the attacker raises that.
    """
    if metric != ASR or success is None or not is_driven_up(success):
        return metric
    return success


def with_asr(rows: dict[str, dict[str, Any]], success: str | None) -> dict[str, dict[str, Any]]:
    """Metrics of a cell by name, with `asr` added if another metric is its attack's success."""
    source = source_of(ASR, success)
    if ASR in rows or source not in rows:
        return rows
    return {**rows, ASR: {**rows[source], "metric": ASR}}
