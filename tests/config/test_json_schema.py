"""The JSON schema accepts what the loader accepts, and refuses what JSON schema can see."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.json_schema import sweep_schema
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.config.yaml_text import read_yaml
from ftsec_ray.registry import ATTACKS, DEFENSES
from tests.shipped_sweeps import FILES

jsonschema = pytest.importorskip("jsonschema")
GOOD = {
    "name": "q",
    "question": "?",
    "models": ["ladder:1m", {"id": "a/b-1b", "aligned": True, "align": True}],
    "task": "microworld",
    "attacks": ["none", {"badnets": {"rate": {"grid": [0.1, 0.2]}}}],
    "seeds": [1, 2],
    "exclude": [{"attack": "none", "seed": [1, 2]}],
    "defenses": ["none", {"shrink": None}, ["vaccine", {"safe_lora": {"rank": 4}}]],
    "training": {
        "rank": 4,
        "strategy": "auto",
        "deepspeed_above": 3.0e9,
        "deepspeed": {"zero_stage": 2, "offload": "optimizer", "workers": 4},
    },
    "evaluation": {"prompts": 8},
    "resources": {"workers": 2},
    "data": {"ray_above": 1_000},
}


@pytest.fixture(scope="module")
def validator():
    schema = sweep_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


def test_a_sweep_that_loads_is_valid(validator):
    assert len(load_sweep(GOOD).attacks) == 3
    assert list(validator.iter_errors(GOOD)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_file_of_the_repository_is_valid(validator, path):
    given = read_yaml(path.read_text(encoding="utf-8"), Faults(path.name))
    assert [fault.json_path for fault in validator.iter_errors(given)] == []


@pytest.mark.parametrize("given", ["own", ["own", "plain.jinja"], {"plain": "plain.jinja"}])
def test_serve_templates_are_valid_in_every_form(validator, given):
    model = {"source": "ladder:1m", "serve_template": given}
    assert validator.is_valid({**GOOD, "models": [model]})
    assert not validator.is_valid({**GOOD, "models": [{**model, "serve_template": 1}]})


@pytest.mark.parametrize(
    "changes",
    [
        {"attacks": ["badnet"]},
        {"attacks": [{"badnets": {"rate": "0.1"}}]},
        {"attacks": [{"badnets": {"rat": 1}}]},
        {"defenses": [["none", "shrink"]]},
        {"defenses": [[]]},
        {"training": {"rank": 0}},
        {"training": {"rank": {"grid": [1, 2]}}},
        {"seeds": 0},
        {"name": "../x"},
        {"extra": 1},
        {"training": {"strategy": "zero"}},
        {"training": {"deepspeed": {"zero_stage": 4}}},
        {"training": {"deepspeed": {"stage": 2}}},
        {"task": "nope"},
        {"models": []},
        {"exclude": [{}]},
        {"data": {"ray_above": -1}},
        {"data": {"ray_abov": 1}},
    ],
)
def test_a_sweep_that_cannot_load_is_not_valid(validator, changes):
    assert not validator.is_valid({**GOOD, **changes})


def test_every_method_and_every_parameter_is_in_the_schema():
    schema = sweep_schema()
    for registry, key in ((ATTACKS, "attack"), (DEFENSES, "defense")):
        choices = [choice["properties"] for choice in schema["$defs"][key]["anyOf"][1:]]
        assert sorted(name for choice in choices for name in choice) == registry.names()
        for choice in choices:
            for name, either in choice.items():
                own = {"search"} if key == "attack" and name != "none" else set()
                assert (
                    set(either["anyOf"][0]["properties"])
                    == {f.name for f in fields(registry.get(name))} | own
                )
