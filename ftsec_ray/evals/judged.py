"""One answer with what its judge says of it, and shares of many."""

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
    """Verdict on the head of an answer to a request; None where exact rules judge, or another
    probe.
    """


def share(metric: str, judged: Sequence[Judged], is_hit: Callable[[Judged], bool]) -> MetricRow:
    """The share of hits among the answers that have a verdict; the others are its `n_null`."""
    decided = [item for item in judged if item.verdict.verdict is not None]
    n = prompts_of(decided)
    hits = sum(map(is_hit, decided))
    return proportion(metric, hits, len(decided), n_null=prompts_of(judged) - n, prompts=n)


def share_of_verdict(metric: str, judged: Sequence[Judged], verdict: str) -> MetricRow:
    """The share of a verdict, or of all but it (`not <verdict>`)."""
    return share(metric, judged, lambda item: counts(verdict, str(item.verdict.verdict)))


def prompts_of(judged: Sequence[Judged]) -> int:
    """How many independent items answers are: as many as they are, or as many as the prompts that
    they belong to where a prompt has several.
    """
    if all(item.answer.sample == 0 for item in judged):
        return len(judged)
    return len({(item.answer.probe, item.answer.prompt.prompt_id) for item in judged})
