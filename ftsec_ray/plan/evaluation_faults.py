"""What is wrong with the judges of a sweep and with what they are to read, before anything runs."""

from __future__ import annotations

from ftsec_ray.config.sweep import JudgeConfig, SweepSpec
from ftsec_ray.data.tasks import TASKS, splits_of
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.judging import get_judge
from ftsec_ray.evals.rubrics import RubricJudge


def evaluation_faults(spec: SweepSpec) -> list[tuple[str, SpecError]]:
    """One for every judge that there is none of, whose model is not there or not pinned, that is
    named twice or is a task's own already, and for samples of a search.
    """
    faults = []
    given = (spec.evaluation.judge, *spec.evaluation.judges)
    judges = [judge for judge in given if judge is not None]
    if spec.searches and spec.evaluation.samples > 1:
        fault = SpecError(
            "a search with several samples per prompt: it weighs trials by one verdict per prompt",
            f"evaluation.samples {spec.evaluation.samples}",
            "samples 1 in a sweep with `search`",
            "sample in a sweep of its own, with the attack that the search chose",
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
                raise SpecError("a judge that is named twice", str(judge), "each judge once")
            own = [task.name for task in spec.tasks if TASKS[task.kind].judge == judge]
            if spec.evaluation.judge is None and own:
                raise SpecError(
                    "a further judge that is the task's own already",
                    f"{judge}, the judge of task {own[0]}",
                    "other judges beside it",
                    "leave it out of evaluation.judges: its verdicts stand in the tables",
                )
        except SpecError as fault:
            faults.append(("evaluation", fault))
    return faults


def _check_pairs(pairs: JudgeConfig, spec: SweepSpec) -> None:
    """SpecError for a judge of pairs that is not asked in words, and for a task without benign
    requests.
    """
    if not isinstance(get_judge(pairs), RubricJudge):
        raise SpecError(
            "a judge of pairs that is not asked in words",
            pairs.file,
            "a general model, or an endpoint",
            "leave `name` out, and give `model`, or `endpoint` and `model`",
        )
    for task in spec.tasks:
        splits = splits_of(task)
        if splits is not None and "benign_test" not in splits:
            raise SpecError(
                "a win rate on a task without benign requests to answer",
                task.name,
                "a split benign_test",
                f"add one to the task {task.name}, or leave win_rate out",
            )
