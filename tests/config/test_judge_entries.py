"""Judges of a sweep file that are models: mappings, rubrics and paths, and what of them is part of
a digest.
"""

from __future__ import annotations

import json

import pytest

from ftsec_ray.config.sweep import EvaluationConfig, JudgeConfig, ResourceSpec
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.decode import judge_of, scoring_of
from tests.plan.test_build_plan import sweep

BASE = {"models": ["ladder:0.2m"], "task": "microworld", "attacks": ["none"], "defenses": ["none"]}


def evaluation(tmp_path, **given):
    return load_sweep({"name": "s", **BASE, "evaluation": given}, base=tmp_path).evaluation


@pytest.fixture
def grader(tmp_path):
    folder = tmp_path / "grader"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_mapping_is_a_judge_with_its_rubric_read_and_its_path_whole(tmp_path, grader):
    (tmp_path / "mine.txt").write_text("Is {answer} what {request} asks?")
    found = evaluation(
        tmp_path,
        judge={"model": "grader", "rubric": "mine.txt"},
        judges=["qi2023", {"name": "harmbench", "model": "./grader"}, "llama_guard:grader"],
    )
    assert found.judge == JudgeConfig(model=str(grader), rubric="Is {answer} what {request} asks?")
    assert found.judge.file == "rubric"
    assert found.judges == (
        "qi2023",
        JudgeConfig(name="harmbench", model=str(grader)),
        f"llama_guard:{grader}",
    )


@pytest.mark.parametrize(
    ("judge", "place", "what"),
    [
        ({"model": "m@abc", "rubric": "nowhere.txt"}, "judge.rubric", "cannot read"),
        ({"model": "m@abc", "rubric": "only\n{answer}"}, "judge.rubric", "lacks {request}"),
        ({"model": "m@abc", "rubrik": "x"}, "judge.rubrik", "unknown key"),
        ({"rubric": "{request} {answer}"}, "judge.model", "missing"),
        ({"endpoint": "nowhere", "model": "m"}, "judge", "URL"),
        ({"model": "a\0b"}, "judge.model", "not a valid path"),
        ({"model": "~no-such-user/m"}, "judge.model", "not a valid path"),
        ({"model": "m@abc", "rubric": "~no-such-user/m"}, "judge.rubric", "cannot read"),
        ("classifier:" + "n" * 300, "judge", "not a valid path"),
    ],
)
def test_a_wrong_judge_is_a_fault_at_its_place(tmp_path, judge, place, what):
    with pytest.raises(SpecFaults) as caught:
        evaluation(tmp_path, judge=judge)
    found = [(at, fault.what) for at, fault in caught.value.faults]
    assert any(at == f"evaluation.{place}" and what in told for at, told in found), found


def planned(**given):
    return build_plan(sweep(evaluation=EvaluationConfig(**given)))


def scores(plan):
    return plan.stages[plan.cells[0].score]


def test_what_decides_the_verdicts_of_a_judge_is_in_the_digest_and_nothing_else(tmp_path, grader):
    first = JudgeConfig(model=str(grader))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "config.json").write_text("{}")
    same = [
        planned(judge=judge).cells[0].score
        for judge in (
            first,
            JudgeConfig(model=str(moved)),
            JudgeConfig(model=str(grader), parameters=10),
        )
    ]
    assert len(set(same)) == 1
    others = [
        first,
        JudgeConfig(model=str(grader), rubric="{request}{answer}"),
        JudgeConfig(model=str(grader), max_new_tokens=8),
        JudgeConfig(model=f"owner/name@{'a' * 40}"),
        JudgeConfig(model=f"owner/name@{'b' * 40}"),
        JudgeConfig(endpoint="http://h/v1", model="m"),
        JudgeConfig(endpoint="http://i/v1", model="m"),
        f"harmbench:{grader}",
    ]
    found = [planned(judge=judge).cells[0].score for judge in others]
    (grader / "config.json").write_text('{"a": 1}')
    found.append(planned(judge=first).cells[0].score)
    assert len(set(found)) == len(others) + 1


def test_a_worker_gets_the_judge_as_the_sweep_names_it_and_params_hold_no_path(tmp_path, grader):
    for judge in (
        JudgeConfig(model=str(grader), parameters=10),
        f"harmbench:{grader}",
        JudgeConfig(endpoint="http://h/v1", model="m", key_env="GRADER_KEY"),
    ):
        plan = planned(judge=judge, judges=("qi2023",))
        assert scoring_of(scores(plan)).judge == judge
        assert str(tmp_path) not in json.dumps(scores(plan).params)
        (further,) = plan.cells[0].opinions
        stage = plan.stages[further]
        assert judge_of(stage, stage.params["judge"]) == "qi2023"
        plan = planned(judges=(judge,))
        stage = plan.stages[plan.cells[0].opinions[0]]
        assert judge_of(stage, stage.params["judge"]) == judge
        assert "GRADER_KEY" not in json.dumps(stage.params)


def test_a_judge_asks_for_a_gpu_by_its_own_size_and_an_endpoint_for_none(grader):
    def resource(judge):
        spec = sweep(
            evaluation=EvaluationConfig(judge=judge),
            resources=ResourceSpec(gpus_per_stage="auto", gpu_memory_gib=80.0),
        )
        return scores(build_plan(spec)).resource

    assert resource(JudgeConfig(endpoint="http://h/v1", model="m")) == "cpu"
    assert resource("refusal_phrases") == "cpu"
    small, large = (
        resource(JudgeConfig(model=str(grader), parameters=n)) for n in (600_000_000, 13 * 10**9)
    )
    assert (small, large) == ("gpu:0.125", "gpu")
    with pytest.raises(SpecFaults, match="the judge needs about"):
        resource(JudgeConfig(model=str(grader), parameters=70 * 10**9))
