"""Checks the judges of a sweep, and the data that they need, before anything runs."""

from __future__ import annotations

from ftsec_ray.config.sweep import JudgeConfig, SweepSpec
from ftsec_ray.data.tasks import TASKS, splits_of
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.judging import get_judge
from ftsec_ray.evals.rubrics import RubricJudge


def evaluation_faults(spec: SweepSpec) -> list[tuple[str, SpecError]]:
    """The faults of the judges of a sweep, as (place, fault).

    They are: an unknown judge, a missing or unpinned model, a duplicate judge, a further judge that
    is already the task's own, a win rate that cannot be measured, and a search with several samples
    per prompt.
    """
    faults = []
    given = (spec.evaluation.judge, *spec.evaluation.judges)
    judges = [judge for judge in given if judge is not None]
    if spec.searches and spec.evaluation.samples > 1:
        fault = SpecError(
            "a search needs exactly one answer per prompt",
            f"evaluation.samples {spec.evaluation.samples}",
            "samples: 1 in a sweep with `search`",
            "use several samples in a second sweep, with the setting that the search chose",
        )
        faults.append(("evaluation", fault))
    if (pairs := spec.evaluation.win_rate) is not None:
        try:
            _check_pairs(pairs, spec)
        except SpecError as fault:
            faults.append(("evaluation.win_rate", fault))
    for judge in dict.fromkeys(judges):
        try:
            get_judge(judge)
            if judges.count(judge) > 1:
                raise SpecError("a duplicate judge", str(judge), "each judge once")
            own = [task.name for task in spec.tasks if TASKS[task.kind].judge == judge]
            if spec.evaluation.judge is None and own:
                raise SpecError(
                    "a further judge that is already the judge of a task",
                    f"{judge}, the judge of task {own[0]}",
                    "a different judge",
                    "remove it from evaluation.judges: the results contain its verdicts anyway",
                )
        except SpecError as fault:
            faults.append(("evaluation", fault))
    return faults


def _check_pairs(pairs: JudgeConfig, spec: SweepSpec) -> None:
    """Raise SpecError if the judge of the win rate cannot follow a rubric, or if a task has no
    benign requests.
    """
    if not isinstance(get_judge(pairs), RubricJudge):
        raise SpecError(
            "this judge cannot compare pairs of answers: it does not take a rubric",
            pairs.file,
            "a general model, or an endpoint",
            "leave out `name`, and give `model`, or `endpoint` and `model`",
        )
    for task in spec.tasks:
        splits = splits_of(task)
        if splits is not None and "benign_test" not in splits:
            raise SpecError(
                "a win rate needs a task with benign requests",
                task.name,
                "a split benign_test",
                f"add the split to the task {task.name}, or leave out win_rate",
            )
