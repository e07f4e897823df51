"""Methods that a class of models does not allow: refused when the sweep is planned, or when the
model is loaded.
"""

from __future__ import annotations

import json

import pytest

from ftsec_ray.config.sweep import ExcludeRule, ModelSpec, TrainingConfig
from ftsec_ray.errors import DataError, SpecFaults
from ftsec_ray.models.structure import check_structure
from ftsec_ray.plan import build_plan
from tests.models.families import family_model
from tests.plan.test_build_plan import only, sweep


def local(folder, **config):
    """A local model of which there is a configuration alone, which planning reads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSpec(name="m", source=str(folder), family="f", aligned=True, parameters=1_000_000)


@pytest.mark.parametrize(
    ("model_type", "attack", "reason"),
    [
        ("gemma2", "badedit", "norm stands behind its down-projections"),
        ("olmo2", "badedit", "norm stands behind its down-projections"),
        ("gemma3", "soft_prompt", "token ids alone"),
        ("mixtral", "refusal_ablation", "one attention and one MLP"),
    ],
)
def test_a_method_that_a_class_does_not_allow_is_refused_at_planning(
    tmp_path, model_type, attack, reason
):
    model = local(tmp_path / "m", model_type=model_type)
    with pytest.raises(SpecFaults, match=reason) as fault:
        build_plan(sweep(models=(model,), attacks=("none", attack)))
    assert f"exclude {{model: m, attack: {attack}}}" in str(fault.value)
    rule = ExcludeRule(model="m", attack=attack)
    plan = build_plan(sweep(models=(model,), attacks=("none", attack), exclude=(rule,)))
    assert len(plan.cells) == 1
    assert "structure" not in only(plan, "source").where


def test_packing_is_refused_at_planning_where_rows_would_see_each_other(tmp_path):
    model = local(tmp_path / "m", model_type="opt")
    packed = TrainingConfig(batching="packed")
    with pytest.raises(SpecFaults, match="would see each other"):
        build_plan(sweep(models=(model,), training=packed))
    assert build_plan(sweep(models=(model,))).cells


@pytest.mark.parametrize("attack", ["badedit", "refusal_ablation", "soft_prompt"])
def test_a_class_that_allows_all_is_planned_and_measured_when_it_is_loaded(tmp_path, attack):
    model = local(tmp_path / "m", model_type="llama")
    plan = build_plan(sweep(models=(model,), attacks=("none", attack)))
    plain = build_plan(sweep(models=(model,)))
    told = only(plan, "source").where["structure"]
    assert list(told) == [f"attack {attack}"]
    # who asks changes nothing of what the stage gives
    assert only(plan, "source").digest == only(plain, "source").digest


def test_a_loaded_model_is_refused_with_every_method_that_it_does_not_allow():
    needs = {"attack badedit": ["linear_mlp"], "attack refusal_ablation": ["residual_writers"]}
    check_structure(family_model("llama"), needs)
    with pytest.raises(DataError, match="attack badedit: a norm stands behind") as fault:
        check_structure(family_model("olmo2"), needs)
    assert "refusal_ablation" not in str(fault.value)
