"""The lifecycle as data: one file is a hook, one file is a judge with a metric, and a hook that no stage calls
is refused.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import ftsec_ray
from ftsec_ray import discovery, lifecycle, schema
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.judging import get_judge, judge_class
from ftsec_ray.lifecycle import StageKind, hooks, kinds
from ftsec_ray.method import Attack, Defense
from ftsec_ray.registry import DEFENSES, Registry

UNLEARN = '''
"""Lets one method take something out of the fine-tuned model."""
from ftsec_ray.lifecycle import StageKind

KIND = StageKind(
    name="unlearn",
    position=75,
    hooks={"unlearn_model": "LoadedModel -> LoadedModel"},
    acts="each",
    takes=("model",),
    gives="model",
    settings=("training",),
)


def run(job):
    return job.change_model("unlearn_model")
'''
FORGET = '''
"""Halve the biases and norms.

Paper: none.
Differs: a toy.
Cost: none.
Needs: nothing.
"""
from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.method import Defense, Phase


@dataclass(frozen=True, kw_only=True)
class Forget(Defense):
    """Forgets."""

    PHASE: ClassVar[Phase] = "post"

    def unlearn_model(self, model, ctx):
        """Leave the model as it is, and say so."""
        ctx.note(unlearned=True)
        return model
'''
TERSE = '''
"""Says whether an answer is short."""
from ftsec_ray.evals.judging import Judge, Verdict
from ftsec_ray.schema import Metric

METRICS = (
    Metric(
        "terse_rate",
        "fraction 0..1",
        "none",
        "benign requests that got at most eight words",
        probes=("benign",),
        verdict="terse",
    ),
)


class Terse(Judge):
    """`terse` for at most eight words, else `long`."""

    name = "terse@1"

    def __call__(self, prompts, completions):
        return [
            Verdict(verdict="terse" if len(text.split()) <= 8 else "long", raw=str(len(text.split())))
            for text in completions
        ]
'''
SWEEP = """
name: small
models: [ladder:0.2m]
task: {kind: microworld, options: {train_rows: 64}}
attacks: [none]
defenses: [none, forget]
training: {epochs: 0.25, batch_size: 8}
evaluation: {prompts: 6, max_new_tokens: 12, perplexity_rows: 2JUDGES}
"""
RUN = """
import json, sys
from pathlib import Path
from ftsec_ray import lifecycle
from ftsec_ray.models import ladder
import ftsec_ray
from dataclasses import replace
ladder.SIZES = {name: replace(size, steps=4, align_steps=2) for name, size in ladder.SIZES.items()}
from ftsec_ray.store import Store
store = Store.open("store")
before = store.done()
results = ftsec_ray.run(Path("sweep.yaml"), executor="local", store="store", results="out")
rows = results.metrics.to_pylist()
plan = ftsec_ray.make_plan(Path("sweep.yaml"))
print(json.dumps({
    "kinds": list(lifecycle.kinds()),
    "fresh": sorted(r["kind"] for r in store.records(store.done() - before).values()),
    "terse": [row["value"] for row in rows if row["metric"] == "terse_rate"],
    "benign": [row["value"] for row in rows if row["metric"] == "benign_rate"],
    "judges": sorted({str([o["judge"] for o in row["opinions"] or ()]) + row["probe"]
                      for row in results.generations.to_pylist()}),
    "unlearned": [s["method"] for s in results.stages.to_pylist() if s["kind"] == "unlearn"],
    "detail": "terse_rate" in __import__("ftsec_ray.schema", fromlist=["x"]).METRICS,
}))
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package that a test may add files to, and what runs code on it."""
    source = Path(ftsec_ray.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "ftsec_ray", ignore=ignored)

    def said(code):
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    return tmp_path, said


def test_a_hook_is_one_file_and_a_judge_with_its_metric_another_that_asks_no_model_again(package):
    folder, said = package
    (folder / "ftsec_ray/stages/unlearn.py").write_text(UNLEARN)
    (folder / "ftsec_ray/defenses/forget.py").write_text(FORGET)
    (folder / "sweep.yaml").write_text(SWEEP.replace("JUDGES", ""))
    first = said(RUN)
    assert first["kinds"].index("finetune") < first["kinds"].index("unlearn")
    assert first["unlearned"] == ["forget"]
    assert first["fresh"].count("generate") == 2
    (folder / "ftsec_ray/judges/terse.py").write_text(TERSE)
    assert said(RUN)["fresh"] == [], "a new judge that no sweep names changes nothing"
    (folder / "sweep.yaml").write_text(SWEEP.replace("JUDGES", ", judges: [terse]"))
    second = said(RUN)
    assert second["fresh"] == ["score", "score"], "one more verdict per answer and nothing else"
    assert len(second["terse"]) == 2
    assert all(0 <= value <= 1 for value in second["terse"])
    assert second["benign"] == first["benign"]
    assert set(second["judges"]) == {
        "['terse@1']benign",
        "[]borderline",
        "[]clean",
        "[]harmful",
    }


def test_kinds_are_in_order_own_their_hooks_and_are_named_after_their_files():
    found = kinds()
    positions = [kind.position for kind in found.values()]
    assert positions == sorted(positions)
    assert len(set(positions)) == len(positions)
    assert set(found) == {
        path.stem
        for path in (Path(ftsec_ray.__file__).parent / "stages").glob("*.py")
        if path.stem != "__init__"
    }
    assert all(hooks()[hook] is kind for kind in found.values() for hook in kind.hooks)
    assert set(lifecycle.roles()) == {"reference", "unaligned", "start", "clean_bank"}


def module_of(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    return module


@pytest.fixture
def plugged(monkeypatch):
    """Adds a module to a package as another distribution would, by an entry point."""
    caches = (discovery.modules_in, lifecycle.kinds, lifecycle.hooks, lifecycle._hooks_of)

    def clear():
        for cached in (*caches, schema._all_metrics, schema._of_attacks):
            cached.cache_clear()

    def plug(group, name, module):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        points = [EntryPoint(name, module.__name__, group)]
        monkeypatch.setattr(
            discovery, "entry_points", lambda *, group: [p for p in points if p.group == group]
        )
        clear()

    yield plug
    monkeypatch.undo()
    clear()


def method_class(base, name, **content):
    made = type("Plugged", (base,), {"PHASE": "post", "__module__": f"plugged_{name}", **content})
    return dataclass(frozen=True, kw_only=True)(made)


def defense_module(name, **content):
    made = method_class(Defense, name, **content)
    return module_of(f"plugged_{name}", Plugged=made, __doc__="Paper: none.")


def acts(self, model, ctx):
    return model


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"revise_modell": acts}, "did you mean 'revise_model'"),
        ({"craft_dat": acts}, "did you mean 'craft_data'"),
        ({"revise_model": acts, "shape_trainings": acts}, "did you mean 'shape_training'"),
        ({"revise_model": acts, "distil": acts}, "a hook that no stage calls"),
        ({"helper": lambda self: 1}, "has no hook"),
        ({}, "has no hook"),
    ],
)
def test_a_hook_that_no_stage_calls_is_refused_for_plug_ins_too(plugged, content, wanted):
    plugged("ftsec_ray.defenses", "typo", defense_module("typo", **content))
    registry = Registry("defense", "ftsec_ray.defenses")
    assert "typo" in registry.names()
    with pytest.raises(SpecError, match=wanted):
        registry.get("typo")
    assert registry.get("shrink") is DEFENSES.get("shrink"), "the others are still there"


def test_a_plug_in_with_a_hook_is_taken(plugged):
    plugged("ftsec_ray.defenses", "fine", defense_module("fine", revise_model=acts))
    registry = Registry("defense", "ftsec_ray.defenses")
    assert lifecycle.hooks_of(registry.get("fine")) == ("revise_model",)


def test_an_attack_with_a_hook_of_defenses_is_refused(plugged):
    made = method_class(Attack, "looker", inspect=acts, SUCCESS="harmful_rate")
    plugged("ftsec_ray.attacks", "looker", module_of("plugged_looker", Plugged=made))
    with pytest.raises(SpecError, match="only defenses act"):
        Registry("attack", "ftsec_ray.attacks").get("looker")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (StageKind(name="other", position=1), "does not declare a stage kind"),
        (None, "does not declare a stage kind"),
        (StageKind(name="twice", position=1, hooks={"revise_model": ""}, acts="each"), "two kinds"),
        (StageKind(name="twice", position=1, hooks={"cut_model": ""}), "methods cannot act in it"),
    ],
)
def test_a_kind_of_stage_that_is_not_what_its_file_says_is_refused(plugged, kind, wanted):
    plugged("ftsec_ray.stages", "twice", module_of("plugged_stage", KIND=kind))
    with pytest.raises(SpecError, match=wanted):
        hooks()


def test_a_plug_in_cannot_take_the_name_of_a_part_that_is_there(plugged):
    plugged("ftsec_ray.defenses", "onion", defense_module("onion", revise_model=acts))
    with pytest.raises(SpecError, match="onion"):
        Registry("defense", "ftsec_ray.defenses").names()


def test_a_judge_is_the_one_class_of_its_file_and_its_metrics_have_names_of_their_own(plugged):
    assert get_judge("target").name == "target@1"
    with pytest.raises(SpecError, match="did you mean 'target'"):
        judge_class("targt")
    plugged("ftsec_ray.judges", "empty", module_of("plugged_judge"))
    with pytest.raises(SpecError, match="exactly one judge"):
        judge_class("empty")
    taken = schema.Metric("cacc", "", "none", "")
    plugged("ftsec_ray.judges", "empty", module_of("plugged_judge", METRICS=(taken,)))
    with pytest.raises(SpecError, match="cacc"):
        importlib.import_module("ftsec_ray.schema").METRICS  # noqa: B018


OWN = schema.Metric("echo_rate", "", "lower", "", probes=("echo",), verdict="target", without="asr")


def test_an_attack_may_declare_metrics_of_its_own_and_share_them_with_other_attacks(plugged):
    from ftsec_ray.success import choices, without_trigger

    assert "echo_rate" not in schema.METRICS
    plugged("ftsec_ray.attacks", "echo", module_of("plugged_echo", METRICS=(OWN, OWN)))
    assert schema.METRICS["echo_rate"] == OWN
    assert "echo_rate" in choices()
    assert "echo_rate" in schema.SAFETY
    assert (without_trigger("echo_rate"), without_trigger("cacc")) == ("asr", None)


def test_an_attack_cannot_give_a_metric_another_meaning(plugged):
    other = replace(OWN, verdict="other")
    plugged("ftsec_ray.attacks", "echo", module_of("plugged_echo", METRICS=(OWN, other)))
    with pytest.raises(SpecError, match="echo_rate"):
        schema.METRICS["echo_rate"]
