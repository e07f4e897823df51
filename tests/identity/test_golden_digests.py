"""Digests that must not move: of fixed values, under every Python. Whoever means to move them
raises FORMAT_VERSION, since no store holds the new ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.identity import FORMAT_VERSION, digests
from ftsec_ray.plan.build import build_plan
from tests.identity.interpreters import SUPPORTED, output_under
from tests.plan.test_build_plan import attack, only, sweep

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_digests.json").read_text())


@pytest.mark.parametrize("version", SUPPORTED)
def test_fixed_values_have_the_same_digests_under_every_python(version):
    assert json.loads(output_under(version, str(HERE / "fixed_digests.py"))) == GOLDEN


def test_a_plan_makes_its_digests_of_kind_version_methods_params_inputs_and_seed():
    badnets = attack("badnets", rate=0.25)
    plan = build_plan(sweep(attacks=(badnets,), seeds=(3,)))
    craft = only(plan, "craft")
    method = digests.of_method("attack", "badnets", badnets, version=type(badnets).VERSION)
    head = digests.of_head(
        "craft", 1, [method], {"training": craft.params["training"], "numerics": "portable"}
    )
    assert digests.of_stage(head, craft.inputs, 3) == craft.digest
    for other in (
        digests.of_head("craft", 2, [method], craft.params),
        digests.of_head("craft", 1, [method], craft.params, form=FORMAT_VERSION - 1),
        digests.of_head("craft", 1, [], craft.params),
        digests.of_head("bank", 1, [method], craft.params),
        digests.of_head("craft", 1, [method], {}),
    ):
        assert other != head
    assert len({digests.of_stage(head, craft.inputs, seed) for seed in (None, 0, 3)}) == 3


def test_the_parameters_of_a_method_count_once():
    plan = build_plan(sweep(attacks=("badnets",)))
    craft = only(plan, "craft")
    method = digests.of_method("attack", "badnets", attack("badnets"), version=1)
    without = {key: value for key, value in craft.params.items() if key != "methods"}
    assert craft.params["methods"][0]["params"]
    assert digests.of_head("craft", 1, [method], craft.params) == digests.of_head(
        "craft", 1, [method], without
    )


def test_a_method_is_known_by_kind_name_version_parameters_and_a_file_from_elsewhere():
    def of(kind="attack", name="a", params=None, version=1, file=None):
        return digests.of_method(kind, name, params or {"n": 1}, version=version, file=file)

    others = [
        of(kind="defense"),
        of(name="b"),
        of(params={"n": 2}),
        of(version=2),
        of(file="0" * 32),
    ]
    assert len({of(), *others}) == 6


def test_what_is_measured_does_not_move_what_comes_before_it():
    before = build_plan(sweep())
    after = build_plan(sweep(evaluation=EvaluationConfig(prompts=7)))
    assert only(before, "finetune").digest == only(after, "finetune").digest
    assert only(before, "generate").digest != only(after, "generate").digest
