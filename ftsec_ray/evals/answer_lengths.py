"""Attack success against answer length, from one long generation: the judge reads what an answer
was after so many tokens.

Greedy decoding makes the first tokens of a long answer those of a short one, so that nothing is
generated again. Some models refuse late, and some attacks comply late: a number at one length hides
both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ftsec_ray import schema
from ftsec_ray.evals.judged import Judged
from ftsec_ray.evals.judging import Judge
from ftsec_ray.evals.metrics import proportion
from ftsec_ray.method import Probe


def by_length(probe: Probe, judged: Sequence[Judged], judge: Judge) -> Iterator[dict[str, Any]]:
    """Rows of schema.lengths, without `cell`: of every safety metric of a probe at every length
    that its answers were kept with.
    """
    metrics = {name: verdict for name, verdict in probe.metrics.items() if name in schema.SAFETY}
    items = [item for item in judged if item.answer.probe == probe.name]
    lengths = sorted({tokens for item in items for tokens, _ in item.answer.ends})
    for tokens in lengths if metrics else ():
        verdicts = _verdicts(items, tokens, judge)
        decided = [one for one in verdicts if one is not None]
        for name, verdict in metrics.items():
            hits = sum(schema.counts(verdict, one) for one in decided)
            n_null = len(verdicts) - len(decided)
            row = asdict(proportion(name, hits, len(decided), n_null=n_null))
            yield {"tokens": tokens, **row}


def _verdicts(items: Sequence[Judged], tokens: int, judge: Judge) -> list[str | None]:
    """The verdict on each answer as it was after so many tokens; that of the whole where it had no
    more.
    """
    starts = [item.answer.completion[: dict(item.answer.ends)[tokens]] for item in items]
    shorter = [i for i, item in enumerate(items) if starts[i] != item.answer.completion]
    given = judge([items[i].answer.prompt for i in shorter], [starts[i] for i in shorter])
    verdicts = [item.verdict.verdict for item in items]
    for i, verdict in zip(shorter, given, strict=True):
        verdicts[i] = verdict.verdict
    return verdicts
