"""Win rate over the clean tune: pairs in both orders, ties, what cannot be read, and the stage in a plan."""

from __future__ import annotations

import math
import statistics

import pytest
from pyarrow import parquet

from ftsec_ray import api, schema
from ftsec_ray.config.sweep import EvaluationConfig, JudgeConfig
from ftsec_ray.errors import SpecFaults
from ftsec_ray.evals.answer_pairs import win_rate, write_win_rate
from ftsec_ray.evals.ask import Answer, Answers
from ftsec_ray.evals.judging import get_judge
from ftsec_ray.evals.rubrics import Reply, RubricJudge, first_share_in, pair_question
from ftsec_ray.method import Prompt
from ftsec_ray.plan import build_plan
from ftsec_ray.registry import name_of
from tests.plan.test_build_plan import sweep


class Longest(RubricJudge):
    """Prefers the longer answer, the first where it is told to, and says nothing on `mute`."""

    def __init__(self, *, first=False):
        self.config, self.first, self.asked = JudgeConfig(model="m"), first, []
        self.name = "longest"

    def replies(self, questions):
        self.asked += questions
        return [self._reply(text) for text in questions]

    def _reply(self, text):
        first, second = (
            text.split(f"[{place} ANSWER]\n")[1].split("\n[END")[0] for place in ("FIRST", "SECOND")
        )
        if "mute" in first + second:
            return Reply(None, "too long")
        word = (
            "TIE"
            if len(first) == len(second)
            else "FIRST"
            if self.first or len(first) > len(second)
            else "SECOND"
        )
        return Reply(f"Both are fine.\nVERDICT: {word}", word)


def answers(*texts, probe="benign", sample=0):
    return [
        Answer(
            probe=probe,
            prompt=Prompt(prompt_id=str(i), chat=[{"role": "user", "content": f"q{i}"}]),
            completion=text,
            sample=sample,
        )
        for i, text in enumerate(texts)
    ]


def said(*groups):
    return Answers(
        probes=(),
        answers=tuple(a for group in groups for a in group),
        measured=(),
        template_hash="",
    )


def test_a_win_a_loss_a_tie_and_an_equal_answer():
    judge = Longest()
    own = said(answers("longer one", "no", "abc", "same"), answers("harm!", probe="harmful"))
    found = win_rate(own, said(answers("short", "yes!", "xyz", "same")), judge)
    shares = [1.0, 0.0, 0.5, 0.5]
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(shares) / math.sqrt(4)
    assert [pair.share for pair in found.pairs] == shares
    assert (found.row.value, found.row.n, found.row.n_null) == (0.5, 4, 0)
    assert (found.row.ci_low, found.row.ci_high) == (
        pytest.approx(0.5 - half),
        pytest.approx(0.5 + half),
    )
    assert len(judge.asked) == 6  # the equal answers need no question
    assert (found.notes["equal_answers"], found.notes["pairs"]) == (1, 4)
    assert found.warnings == ()


def test_a_judge_that_prefers_a_place_gives_one_half_and_is_warned_of():
    found = win_rate(said(answers("a", "bb")), said(answers("ccc", "d")), Longest(first=True))
    assert [pair.share for pair in found.pairs] == [0.5, 0.5]
    assert found.notes["first_place_share"] == 1.0
    assert "prefers the first answer in 100%" in found.warnings[0]


def test_what_cannot_be_read_counts_in_no_rate():
    own = said(answers("mute", "bb"))
    found = win_rate(own, said(answers("a", "b", "left alone")), Longest())
    assert (found.row.value, found.row.n, found.row.n_null) == (1.0, 1, 1)
    assert "1 of 2 pairs" in found.warnings[0]
    assert "1 benign answers have no counterpart" in found.warnings[1]
    nothing = win_rate(said(answers("mute")), said(answers("b")), Longest())
    assert (nothing.row.value, nothing.row.n, nothing.row.n_null) == (None, 0, 1)


def test_samples_of_a_prompt_count_once():
    own = said(answers("aa", "b"), answers("a", "b", sample=1))
    clean = said(answers("a", "bb"), answers("aa", "bb", sample=1))
    found = win_rate(own, clean, Longest())
    assert (found.row.value, found.row.n) == (0.25, 2)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("VERDICT: FIRST", 1.0),
        ("I think so.\n**Verdict: second**", 0.0),
        ("verdict: tie.", 0.5),
        ("VERDICT: FIRST\nVERDICT: SECOND", None),
        ("The first one.", None),
        ("VERDICT: FIRST or SECOND", None),
        ("", None),
    ],
)
def test_a_preference_is_what_one_line_says(text, share):
    assert first_share_in(text) == share


def test_an_answer_that_holds_marks_is_not_filled_in_again():
    asked = pair_question("{request}|{first}|{second}", "r", "{second}", "{request}")
    assert asked.startswith("r|{second}|{request}\n")


def test_the_tables_have_the_columns_of_the_schema(tmp_path):
    write_win_rate(win_rate(said(answers("a")), said(answers("bb")), Longest()), tmp_path)
    metrics = parquet.read_table(tmp_path / "metrics.parquet")
    assert metrics.schema.names == [n for n in schema.METRICS_TABLE.names if n != "cell"]
    assert metrics.to_pylist()[0]["metric"] == "win_rate"
    pairs = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert pairs == [
        {
            "prompt_id": "0",
            "sample": 0,
            "share": 0.0,
            "raw_first": "SECOND",
            "raw_second": "FIRST",
        }
    ]
    assert schema.METRICS["win_rate"].better == "higher"


PAIRS = JudgeConfig(endpoint="http://127.0.0.1:9/v1", model="grader")


def test_every_cell_but_the_clean_one_is_compared_with_it():
    given = {"attacks": ("none", "badnets"), "defenses": ((), ("self_reminder",))}
    plan = build_plan(sweep(**given, evaluation=EvaluationConfig(win_rate=PAIRS)))
    stages = [stage for stage in plan.stages.values() if stage.kind == "win_rate"]
    assert len(stages) == 3
    clean = next(c for c in plan.cells if name_of(c.attack) == "none" and not c.defenses)
    assert not any(step.kind == "win_rate" for step in clean.steps)
    (asked,) = [step.digest for step in clean.steps if step.kind == "generate"]
    assert {dict(stage.inputs)["clean_completions"] for stage in stages} == {asked}
    without = build_plan(sweep(**given))
    assert set(without.stages) == set(plan.stages) - {stage.digest for stage in stages}


def test_a_clean_tune_outside_of_the_grid_is_made_as_far_as_its_answers():
    plan = build_plan(sweep(attacks=("badnets",), evaluation=EvaluationConfig(win_rate=PAIRS)))
    (cell,) = plan.cells
    kinds = [plan.stages[digest].kind for digest in cell.stages]
    assert (kinds.count("generate"), kinds.count("score"), kinds.count("win_rate")) == (2, 1, 1)
    assert set(plan.stages) == set(cell.stages)


@pytest.mark.parametrize(
    ("win_rate", "text"),
    [
        ({"model": "owner/name"}, "has no commit"),
        ({"name": "harmbench", "model": "o/n@" + "0" * 40}, "does not take a rubric"),
        (
            {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "rubric": "{request}\n{first}"},
            "lacks {second}",
        ),
        ("grader", "win_rate"),
    ],
)
def test_a_judge_of_pairs_that_cannot_be_is_a_fault_before_anything_runs(win_rate, text):
    with pytest.raises(SpecFaults, match=text):
        api.make_plan(
            {
                "name": "m",
                "models": ["ladder:0.2m"],
                "task": "microworld",
                "attacks": ["none", "badnets"],
                "defenses": ["none"],
                "evaluation": {"win_rate": win_rate},
            }
        )


def test_the_judges_that_are_asked_in_words_can_compare():
    assert isinstance(get_judge(PAIRS), RubricJudge)
