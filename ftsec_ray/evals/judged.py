"""One answer with what its judge says of it."""

from __future__ import annotations

from dataclasses import dataclass

from ftsec_ray.evals.ask import Answer
from ftsec_ray.evals.judging import Judge, Verdict


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
