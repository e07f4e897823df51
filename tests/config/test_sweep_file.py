"""Sweep files: what they can say, and how every fault of one is told at once."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray.config.sweep import AlignSpec, SweepSpec
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import SpecError, SpecFaults
from ftsec_ray.registry import name_of

BASE = {
    "name": "s",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["none"],
    "defenses": ["none"],
}

COMMIT, OTHER = "a" * 40, "d" * 40


def sweep(**changes: object) -> SweepSpec:
    return load_sweep({**BASE, **changes})


def faults_of(source: object, **options: object) -> dict[str, SpecError]:
    with pytest.raises(SpecFaults, match=r"error\(s\)") as caught:
        load_sweep(source, **options)
    return dict(caught.value.faults)


def faults(**changes: object) -> dict[str, SpecError]:
    return faults_of({**BASE, **changes})


def test_a_small_sweep_is_filled_with_defaults():
    spec = sweep()
    model = spec.models[0]
    assert (model.name, model.source, model.family, model.aligned) == (
        "ladder:0.2m",
        "ladder:0.2m",
        "ladder",
        True,
    )
    assert model.unaligned == "ladder:0.2m-base"
    assert spec.tasks[0].kind == "microworld"
    assert [name_of(attack) for attack in spec.attacks] == ["none"]
    assert spec.defenses == ((),)
    assert spec.seeds == (0,)
    assert spec.training.adapter == "lora"


def test_a_base_model_of_the_ladder_is_not_aligned_and_has_no_twin():
    model = sweep(models=["ladder:4m-base"]).models[0]
    assert (model.aligned, model.unaligned) == (False, None)


def test_a_filter_that_is_no_regular_expression_is_a_fault(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "b"}\n')
    file = tmp_path / "s.yaml"
    for entry, what in (("{a: '(x'}", "not a regular expression"), ("{a: 3}", "not a row filter")):
        file.write_text(
            "models: [ladder:1m]\nattacks: [none]\ndefenses: [none]\ntask:\n  kind: rows\n "
            f" splits: {{train: {{path: rows.jsonl, prompt: a, matching: {entry}}}}}\n"
        )
        with pytest.raises(SpecFaults, match=what):
            load_sweep(file)


def test_a_file_takes_its_name_from_its_file_name_and_paths_from_its_folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "b", "c": "d"}\n')
    file = tmp_path / "my_question.yaml"
    file.write_text(
        "models: [ladder:1m]\nattacks: all\ndefenses: all\nseeds: [3, 5]\ntask:\n  kind: rows\n "
        " splits: {train: {path: rows.jsonl, prompt: a, response: c, where: {kind: 1},"
        " matching: {c: '^no'}}}\n"
    )
    spec = load_sweep(file)
    assert spec.name == "my_question"
    assert spec.seeds == (3, 5)
    split, source = spec.tasks[0].splits[0]
    assert (split, source.path, source.where) == (
        "train",
        str((tmp_path / "rows.jsonl").resolve()),
        (("kind", "1"),),
    )
    assert source.matching == (("c", "^no"),)
    assert spec.defenses[0] == ()
    assert all(len(stack) == 1 for stack in spec.defenses[1:])
    assert name_of(spec.attacks[0]) == "none"
    assert len(spec.attacks) > 3


def test_a_grid_gives_one_method_per_value_and_several_grids_their_product():
    spec = sweep(
        attacks=["none", {"badnets": {"rate": {"grid": [0.1, 0.2]}, "repeat": {"grid": [1, 2, 3]}}}]
    )
    assert [(a.rate, a.repeat) for a in spec.attacks[1:]] == [
        (r, n) for r in (0.1, 0.2) for n in (1, 2, 3)
    ]


def test_a_grid_inside_a_stack_gives_one_stack_per_value_in_the_written_order():
    spec = sweep(defenses=[[{"shrink": {"gamma": {"grid": [0.25, 0.75]}}}, "safe_lora"]])
    assert [[name_of(d) for d in stack] for stack in spec.defenses] == [["shrink", "safe_lora"]] * 2
    assert [stack[0].gamma for stack in spec.defenses] == [0.25, 0.75]


def test_an_int_serves_as_a_float_and_nothing_else_changes_its_type():
    attack = sweep(attacks=[{"badnets": {"rate": 1}}]).attacks[0]
    assert type(attack.rate) is float
    for wrong in ("0.1", True, None, [0.1], {"x": 1}):
        assert "attacks[0].badnets.rate" in faults(attacks=[{"badnets": {"rate": wrong}}]), wrong
    for wrong in ("1", 1.0, 1.5, True):
        assert "attacks[0].badnets.repeat" in faults(attacks=[{"badnets": {"repeat": wrong}}]), (
            wrong
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_without_a_value_is_refused(value):
    assert "training.learning_rate" in faults(training={"learning_rate": value})


def test_every_fault_of_a_file_is_told_at_once_with_its_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("""\
name: ../../etc
models: [ladder:2m, {path: nope.gguf}, {id: owner/mystery}, ladder:1m, ladder:1m]
task: [microworl, {kind: rows, name: r, splits: {train: {path: a.tsv, promt: x}}}]
attacks: [badnet, {badnets: {rate: "0.1", rat: 3}}, {harmful_tuning: {shots: {grid: []}}}, none, none, [badnets]]
defenses:
  - none
  - {shrink: {gamma: {grid: [0.2, 3]}}}
  - [vaccine, none]
  - [shrink, shrink]
  - {safe_lora: {rank: eight}}
seeds: [1, 1, -2, true]
exclude: [{}, {foo: 1}]
training: {learning_rate: {grid: [1, 2]}, adapter: lorax, epochs: yes, rank: 0, rankk: 3}
evaluation: 7
resource: {}
""")
    found = faults_of(file)
    assert set(found) == {
        "name",
        "models[0]",
        "models[1].path",
        "models[2].family",
        "models[2].aligned",
        "models[4]",
        "task[0]",
        "task[1].splits.train.path",
        "task[1].splits.train.promt",
        "attacks[0]",
        "attacks[1].badnets.rate",
        "attacks[1].badnets.rat",
        "attacks[2].harmful_tuning.shots",
        "attacks[4]",
        "attacks[5]",
        "defenses[1].shrink.gamma.grid[1]",
        "defenses[2][1]",
        "defenses[3][1]",
        "defenses[4].safe_lora.rank",
        "seeds[1]",
        "seeds[2]",
        "seeds[3]",
        "exclude[0]",
        "exclude[1].foo",
        "training.learning_rate",
        "training.adapter",
        "training.epochs",
        "training.rank",
        "training.rankk",
        "evaluation",
        "resource",
    }
    assert "line 10" in found["defenses[4].safe_lora.rank"].what
    assert found["defenses[4].safe_lora.rank"].got == "eight"
    lines = [
        int(m.group(1)) for fault in found.values() if (m := re.search(r"line (\d+)", fault.what))
    ]
    assert len(lines) == len(found)
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("changes", "place", "meant"),
    [
        ({"attacks": ["badnet"]}, "attacks[0]", "badnets"),
        ({"defenses": [["safe_lora", "vacine"]]}, "defenses[0][1]", "vaccine"),
        ({"attacks": [{"badnets": {"triger": "x"}}]}, "attacks[0].badnets.triger", "trigger"),
        ({"training": {"learning_rates": 1.0}}, "training.learning_rates", "learning_rate"),
        ({"resources": {"worker": 1}}, "resources.worker", "workers"),
        ({"data": {"ray_abov": 1}}, "data.ray_abov", "ray_above"),
        ({"task": "micro-world"}, "task", "microworld"),
        ({"models": ["ladder:3m"]}, "models[0]", "ladder:"),
        ({"models": [{"path": ".", "famly": "x"}]}, "models[0].famly", "family"),
        ({"defences": ["none"]}, "defences", "defenses"),
        ({"attacks": ["none"], "exclude": [{"attack": "nono"}]}, "exclude[0].attack", "none"),
    ],
)
def test_a_misspelt_word_gets_a_did_you_mean(changes, place, meant):
    assert f"did you mean '{meant}" in faults(**changes)[place].fix


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc", "a/b", "..", ".", "", ".hidden", "A", "a b", "a..b", 7, None, "a\nb", "ü"],
)
def test_a_sweep_name_cannot_leave_the_results_folder(name):
    assert faults(name=name)["name"].got == name


def test_the_same_method_twice_is_a_fault_even_when_one_writes_the_default_out():
    found = faults(
        attacks=["badnets", {"badnets": {"rate": 0.1}}],
        defenses=["none", "none", ["shrink"], "shrink"],
    )
    assert "same as attacks[0]" in found["attacks[1]"].fix
    assert found["attacks[1]"].got == "badnets"
    assert "same as defenses[0]" in found["defenses[1]"].fix
    assert "same as defenses[2]" in found["defenses[3]"].fix


def test_a_value_twice_in_a_grid_is_a_fault():
    assert (
        "contains it twice"
        in faults(attacks=[{"badnets": {"rate": {"grid": [1, 1.0]}}}])["attacks[0]"].fix
    )


def test_none_cannot_stand_inside_a_stack_or_take_parameters():
    assert "defenses[0][0]" in faults(defenses=[["none", "shrink"]])
    assert "defenses[0].none.x" in faults(defenses=[{"none": {"x": 1}}])
    assert "defenses[0]" in faults(defenses=[[]])


@pytest.mark.parametrize("shots", [{"grid": []}, {"grid": 3}, {"grid": [1], "more": 2}])
def test_a_grid_that_is_none_is_told(shots):
    assert (
        "not a grid"
        in faults(attacks=[{"harmful_tuning": {"shots": shots}}])[
            "attacks[0].harmful_tuning.shots"
        ].what
    )


@pytest.mark.parametrize(("given", "seeds"), [(3, (0, 1, 2)), ([7], (7,)), ([4, 2], (4, 2))])
def test_seeds_are_a_count_or_a_list(given, seeds):
    assert sweep(seeds=given).seeds == seeds


@pytest.mark.parametrize("given", [0, -1, True, 2.0, "3", [], None, 10**9])
def test_seeds_that_are_neither_are_refused(given):
    assert faults(seeds=given)["seeds"].got == given


def test_a_hub_id_may_carry_its_revision_and_so_may_a_twin():
    short, long = (
        sweep(models=[given]).models[0]
        for given in (
            f"owner/m-1b-instruct@{COMMIT}",
            {"id": "owner/m-1b-instruct", "revision": COMMIT, "unaligned": f"owner/m-1b@{OTHER}"},
        )
    )
    assert (
        (short.source, short.revision, short.name)
        == (long.source, long.revision, long.name)
        == ("owner/m-1b-instruct", COMMIT, "m-1b-instruct")
    )
    assert long.unaligned == f"owner/m-1b@{OTHER}"


@pytest.mark.parametrize("given", ["owner/m-1b-it@", "owner/m-1b-it@a@b", "owner/m-1b-it@../x"])
def test_what_cannot_be_a_revision_is_a_fault(given):
    assert "not a local file" in str(faults(models=[given])["models[0]"])


def test_two_revisions_of_one_model_are_a_fault():
    assert "two different revisions" in str(
        faults(models=[{"id": f"owner/m-1b-it@{COMMIT}", "revision": OTHER}])["models[0].revision"]
    )


def test_a_rule_may_name_a_model_by_its_source_and_a_list_makes_one_rule_of_each():
    spec = sweep(
        models=[{"source": "ladder:1m", "name": "small"}, "ladder:4m"],
        attacks=["none", "badnets"],
        defenses=["none", "shrink"],
        exclude=[{"model": "ladder:1m", "defense": ["none", "shrink"], "attack": "badnets"}],
    )
    assert [(r.model, r.attack, r.defense) for r in spec.exclude] == [
        ("small", "badnets", "none"),
        ("small", "badnets", "shrink"),
    ]
    rule = spec.exclude[0]
    assert rule.concerns("small", "microworld")
    assert rule.concerns("small:before", "microworld")
    assert not rule.concerns("ladder:4m", "microworld")
    assert rule.matches(attack="badnets", defenses=(), seed=0)
    assert not rule.matches(attack="badnets", defenses=("shrink",), seed=0)
    assert not rule.matches(attack="none", defenses=(), seed=0)


def test_rules_that_leave_out_every_cell_are_a_fault():
    assert "every cell" in faults(exclude=[{"seed": 0}])["exclude"].what


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"models": [{"id": "owner/llama-1b-instruct", "aligned": "yes"}]}, "models[0].aligned"),
        ({"models": [{"source": "ladder:1m", "aligned": False}]}, "models[0].aligned"),
        ({"models": [{"id": "owner/m-1b", "align": {}, "aligned": False}]}, "models[0].aligned"),
        ({"models": [{"id": "owner/m-1b", "align": {"epochs": 0}}]}, "models[0].align.epochs"),
        (
            {"models": [{"id": "owner/m-1b-base", "align": True, "unaligned": "ladder:1m"}]},
            "models[0].unaligned",
        ),
        ({"models": [{"id": "a", "path": "b"}]}, "models[0]"),
        ({"models": [{"id": "not an id", "family": "f", "aligned": True}]}, "models[0].id"),
        ({"models": [{"id": "../../etc", "family": "f", "aligned": True}]}, "models[0].id"),
        ({"models": []}, "models"),
        ({"models": [3]}, "models[0]"),
        ({"task": []}, "task"),
        ({"task": {"kind": "rows"}}, "task.splits"),
        ({"task": {"kind": "microworld", "options": {"train_rows": 0}}}, "task.options.train_rows"),
        ({"task": {"kind": "sst2", "options": {"train_rows": 1}}}, "task.options"),
        ({"task": {"kind": "rows", "splits": {"trian": "a/b"}}}, "task.splits.trian"),
        (
            {"task": {"kind": "rows", "splits": {"train": {"dataset": "a/../b"}}}},
            "task.splits.train.dataset",
        ),
        (
            {"task": {"kind": "rows", "splits": {"train": {"path": "x.pkl"}}}},
            "task.splits.train.path",
        ),
        ({"task": {"kind": "rows", "splits": {"train": {}}}}, "task.splits.train"),
        (
            {"task": {"kind": "rows", "splits": {"train": "a/b"}, "instruction": "no place"}},
            "task.instruction",
        ),
        ({"task": ["microworld", "microworld"]}, "task[1]"),
        ({"attacks": []}, "attacks"),
        ({"attacks": [{"badnets": {}, "none": {}}]}, "attacks[0]"),
        ({"attacks": {"badnets": {}}}, "attacks"),
        ({"question": 7}, "question"),
        ({"exclude": {"attack": "none"}}, "exclude"),
    ],
)
def test_a_fault_is_told_at_its_place(changes, place):
    assert place in faults(**changes)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("key", ["a[", "]", "a.b", "[0]", "..", "", " ", "\n", "a[0].b"])
def test_a_key_of_odd_characters_is_an_unknown_key(key):
    assert "unknown key" in faults(training={key: 1})[f"training.{key}"].what
    assert key in {fault.got for fault in faults(**{key: 1}).values()}


def test_missing_axes_are_each_told():
    assert set(faults_of({"name": "x"})) == {"models", "task", "attacks", "defenses"}


def test_names_of_the_usual_pattern_tell_family_and_alignment():
    models = sweep(
        models=[
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Qwen/Qwen2.5-0.5B-Instruct",
            {"id": "org/pythia-70m", "align": {"epochs": 2.0}},
            {"id": "meta-llama/Llama-3.2-1B", "aligned": False, "revision": COMMIT},
        ]
    ).models
    assert [(m.name, m.family, m.aligned) for m in models] == [
        ("smollm2-135m-instruct", "smollm2", True),
        ("qwen2.5-0.5b-instruct", "qwen2.5", True),
        ("pythia-70m", "pythia", True),
        ("llama-3.2-1b", "llama-3.2", False),
    ]
    assert models[2].align == AlignSpec(epochs=2.0)
    assert models[3].revision == COMMIT


def test_a_local_model_is_found_beside_the_sweep_file_and_made_absolute(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "Tiny-10M-Instruct.gguf").write_bytes(b"GGUF")
    given = {
        **BASE,
        "models": [
            {"path": "m", "family": "f", "aligned": True, "unaligned": "Tiny-10M-Instruct.gguf"},
            "Tiny-10M-Instruct.gguf",
        ],
    }
    folder, file = load_sweep(given, base=tmp_path).models
    assert folder.source == str((tmp_path / "m").resolve())
    assert folder.unaligned == file.source == str((tmp_path / "Tiny-10M-Instruct.gguf").resolve())
    assert (file.name, file.family, file.aligned) == ("tiny-10m-instruct", "tiny", True)
    (tmp_path / "m" / "config.json").unlink()
    assert "config.json" in faults_of(given, base=tmp_path)["models[0].path"].want


def test_columns_serve_every_split_and_a_split_may_override_them():
    spec = sweep(
        task={
            "kind": "rows",
            "name": "mine",
            "columns": {"prompt": "q", "label": "y"},
            "labels": ["no", "yes"],
            "splits": {
                "test": {"dataset": "a/b", "split": "validation", "prompt": "qq"},
                "train": "a/b",
            },
        }
    )
    (train_name, train), (test_name, test) = spec.tasks[0].splits
    assert (train_name, train.dataset, train.prompt, train.label) == ("train", "a/b", "q", "y")
    assert (test_name, test.split, test.prompt, test.label) == ("test", "validation", "qq", "y")


def test_an_option_at_its_default_is_the_same_task_as_the_option_left_out():
    assert sweep(task={"kind": "microworld", "options": {"train_rows": 256}}).tasks == sweep().tasks
    assert sweep(task={"kind": "microworld", "options": {"train_rows": 64}}).tasks[0].options == (
        ("train_rows", 64),
    )


def test_a_file_that_is_not_there_is_a_fault_of_the_sweep(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("name: x\n")
    fault = faults_of(tmp_path / "quikstart.yaml")["file"]
    assert "did you mean 'quickstart.yaml'" in fault.fix


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    key=st.sampled_from(
        [
            "name",
            "question",
            "models",
            "task",
            "attacks",
            "defenses",
            "seeds",
            "exclude",
            "training",
            "evaluation",
            "resources",
            "data",
        ]
    ),
    value=JSON,
)
@settings(max_examples=250, deadline=None)
def test_whatever_a_value_is_the_answer_is_a_sweep_or_its_faults(key, value):
    try:
        spec = load_sweep({**BASE, key: value})
    except SpecFaults as error:
        told = error.faults
        assert str(error).count("\n") >= len(told)  # noqa: PT017
        assert told  # noqa: PT017
    else:
        assert isinstance(spec, SweepSpec)


@given(entry=JSON, axis=st.sampled_from(["models", "task", "attacks", "defenses", "exclude"]))
@settings(max_examples=250, deadline=None)
def test_whatever_an_entry_of_an_axis_is_the_answer_is_a_sweep_or_its_faults(axis, entry):
    try:
        spec = load_sweep({**BASE, axis: [entry]})
    except SpecFaults as error:
        assert all(place.startswith(axis) for place, _ in error.faults)  # noqa: PT017
    else:
        assert isinstance(spec, SweepSpec)


def test_how_a_tune_is_dealt_out_stands_under_training_and_is_no_part_of_it():
    spec = sweep(
        training={
            "rank": 4,
            "strategy": "deepspeed",
            "deepspeed_above": 3.0e9,
            "deepspeed": {"zero_stage": 3, "offload": "parameters", "workers": 4, "micro_batch": 2},
        }
    )
    assert spec.training == sweep(training={"rank": 4}).training
    assert (spec.strategy.strategy, spec.strategy.deepspeed_above) == ("deepspeed", 3.0e9)
    assert (spec.strategy.deepspeed.zero_stage, spec.strategy.deepspeed.workers) == (3, 4)
    assert sweep().strategy.strategy == "auto"


def test_faults_of_the_strategy_are_told_with_all_others():
    found = faults(
        training={
            "strategy": "zero",
            "rank": 0,
            "stratgy": "single",
            "deepspeed_above": -1,
            "deepspeed": {"zero_stage": 4, "worker": 2},
        },
        seeds=0,
    )
    assert set(found) == {
        "training.strategy",
        "training.rank",
        "training.stratgy",
        "training.deepspeed_above",
        "training.deepspeed.zero_stage",
        "training.deepspeed.worker",
        "seeds",
    }
    assert "auto | single | deepspeed" in str(found["training.strategy"])
    assert "auto | 0 | 1 | 2 | 3" in str(found["training.deepspeed.zero_stage"])
    assert "'strategy'" in found["training.stratgy"].fix
    assert ">= 3" in str(
        faults(training={"deepspeed": {"zero_stage": 2, "offload": "parameters"}})[
            "training.deepspeed"
        ]
    )
    assert "one sweep file per setting" in str(
        faults(training={"strategy": {"grid": ["single", "deepspeed"]}})["training.strategy"]
    )
