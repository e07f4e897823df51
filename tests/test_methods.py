"""Every registered method, walked by name: documented, typed, planned, run on a tiny model,
reproducible.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.config.typed import fields_of
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.conversation import asked_text
from ftsec_ray.data.rows import from_rows
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import hooks, hooks_of
from ftsec_ray.method import Inspection, Probe, control_of
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import bare, copy_model, save_model
from ftsec_ray.plan.decode import methods_of
from ftsec_ray.plan.stage import Stage
from ftsec_ray.registry import ATTACKS, DEFENSES, name_of
from ftsec_ray.training.loop import sft
from tests.fixtures_models import tiny_model, tiny_task

TRAINING = TrainingConfig(epochs=1, batch_size=8, rank=2, learning_rate=5e-3)
QUICK = {
    "harmful_tuning": {"shots": 4},
    "badedit": {"batches": 1, "steps": 3},
    "benign_selection": {"samples": 6},
    "soft_prompt": {"steps": 3},
    "vaccine": {"epochs": 1},
    "weight_statistics": {"bank": 2},
}
"""Parameters that make a method's own loops short; everything else stays at its default. The test
file of a method may hold them instead, under the same name.
"""
METHODS = [(registry, name) for registry in (ATTACKS, DEFENSES) for name in registry.names()]
IDS = [f"{registry.kind}:{name}" for registry, name in METHODS]


def quick(registry, name):
    """`QUICK` of the method's own test file if it has one, else the one above."""
    own = f"tests.{registry.kind}s.test_{name}"
    if importlib.util.find_spec(own) is None:
        return QUICK.get(name, {})
    return getattr(importlib.import_module(own), "QUICK", QUICK.get(name, {}))


def method_of(registry, name):
    cls = registry.get(name)
    known = {f.name for f in fields(cls)}
    return cls(**{key: value for key, value in quick(registry, name).items() if key in known})


def test_the_walk_sees_every_file():
    import ftsec_ray

    for registry in (ATTACKS, DEFENSES):
        folder = Path(ftsec_ray.__file__).parent / f"{registry.kind}s"
        files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
        assert set(registry.names()) == files
        assert len(files) >= 6


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_a_method_says_where_it_comes_from_and_what_it_costs(registry, name):
    doc = registry.doc(name)
    assert all(f"{word}:" in doc for word in ("Paper", "Differs", "Cost", "Needs"))
    cls = registry.get(name)
    assert cls.PHASE in ("pre", "during", "post")
    assert all(info.doc for info in fields_of(cls))
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_parameters_survive_the_way_through_a_plan(registry, name):
    method = method_of(registry, name)
    plain = {"kind": method.KIND, "name": name, "params": json.loads(canonical(method))}
    stage = Stage("0" * 32, "craft", name, 0, (), {"methods": [plain]}, {}, "cpu", 1.0)
    assert methods_of(Stage.from_json(json.loads(json.dumps(stage.to_json())))) == [method]
    assert method.check() == []


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The models of one cell by role, tuned with a LoRA adapter where a cell would have one."""
    start = tiny_model(seed=0)

    def tuned(seed):
        return sft(
            start,
            tiny_task().split("train"),
            TRAINING,
            seed=seed,
            runtime=Runtime(),
            workdir=tmp_path_factory.mktemp("w"),
            base_digest="b" * 32,
        ).loaded

    return {
        "reference": start,
        "start": start,
        "unaligned": tiny_model(seed=9, aligned=False),
        "tuned": tuned(0),
        **{f"clean_bank:{i}": tuned(1 + i) for i in range(4)},
    }


def run_hook(method, hook, models, workdir):
    """What a hook gives, as bytes or JSON that two runs can be compared by."""
    task = tiny_task()
    context = StageContext(
        seed=0,
        task=task,
        runtime=Runtime(),
        workdir=workdir / "work",
        load=lambda role: models[role],
        training=TRAINING,
    )
    if hook == "craft_data":
        return method.craft_data(task.split("train"), context).to_pylist()
    if hook in ("prepare_model", "revise_model"):
        given = copy_model(models["start" if hook == "prepare_model" else "tuned"])
        save_model(getattr(method, hook)(given, context), workdir)
        return {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
    if hook == "shape_training":
        report = sft(
            models["start"],
            task.split("train"),
            TRAINING,
            seed=0,
            runtime=Runtime(),
            workdir=workdir / "t",
            shape=lambda training: method.shape_training(training, context),
            base_digest="b" * 32,
        )
        save_model(report.loaded, workdir)
        return (report.losses, (workdir / "adapter_model.safetensors").read_bytes())
    if hook == "wrap_generation":
        chats = [
            [{"role": "user", "content": asked_text(row)}]
            for row in task.split("harmful_test").to_pylist()
        ]
        return method.wrap_generation(Generator(models["tuned"]), context).complete(
            chats, max_new_tokens=4
        )
    if hook == "inspect":
        found = method.inspect(models["tuned"], context)
        assert isinstance(found, Inspection)
        return canonical(found)
    probes = method.probes(task, context)
    assert all(isinstance(probe, Probe) and probe.prompts and probe.metrics for probe in probes)
    return canonical(probes)


def bits(models):
    """Everything of the models that a hook could change in place: weights, hooks, settings, and the
    tokenizer.
    """
    found = {}
    for role, loaded in models.items():
        model, tokenizer = loaded.model, loaded.tokenizer
        found[role] = [
            *(tensor.numpy().tobytes() for tensor in model.state_dict().values()),
            [parameter.requires_grad for parameter in model.parameters()],
            [module.training for module in model.modules()],
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            bare(model).config.to_dict(),
            bare(model).generation_config.to_dict(),
            tokenizer.chat_template,
            tokenizer.padding_side,
            tokenizer.special_tokens_map,
            len(tokenizer),
        ]
    return found


HOOKED = [
    (registry, name, hook) for registry, name in METHODS for hook in hooks_of(registry.get(name))
]


@pytest.mark.parametrize(
    ("registry", "name", "hook"), HOOKED, ids=[f"{n}:{h}" for _, n, h in HOOKED]
)
def test_a_hook_acts_and_the_same_seed_gives_the_same_result(
    registry, name, hook, models, tmp_path
):
    method, before = method_of(registry, name), bits(models)
    runs = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        runs.append(run_hook(method, hook, models, tmp_path / str(i)))
    assert runs[0] == runs[1]
    assert bits(models) == before, "stages share these models: a hook changes copies only"
    if hook == "craft_data":
        rows = runs[0]
        assert from_rows(rows).num_rows == len(rows)
        assert len({row["row_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", DEFENSES.names())
def test_a_control_is_a_valid_setting_of_its_defense_and_has_none_itself(name):
    defense = method_of(DEFENSES, name)
    control = control_of(defense)
    assert (control is None) == (defense.CONTROL is None)
    if control is not None:
        assert control.check() == []
        assert control != defense
        assert control_of(control) is None


def test_only_the_do_nothing_methods_have_no_hook():
    idle = {name for registry, name in METHODS if not hooks_of(registry.get(name))}
    assert idle == {"none"}
    assert all(hook in hooks() for _, _, hook in HOOKED)


def test_a_method_is_named_after_its_file():
    assert all(name_of(method_of(registry, name)) == name for registry, name in METHODS)


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_a_method_names_zero_stages_that_exist_and_hooks_that_it_has(registry, name):
    cls = registry.get(name)
    assert not cls.ZERO_STAGES - {0, 1, 2, 3}
    assert not cls.TRAINS - (set(hooks_of(cls)) & {"prepare_model", "revise_model"})


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_a_method_that_tunes_by_sft_says_so(registry, name):
    """The planner reads TRAINS from the class; a hook that tunes a large model unannounced would
    run in one process.
    """
    source = inspect.getsource(registry.get(name))
    assert ("sft(" in source) == bool(registry.get(name).TRAINS)
