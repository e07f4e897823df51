"""Attack success against answer length, from one long generation: the judge reads the first tokens
of each answer.

With greedy decoding, the first tokens of a long answer are those of a short one, so that nothing is
generated again. Some models refuse late, and some attacks comply late: a metric at one length hides
both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from ftsec_ray import schema
from ftsec_ray.evals.judged import Judged, share_of_verdict
from ftsec_ray.evals.judging import Judge
from ftsec_ray.method import Probe


def by_length(probe: Probe, judged: Sequence[Judged], judge: Judge) -> Iterator[dict[str, Any]]:
    """Rows of schema.lengths, without `cell`: each safety metric of a probe at each length that was
    recorded for its answers.
    """
    metrics = {name: verdict for name, verdict in probe.metrics.items() if name in schema.SAFETY}
    items = [item for item in judged if item.answer.probe == probe.name]
    lengths = sorted({tokens for item in items for tokens, _ in item.answer.ends})
    for tokens in lengths if metrics else ():
        heads = _heads(items, tokens, judge)
        for name, verdict in metrics.items():
            yield {"tokens": tokens, **asdict(share_of_verdict(name, heads, verdict))}


def _heads(items: Sequence[Judged], tokens: int, judge: Judge) -> list[Judged]:
    """Each answer with the verdict on its first `tokens` tokens, or on the whole answer if that is
    not longer.
    """
    starts = [item.answer.completion[: dict(item.answer.ends)[tokens]] for item in items]
    shorter = [i for i, item in enumerate(items) if starts[i] != item.answer.completion]
    given = judge([items[i].answer.prompt for i in shorter], [starts[i] for i in shorter])
    heads = list(items)
    for i, verdict in zip(shorter, given, strict=True):
        heads[i] = replace(items[i], verdict=verdict)
    return heads
