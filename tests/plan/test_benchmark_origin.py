"""Benchmarks in a plan: what decides their digests, who shares them, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan import benchmark_origin, build_plan
from ftsec_ray.plan.benchmark_origin import benchmark_origin as origin_of
from tests.plan.test_build_plan import LADDER, defense, kinds, sweep

TASK = """
task: words
include: common.yaml
dataset_path: json
dataset_kwargs: {data_files: {test: data/words.jsonl, train: [shots.jsonl]}}
process_docs: !function helpers.clean
"""
FILES = {
    "mine/words.yaml": TASK,
    "mine/common.yaml": "output_type: multiple_choice\n",
    "mine/helpers.py": "def clean(docs):\n    return docs\n",
    "mine/data/words.jsonl": '{"a": 1}\n',
    "mine/shots.jsonl": '{"a": 2}\n',
    "lm_eval/tasks/mmlu/default/_mmlu.yaml": "group: mmlu\ntask:\n  - mmlu_stem\n",
    "lm_eval/tasks/gsm8k/gsm8k.yaml": "tag:\n  - math_word_problems\ntask: gsm8k\n",
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a task of one's own, and an lm-eval of two tasks."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    spec = ModuleSpec("lm_eval", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "lm_eval")]
    monkeypatch.setattr(benchmark_origin, "find_spec", lambda name: spec)
    monkeypatch.setattr(benchmark_origin, "version_of", lambda name: "0.4.13")
    origin_of.cache_clear()
    yield tmp_path
    origin_of.cache_clear()


def plan_of(*benchmarks, limit=None, **rest):
    evaluation = EvaluationConfig(benchmarks=tuple(map(str, benchmarks)), benchmark_limit=limit)
    return build_plan(sweep(evaluation=evaluation, **rest))


def stages_of(plan):
    return [stage for stage in plan.stages.values() if stage.kind == "benchmark"]


def faults_of(*benchmarks):
    with pytest.raises(SpecFaults) as raised:
        plan_of(*benchmarks)
    return str(raised.value)


def test_no_benchmarks_no_stage_and_the_digests_of_before():
    plain = build_plan(sweep())
    assert stages_of(plain) == []
    limited = build_plan(sweep(evaluation=EvaluationConfig(benchmark_limit=5)))
    assert limited.digest == plain.digest


def test_one_stage_for_each_benchmark_beside_the_questions(there):
    plain, plan = build_plan(sweep()), plan_of("mmlu", there / "mine/words.yaml", limit=50)
    assert set(plain.stages) < set(plan.stages), "what a cell has besides stays as it is"
    group, own = stages_of(plan)
    assert group.params == {
        "benchmark": "mmlu",
        "lm_eval": "0.4.13",
        "limit": 50,
        "numerics": "portable",
    }
    assert own.params["benchmark"] == "words"
    assert set(own.params["content"]) == {
        "words.yaml",
        "common.yaml",
        "helpers.py",
        "data/words.jsonl",
        "shots.jsonl",
    }
    assert own.where["benchmark_path"] == str(there / "mine/words.yaml")
    assert group.input("model") == plan.cells[0].of_kind("finetune")[0].digest
    assert plan.cells[0].measurements == [group.digest, own.digest]
    assert plan.cells[0].answers[-2:] == [group.digest, own.digest]
    assert plan.answers >= {group.digest, own.digest}
    assert group.cost_s > own.cost_s, "57 tasks of 50 documents, and one"


def test_a_task_of_ones_own_is_its_bytes_and_not_its_place(there, tmp_path):
    one = stages_of(plan_of(there / "mine/words.yaml"))[0].digest
    (there / "mine").rename(there / "moved")
    origin_of.cache_clear()
    assert stages_of(plan_of(there / "moved/words.yaml"))[0].digest == one
    for name in ("data/words.jsonl", "helpers.py", "common.yaml", "shots.jsonl"):
        file = there / "moved" / name
        before = file.read_text()
        file.write_text(before + "\n")
        origin_of.cache_clear()
        assert stages_of(plan_of(there / "moved/words.yaml"))[0].digest != one
        file.write_text(before)


def test_defenses_that_wrap_generation_have_a_benchmark_of_their_own_and_attacks_share(there):
    plan = plan_of(
        "gsm8k",
        attacks=("none", "soft_prompt"),
        defenses=((), (defense("self_reminder"),), (defense("weight_statistics"),)),
    )
    assert kinds(plan)["benchmark"] == 2
    assert {stage.method for stage in stages_of(plan)} == {None, "self_reminder"}


def test_a_model_that_is_served_under_another_template_is_asked_under_it(there):
    served = replace(LADDER, serve_template="{{ messages }}")
    (stage,) = stages_of(plan_of("gsm8k", models=(served,)))
    assert stage.params["serve_template"] == "{{ messages }}"


def test_unknown_names_are_refused_with_the_nearest(there):
    text = faults_of("mmul", "math_word_problems", "gsm8k")
    assert "no task, group or tag of this name" in text
    assert "did you mean 'mmlu'" in text
    assert text.count("- evaluation.benchmarks") == 1


def test_without_lm_eval_the_plan_says_what_to_install(monkeypatch):
    monkeypatch.setattr(benchmark_origin, "find_spec", lambda name: None)
    origin_of.cache_clear()
    assert 'pip install "ftsec-ray[benchmarks]"' in faults_of("mmlu")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("gone.yaml", None, "cannot read"),
        ("bad.yaml", "task: [", "cannot read"),
        ("list.yaml", "- task\n", "not a mapping"),
        ("self.yaml", "include: self.yaml\n", "includes itself"),
        ("group.yaml", "group: a\ntask: [b]\n", "exactly one task"),
        ("name.yaml", "task: a b\n", "exactly one task"),
        ("data.yaml", "task: a\ndataset_kwargs: {data_files: gone.jsonl}\n", "gone.jsonl"),
        ("code.yaml", "task: a\nprocess_docs: !function gone.clean\n", "module is missing"),
    ],
)
def test_a_task_file_that_names_what_is_not_there_is_refused(there, name, text, wanted):
    if text is not None:
        (there / name).write_text(text)
    assert wanted in faults_of(there / name)


def test_two_benchmarks_of_one_name_are_refused(there):
    (there / "other.yaml").write_text("task: gsm8k\n")
    assert "same name 'gsm8k'" in faults_of("gsm8k", there / "other.yaml")


@pytest.mark.parametrize("name", ["a\0b.yaml", "~no-such-user/a.yaml", "n" * 300 + ".yaml"])
def test_a_path_that_no_system_call_takes_is_a_fault_at_its_place(there, name):
    given = {"models": ["ladder:1m"], "task": "microworld", "attacks": ["none"]}
    with pytest.raises(SpecFaults, match=r"evaluation.benchmarks\[0\]: not a valid path"):
        load_sweep({**given, "defenses": ["none"], "evaluation": {"benchmarks": [name]}})


def test_paths_start_at_the_sweep_file_and_a_benchmark_stands_once(there):
    (there / "sweep.yaml").write_text(
        "models: [ladder:1m]\ntask: microworld\nattacks: [none]\ndefenses: [none]\n"
        "evaluation: {benchmarks: [mmlu, mine/words.yaml]}\n"
    )
    spec = load_sweep(there / "sweep.yaml")
    assert spec.evaluation.benchmarks == ("mmlu", str(there / "mine/words.yaml"))
    with pytest.raises(SpecFaults, match="a duplicate benchmark"):
        load_sweep(
            (there / "sweep.yaml").read_text().replace("mmlu,", "mine/words.yaml,"), base=there
        )
