"""From a sweep to its plan: which stages a cell has, and which of them it shares."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ftsec_ray import lifecycle
from ftsec_ray.config.sweep import (
    AlignSpec,
    BudgetSpec,
    EvaluationConfig,
    ExcludeRule,
    ModelSpec,
    NodeType,
    ResourceSpec,
    SourceSpec,
    SweepSpec,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import SpecError, SpecFaults
from ftsec_ray.identity import content_hash
from ftsec_ray.plan import Stage, build_plan
from ftsec_ray.plan.decode import (
    align_of,
    generation_of,
    methods_of,
    scoring_of,
    task_of,
    training_of,
)
from ftsec_ray.registry import ATTACKS, DEFENSES

LADDER = ModelSpec(name="ladder:1m", source="ladder:1m", family="ladder", aligned=True)
WORLD = TaskSpec(name="microworld")


def attack(name, **params):
    return ATTACKS.get(name)(**params)


def defense(name, **params):
    return DEFENSES.get(name)(**params)


def sweep(
    *, attacks=("none",), defenses=((),), models=(LADDER,), tasks=(WORLD,), seeds=(0,), **rest
):
    return SweepSpec(
        name="s",
        models=models,
        tasks=tasks,
        attacks=tuple(attack(a) if isinstance(a, str) else a for a in attacks),
        defenses=tuple(
            tuple(defense(d) if isinstance(d, str) else d for d in stack) for stack in defenses
        ),
        seeds=seeds,
        **rest,
    )


def kinds(plan):
    return dict(Counter(stage.kind for stage in plan.stages.values()))


def only(plan, kind):
    (stage,) = [stage for stage in plan.stages.values() if stage.kind == kind]
    return stage


def test_a_plain_cell_is_source_align_finetune_generate_score():
    plan = build_plan(sweep())
    once = dict.fromkeys(("task", "source", "align", "finetune", "generate", "score"), 1)
    assert kinds(plan) == once
    source, align, tune, generate, score = (
        only(plan, kind) for kind in ("source", "align", "finetune", "generate", "score")
    )
    assert align.inputs == (("model", source.digest),)
    assert tune.inputs == (
        ("model", align.digest),
        ("rows", only(plan, "task").digest),
        ("task", only(plan, "task").digest),
    )
    assert generate.input("model") == tune.digest
    assert score.input("completions") == generate.digest
    assert plan.cells[0].score == score.digest
    assert plan.answers == {score.digest}
    assert (source.seed, align.seed, tune.seed) == (None, None, 0)


def test_inputs_come_before_their_consumers():
    plan = build_plan(
        sweep(
            attacks=("none", "badnets", "refusal_ablation"),
            seeds=(0, 1),
            defenses=((), ("onion", "lisa", "safe_lora", "weight_statistics"), ("vaccine",)),
        )
    )
    seen = set()
    for stage in plan.stages.values():
        assert {given for _, given in stage.inputs} <= seen
        seen.add(stage.digest)
    # planned where a sweep asks for them: test_benchmark_origin.py, evals/test_win_rate.py
    asked_for = {"benchmark", "win_rate"}
    assert {stage.kind for stage in plan.stages.values()} == {*lifecycle.kinds()} - asked_for


def test_the_unaligned_rung_of_the_ladder_shares_its_pre_training():
    base = replace(LADDER, name="ladder:1m-base", source="ladder:1m-base", aligned=False)
    plan = build_plan(sweep(models=(LADDER, base)))
    assert kinds(plan) == {
        "task": 1,
        "source": 1,
        "align": 1,
        "finetune": 2,
        "generate": 2,
        "score": 2,
    }


def test_the_attacker_moves_first_and_the_stack_answers_in_order():
    plan = build_plan(sweep(attacks=("badnets",), defenses=(("onion", "safe_lora"),)))
    cell = plan.cells[0]
    crafts = cell.of_kind("craft")
    assert [step.methods for step in crafts] == ["badnets", "onion"]
    assert cell.filters == [crafts[1].digest]
    attacked, filtered = (plan.stages[step.digest] for step in crafts)
    assert attacked.input("rows") == only(plan, "task").digest
    assert filtered.input("rows") == attacked.digest
    assert only(plan, "finetune").input("rows") == filtered.digest
    assert only(plan, "revise").input("model") == only(plan, "finetune").digest
    assert only(plan, "generate").input("model") == only(plan, "revise").digest


def test_methods_get_the_roles_that_they_need_and_no_others():
    plan = build_plan(sweep(attacks=("badnets",), defenses=(("onion", "safe_lora"),)))
    source, align, revise = only(plan, "source"), only(plan, "align"), only(plan, "revise")
    assert revise.method == "safe_lora"
    assert dict(revise.inputs) == {
        "model": only(plan, "finetune").digest,
        "task": only(plan, "task").digest,
        "reference": align.digest,
        "unaligned": source.digest,
        "start": align.digest,
    }
    assert [role for role, _ in only(plan, "generate").inputs] == ["model", "task"]


def test_a_detector_sees_the_raw_tune_and_a_bank_of_clean_models():
    plan = build_plan(
        sweep(attacks=("refusal_ablation",), defenses=(("weight_statistics", "safe_lora"),))
    )
    inspect, bank = only(plan, "inspect"), only(plan, "bank")
    assert inspect.input("model") == only(plan, "finetune").digest
    assert inspect.input("clean_bank") == bank.digest
    assert bank.input("model") == only(plan, "align").digest
    assert bank.params["size"] == DEFENSES.get("weight_statistics")().bank
    (step,) = plan.cells[0].of_kind("inspect")
    assert (step.methods, step.digest) == ("weight_statistics", inspect.digest)
    assert inspect.digest in plan.answers


def test_a_bank_is_tuned_as_its_suspects_without_the_attack_and_shared_where_they_agree():
    """One per model to start from, defenses at tuning time, and number of rows."""
    attacks = ("none", "badnets", "refusal_ablation", "badedit", "harmful_tuning")
    stacks = (("weight_statistics",), ("lisa", "weight_statistics"), ("weight_statistics", "onion"))
    plan = build_plan(sweep(attacks=attacks, defenses=stacks))
    banks = [stage for stage in plan.stages.values() if stage.kind == "bank"]
    by_digest = {stage.digest: stage for stage in banks}
    used = {}
    for cell in plan.cells:
        inspect = plan.stages[cell.of_kind("inspect")[0].digest]
        suspect, bank = plan.stages[inspect.input("model")], by_digest[inspect.input("clean_bank")]
        assert bank.input("model") == suspect.input("model")
        assert bank.params["training"] == suspect.params["training"]
        assert bank.method == suspect.method
        key = (type(cell.attack).__module__.rsplit(".", 1)[-1], len(cell.defenses), bank.method)
        used[key] = bank.digest
    (task,) = (stage.digest for stage in plan.stages.values() if stage.kind == "task")
    for name, count in (("lisa", 2), (None, 2)):
        bank = by_digest[used["none", count, name]]
        assert bank.input("rows") == task
        assert used["badnets", count, name] == bank.digest, "badnets keeps the number of rows"
        assert used["refusal_ablation", count, name] == bank.digest, "it acts after the tune"
        harmful = by_digest[used["harmful_tuning", count, name]]
        assert plan.stages[harmful.input("rows")].method == "harmful_tuning"
        assert used["badedit", count, name] not in (bank.digest, harmful.digest)
    assert used["none", 1, None] == used["none", 2, None], "stripping words keeps the rows"
    assert len(banks) == 2 * 3


def test_a_method_whose_rows_a_task_does_not_have_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    given = tuple((name, SourceSpec(path=str(file))) for name in ("train", "mine"))
    rows = TaskSpec(name="mine", kind="rows", splits=given)
    with pytest.raises(SpecFaults) as caught:
        build_plan(sweep(defenses=(("onion",),), tasks=(rows,)))
    assert "neither for training nor for evaluation" in str(caught.value)
    assert "a split 'trusted'" in str(caught.value)
    for params in ({"threshold": 2.0}, {"trusted_split": "mine"}):
        assert build_plan(sweep(defenses=((defense("onion", **params),),), tasks=(rows,))).stages
    own_train = TaskSpec(name="own", kind="sst2", splits=given[:1])
    with pytest.raises(SpecFaults, match="trusted"):
        build_plan(sweep(defenses=(("onion",),), tasks=(own_train,)))
    assert build_plan(
        sweep(defenses=(("onion",),), tasks=(TaskSpec(name="s", kind="sst2"),))
    ).stages


def test_a_filter_that_drops_rows_gives_its_suspects_a_bank_of_fewer_steps():
    stacks = ((defense("onion", action="drop"), "weight_statistics"), ("weight_statistics",))
    plan = build_plan(sweep(defenses=stacks))
    rows = {stage.input("rows") for stage in plan.stages.values() if stage.kind == "bank"}
    assert {plan.stages[digest].kind for digest in rows} == {"craft", "task"}


def test_what_does_not_differ_is_shared():
    plan = build_plan(
        sweep(
            attacks=("none", "badnets", "refusal_ablation"),
            defenses=((), ("onion",), ("safe_lora",), ("self_reminder",), ("vaccine",)),
        )
    )
    counts = kinds(plan)
    # rows: badnets, onion on plain rows, onion on badnets; refusal_ablation tunes as none does
    assert counts["craft"] == 3
    assert counts["prepare"] == 1
    # (plain, badnets) x (no change before tuning, onion, vaccine)
    assert counts["finetune"] == 6
    assert plan.naive_runs == sum(len(cell.stages) for cell in plan.cells)
    assert plan.naive_runs > 2 * len(plan.stages)


def test_each_stage_counts_its_cells():
    plan = build_plan(
        sweep(attacks=("none", "badnets"), defenses=((), ("safe_lora",), ("onion",)), seeds=(0, 1))
    )
    assert plan.cells_of(only(plan, "source").digest) == len(plan.cells) == 12
    by_hand = Counter(digest for cell in plan.cells for digest in cell.stages)
    assert all(plan.cells_of(digest) == by_hand[digest] for digest in plan.stages)


def test_seeds_share_the_model_and_the_task_only():
    plan = build_plan(sweep(attacks=("badnets",), seeds=(0, 1, 2)))
    assert kinds(plan) == {
        **dict.fromkeys(("task", "source", "align"), 1),
        **dict.fromkeys(("craft", "finetune", "generate", "score"), 3),
    }


def test_cells_of_a_rule_are_left_out():
    stacks = ((), ("onion",), ("onion", "lisa"), ("lisa",))
    plan = build_plan(
        sweep(
            attacks=("none", "badnets"),
            defenses=stacks,
            exclude=(
                ExcludeRule(attack="none", defense="onion"),
                ExcludeRule(attack="badnets", defense="none"),
            ),
        )
    )
    found = {(cell.attack.__class__.__name__, len(cell.defenses)) for cell in plan.cells}
    assert len(plan.cells) == 5
    assert ("BadNets", 0) not in found


def test_one_model_twice_and_one_method_twice_make_no_second_cell():
    assert len(build_plan(sweep(attacks=("badnets", "badnets"), seeds=(0, 0))).cells) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"training": TrainingConfig(learning_rate=1e-3)},
        {"seeds": (1,)},
        {"attacks": (attack("badnets", repeat=2),)},
        {"evaluation": EvaluationConfig(prompts=7)},
        {"tasks": (TaskSpec(name="microworld", options=(("train_rows", 64),)),)},
    ],
)
def test_what_decides_a_result_changes_the_digest_of_its_evaluation(change):
    before = build_plan(sweep(attacks=("badnets",)))
    after = build_plan(sweep(**{"attacks": ("badnets",), **change}))
    assert before.cells[0].score != after.cells[0].score
    assert before.digest != after.digest


@pytest.mark.parametrize(
    "change",
    [{"backend": "continuous"}, {"temperature": 0.7}, {"temperature": 0.7, "samples": 2}],
)
def test_how_answers_are_made_is_in_the_digest_where_it_is_not_the_usual_way(change):
    usual = only(build_plan(sweep()), "generate")
    other = only(build_plan(sweep(evaluation=EvaluationConfig(**change))), "generate")
    assert other.digest != usual.digest
    assert sorted(usual.params["generation"]) == ["max_new_tokens", "perplexity_rows", "prompts"]
    assert generation_of(other) == EvaluationConfig(max_new_tokens=48, **change)


def test_the_limit_of_new_tokens_is_that_of_the_ladder_or_of_real_models(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}")
    source = str(tmp_path / "real")
    real = ModelSpec(name="real", source=source, family="f", aligned=True, parameters=9)
    attacks = ("badnets", "none")
    by_limit = {}
    for limit in (None, 48, 256):
        evaluation = EvaluationConfig(max_new_tokens=limit)
        plan = build_plan(sweep(models=(LADDER, real), attacks=attacks, evaluation=evaluation))
        for cell in plan.cells:
            (stage,) = [
                plan.stages[one] for one in cell.stages if plan.stages[one].kind == "generate"
            ]
            by_limit.setdefault((limit, cell.model.name.partition(":")[0]), set()).add(
                (stage.digest, generation_of(stage).max_new_tokens)
            )
    assert by_limit[None, "ladder"] == by_limit[48, "ladder"]
    assert by_limit[None, "real"] == by_limit[256, "real"]
    assert {tokens for _, tokens in by_limit[None, "ladder"]} == {48}
    assert {tokens for _, tokens in by_limit[None, "real"]} == {256}


def test_samples_need_a_temperature_and_a_back_end_that_can_draw():
    with pytest.raises(SpecError, match="all be the same"):
        EvaluationConfig(samples=3)
    with pytest.raises(SpecError, match="one random stream"):
        EvaluationConfig(temperature=1.0, backend="continuous")


def test_another_evaluation_reruns_no_tune():
    before, after = build_plan(sweep()), build_plan(sweep(evaluation=EvaluationConfig(prompts=7)))
    assert only(before, "finetune").digest == only(after, "finetune").digest


@pytest.mark.parametrize(
    "change",
    [
        {"resources": ResourceSpec(workers=7, micro_batch=2, gpus_per_stage=1.0)},
        {"question": "why?"},
        {
            "resources": ResourceSpec(gpus_per_stage="auto", gpu_memory_gib=24.0),
            "budget": BudgetSpec(usd=5.0, gpu_hours=1.0),
            "prices": (NodeType(name="a", gpus=1, cpus=4, usd_per_hour=2.0),),
        },
        {"models": (replace(LADDER, name="renamed", parameters=5),)},
    ],
)
def test_where_and_how_it_runs_and_how_it_is_called_change_no_stage(change):
    assert set(build_plan(sweep(attacks=("badnets",))).stages) == set(
        build_plan(sweep(**{"attacks": ("badnets",), **change})).stages
    )


def test_stages_that_touch_a_model_take_a_gpu_where_the_sweep_has_one():
    plan = build_plan(
        sweep(
            attacks=("badnets",), defenses=(("onion",),), resources=ResourceSpec(gpus_per_stage=1.0)
        )
    )
    found = {(stage.kind, stage.method): stage.resource for stage in plan.stages.values()}
    assert found["finetune", None] == found["generate", "badnets"] == found["align", None] == "gpu"
    assert found["task", None] == found["craft", "badnets"] == "cpu"
    assert found["craft", "onion"] == "gpu", "it reads a model"
    hub = ModelSpec(name="m", source="owner/m", family="f", aligned=True)
    assert (
        only(
            build_plan(sweep(models=(hub,), resources=ResourceSpec(gpus_per_stage=1.0))), "source"
        ).resource
        == "cpu"
    )


def test_an_alignment_of_the_sweep_makes_the_loaded_model_the_twin():
    model = ModelSpec(name="m", source="owner/m-135m", family="f", aligned=False, align=AlignSpec())
    plan = build_plan(sweep(models=(model,), defenses=(("safe_lora",),)))
    align, revise = only(plan, "align"), only(plan, "revise")
    assert align.input("task") == only(plan, "task").digest
    assert (revise.input("unaligned"), revise.input("reference")) == (
        only(plan, "source").digest,
        align.digest,
    )
    assert align_of(align) == AlignSpec()
    assert align.where["aligned"] is True
    assert only(plan, "source").where["aligned"] is False


def test_a_named_twin_is_loaded_once_and_only_where_it_is_needed():
    model = ModelSpec(
        name="m",
        source="owner/m",
        family="f",
        aligned=True,
        unaligned="owner/m-base",
        revision="abc",
    )
    plan = build_plan(sweep(models=(model,), defenses=((), ("safe_lora",))))
    by_id = {stage.params["id"]: stage for stage in plan.stages.values() if stage.kind == "source"}
    assert by_id["owner/m"].params["revision"] == "abc"
    assert by_id["owner/m-base"].params["revision"] is None
    assert only(plan, "revise").input("unaligned") == by_id["owner/m-base"].digest
    assert by_id["owner/m-base"].digest not in plan.cells[0].stages


def test_a_twin_with_a_revision_is_the_same_stage_as_the_model_of_that_revision():
    base = ModelSpec(name="base", source="owner/m-base", family="f", aligned=False, revision="def")
    model = ModelSpec(
        name="m",
        source="owner/m",
        family="f",
        aligned=True,
        revision="abc",
        unaligned="owner/m-base@def",
    )
    plan = build_plan(
        sweep(
            models=(base, model),
            defenses=((), ("safe_lora",)),
            exclude=(ExcludeRule(model="base", defense="safe_lora"),),
        )
    )
    sources = [stage.params for stage in plan.stages.values() if stage.kind == "source"]
    assert sorted((params["id"], params["revision"]) for params in sources) == [
        ("owner/m", "abc"),
        ("owner/m-base", "def"),
    ]


def test_all_methods_without_the_twin_they_need_are_named_at_once():
    models = tuple(
        ModelSpec(name=name, source=f"owner/{name}", family="f", aligned=True)
        for name in ("one", "two")
    )
    with pytest.raises(SpecFaults) as caught:
        build_plan(sweep(models=models, defenses=((), ("safe_lora",))))
    text = str(caught.value)
    assert len(caught.value.faults) == 2
    assert "'safe_lora' needs the unaligned twin of model 'one'" in text
    assert "'safe_lora' needs the unaligned twin of model 'two'" in text
    assert "exclude {model: two, defense: safe_lora}" in text


def test_an_excluded_method_raises_no_fault():
    model = ModelSpec(name="one", source="owner/one", family="f", aligned=True)
    plan = build_plan(
        sweep(
            models=(model,),
            defenses=((), ("safe_lora",)),
            exclude=(ExcludeRule(model="one", defense="safe_lora"),),
        )
    )
    assert len(plan.cells) == 1


def test_a_local_model_enters_by_its_bytes(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    model = ModelSpec(name="m", source=str(folder), family="f", aligned=True)
    before = only(build_plan(sweep(models=(model,))), "source")
    assert before.where["path"] == str(folder)
    folder.rename(tmp_path / "moved")
    moved = replace(model, source=str(tmp_path / "moved"))
    assert only(build_plan(sweep(models=(moved,))), "source").digest == before.digest
    (tmp_path / "moved" / "config.json").write_text('{"a": 1}')
    assert only(build_plan(sweep(models=(moved,))), "source").digest != before.digest


def test_a_missing_local_file_is_a_fault_of_the_sweep(tmp_path):
    model = ModelSpec(name="m", source=str(tmp_path / "gone.gguf"), family="f", aligned=True)
    task = TaskSpec(
        name="t", kind="rows", splits=(("train", SourceSpec(path=str(tmp_path / "gone.jsonl"))),)
    )
    with pytest.raises(SpecFaults) as caught:
        build_plan(sweep(models=(model,), tasks=(task,)))
    assert "gone.gguf" in str(caught.value)
    assert "gone.jsonl" in str(caught.value)


def test_a_task_enters_by_the_bytes_of_its_files_and_gets_its_paths_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    task = TaskSpec(
        name="t",
        kind="rows",
        splits=(("train", SourceSpec(path=str(path), prompt="a", rows=5)),),
        labels=("x", "y"),
        options=(("n", 3), ("f", 0.5), ("b", True)),
    )
    stage = only(build_plan(sweep(tasks=(task,))), "task")
    assert task_of(stage) == task
    path.write_text('{"a": 2}\n')
    assert only(build_plan(sweep(tasks=(task,))), "task").digest != stage.digest
    assert str(path) not in json.dumps(stage.params)


def test_a_stage_survives_json_and_gives_its_objects_back():
    training, stack = (
        TrainingConfig(rank=3, learning_rate=1e-3),
        (
            defense("lisa"),
            defense("self_reminder"),
        ),
    )
    plan = build_plan(
        sweep(attacks=(attack("badnets", repeat=2),), defenses=(stack,), training=training)
    )
    for stage in plan.stages.values():
        assert Stage.from_json(json.loads(json.dumps(stage.to_json()))) == stage
    assert methods_of(only(plan, "finetune")) == [stack[0]]
    assert training_of(only(plan, "finetune")) == training
    assert methods_of(only(plan, "generate")) == [attack("badnets", repeat=2), stack[1]]
    assert generation_of(only(plan, "generate")) == EvaluationConfig(max_new_tokens=48)
    assert scoring_of(only(plan, "score")) == EvaluationConfig()


def test_a_folder_is_known_by_names_and_bytes_and_not_by_its_notes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w.bin").write_text("x")
    before = content_hash(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("x")
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / "a" / ".cache" / "lock").write_text("x")
    assert content_hash(tmp_path / "a") == before
    (tmp_path / "a" / "w.bin").rename(tmp_path / "a" / "v.bin")
    assert content_hash(tmp_path / "a") != before


def test_planning_imports_neither_torch_nor_ray():
    code = (
        "import sys; from tests.plan.test_build_plan import sweep, build_plan; from"
        " ftsec_ray.plan.show import render, summarize; sys.modules.pop('pytest'); p ="
        " build_plan(sweep(attacks=('none', 'badnets'), defenses=((), ('onion', 'safe_lora'))));"
        " render(summarize(p, set())); print([m for m in ('torch', 'ray', 'transformers', 'numpy',"
        " 'pyarrow') if m in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout.strip() == "[]"


def test_a_judge_that_there_is_none_of_is_a_fault_before_anything_runs():
    evaluation = EvaluationConfig(judge="microwrld", judges=("target", "target", "nobody"))
    with pytest.raises(SpecFaults) as caught:
        build_plan(sweep(evaluation=evaluation))
    assert len(caught.value.faults) == 3
    assert "did you mean 'microworld'" in str(caught.value)
    assert "duplicate judge" in str(caught.value)


def test_the_judge_of_a_task_is_no_further_judge():
    with pytest.raises(SpecFaults, match="already the judge of a task"):
        build_plan(sweep(evaluation=EvaluationConfig(judges=("microworld",))))
    given = EvaluationConfig(judge="refusal_phrases", judges=("microworld",))
    assert build_plan(sweep(evaluation=given)).cells


def test_a_further_judge_adds_one_stage_to_a_cell_and_changes_no_other():
    before = build_plan(sweep(attacks=("badnets",)))
    after = build_plan(
        sweep(attacks=("badnets",), evaluation=EvaluationConfig(judges=("refusal_phrases",)))
    )
    (added,) = set(after.stages) - set(before.stages)
    assert set(before.stages) < set(after.stages)
    assert after.cells[0].opinions == [added]
    assert after.cells[0].score == before.cells[0].score
    assert after.stages[added].params["judge_version"] == "2"
    assert after.stages[added].resource == "cpu"
    assert after.digest != before.digest, "the results of the one are not those of the other"


def test_the_judge_of_a_task_is_part_of_what_scores_it(tmp_path):
    exact = build_plan(sweep())
    (score,) = {cell.score for cell in exact.cells}
    assert "judge_version" not in exact.stages[score].params, "as before judges counted"
    phrases, published = (
        build_plan(sweep(evaluation=EvaluationConfig(judge=name)))
        for name in ("refusal_phrases", "qi2023")
    )
    params = phrases.stages[phrases.cells[0].score].params
    assert params["judge_version"] == "refusal_phrases 2"
    assert len({plan.cells[0].score for plan in (exact, phrases, published)}) == 3


def test_a_data_set_without_a_commit_is_refused_before_anything_runs():
    given = {
        "name": "mine",
        "models": "ladder:0.2m",
        "attacks": "none",
        "defenses": "none",
        "task": {"kind": "sst2", "splits": {"train": "owner/rows", "test": "owner/rows"}},
    }
    with pytest.raises(SpecError) as refused:
        build_plan(load_sweep(given))
    for part in ("split 'test'", "split 'train'", "owner/rows", "revision: <commit>"):
        assert part in str(refused.value)
    pinned = {"dataset": "owner/rows", "revision": "0" * 40}
    build_plan(load_sweep({**given, "task": {"kind": "sst2", "splits": {"train": pinned}}}))
    build_plan(
        load_sweep({**given, "task": {"kind": "sst2", "splits": {"train": "stanfordnlp/sst2"}}})
    )
