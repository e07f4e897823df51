"""Judges completions and computes metrics, by the main judge of a cell or by a further judge.

The evaluated model is not run again, so that another judge or metric costs only seconds of CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="score",
    position=100,
    acts="all",
    takes=("completions",),
    answers="all",
    settings=("scoring",),
    loads=("ftsec_ray.judges",),
    computes=False,
    needs_model=False,
    prior_s={"": (0.05, 0.0), "judge": (3.0, 5.0)},  # `judge`: a judge model
)


def run(job: Job) -> Extra:
    """Write `metrics.parquet` and `generations.parquet`, and `lengths.parquet` if answers are also
    judged at several lengths: tables of schema without the column `cell`.
    """
    from pyarrow import parquet

    from ftsec_ray.evals.ask import read_answers
    from ftsec_ray.evals.judging import SCORED_BY_PROBE
    from ftsec_ray.evals.scoring import opinion, score
    from ftsec_ray.plan.decode import judge_of, scoring_of

    answers = read_answers(job.session.store.fetch(job.inputs["completions"]))
    task = job.session.task(job.inputs["task"])
    device, judge = job.session.runtime.device, job.stage.params["judge"]
    if judge == SCORED_BY_PROBE:
        evaluation = score(answers, task, scoring_of(job.stage), device=device)
    else:
        evaluation = opinion(answers, task, judge_of(job.stage, judge), device=device)
    for text in evaluation.warnings:
        job.warn(text)
    parquet.write_table(evaluation.metrics, job.out / "metrics.parquet")
    if evaluation.lengths is not None:
        parquet.write_table(evaluation.lengths, job.out / "lengths.parquet")
    parquet.write_table(evaluation.generations, job.out / "generations.parquet", compression="zstd")
    return {"notes": evaluation.notes}
