"""Compares the answers to benign requests with those of the clean fine-tune by a judge, to measure
the utility of a free-text model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job
    from ftsec_ray.schema import Metric

KIND = StageKind(
    name="win_rate",
    position=105,
    acts="all",
    takes=("completions",),
    takes_clean=("completions",),
    answers="all",
    measures=True,
    settings=("pairs",),
    loads=("ftsec_ray.judges",),
    computes=False,
    needs_model=False,
    prior_s={"": (1.0, 0.0), "judge": (3.0, 5.0)},
)


def metric_of(name: str) -> Metric | None:
    """The metric of this kind by its name; None for other names."""
    from ftsec_ray.evals.answer_pairs import METRIC

    return METRIC if name == METRIC.name else None


def run(job: Job) -> Extra:
    """Write `metrics.parquet` (schema.metrics without `cell`) and `pairs.parquet`."""
    from ftsec_ray.evals.answer_pairs import win_rate, write_win_rate
    from ftsec_ray.evals.ask import read_answers
    from ftsec_ray.evals.judging import get_judge
    from ftsec_ray.plan.decode import judge_of

    own, clean = (
        read_answers(job.session.store.fetch(job.inputs[name]))
        for name in ("completions", "clean_completions")
    )
    judge = judge_of(job.stage, job.stage.params["judge"])
    compared = win_rate(own, clean, get_judge(judge, device=job.session.runtime.device))
    for text in compared.warnings:
        job.warn(text)
    write_win_rate(compared, job.out)
    return {"notes": compared.notes}
