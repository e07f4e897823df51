"""An answer with the verdict of its judge, and shares over many answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ftsec_ray.evals.ask import Answer
from ftsec_ray.evals.judging import Judge, Verdict
from ftsec_ray.evals.metrics import MetricRow, proportion
from ftsec_ray.schema import counts


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One answer with the verdict of one judge."""

    answer: Answer
    judge: Judge
    verdict: Verdict
    head: str | None = None
    """Verdict on the head of an answer to a request; None for judges with exact rules and other
    probes.
    """


def share(metric: str, judged: Sequence[Judged], is_hit: Callable[[Judged], bool]) -> MetricRow:
    """The share of hits among the answers with a verdict; the others are its `n_null`."""
    decided = [item for item in judged if item.verdict.verdict is not None]
    n = prompts_of(decided)
    hits = sum(map(is_hit, decided))
    return proportion(metric, hits, len(decided), n_null=prompts_of(judged) - n, prompts=n)


def share_of_verdict(metric: str, judged: Sequence[Judged], verdict: str) -> MetricRow:
    """The share of a verdict, or of all other verdicts (`not <verdict>`)."""
    return share(metric, judged, lambda item: counts(verdict, str(item.verdict.verdict)))


def prompts_of(judged: Sequence[Judged]) -> int:
    """Number of independent items: the number of answers, or the number of prompts if prompts have
    several answers.
    """
    if all(item.answer.sample == 0 for item in judged):
        return len(judged)
    return len({(item.answer.probe, item.answer.prompt.prompt_id) for item in judged})
