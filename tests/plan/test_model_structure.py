"""Methods that a class of models does not allow: refused when the sweep is planned, or when the
model is loaded.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ftsec_ray.config.sweep import ExcludeRule, ModelSpec, TrainingConfig
from ftsec_ray.errors import DataError, SpecFaults
from ftsec_ray.models.structure import check_structure
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.origin import model_origin, weights_count
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
        ("gemma2", "badedit", "norm follows its down-projections"),
        ("olmo2", "badedit", "norm follows its down-projections"),
        ("gemma3", "soft_prompt", "token ids only"),
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


@pytest.mark.parametrize(
    "header",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (16).to_bytes(8, "little") + b'{"w":{"shape":3}',
        (7).to_bytes(8, "little") + b'{"w":3}',
    ],
)
def test_weights_whose_header_says_nonsense_have_no_count(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(header)
    assert weights_count(str(tmp_path)) is None


def test_the_weights_of_a_local_folder_are_counted_from_their_headers(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert weights_count(str(tmp_path)) == 22


def test_packing_is_refused_at_planning_where_rows_would_see_each_other(tmp_path):
    model = local(tmp_path / "m", model_type="opt")
    packed = TrainingConfig(batching="packed")
    with pytest.raises(SpecFaults, match="would attend to each other"):
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
    with pytest.raises(DataError, match="attack badedit: a norm follows") as fault:
        check_structure(family_model("olmo2"), needs)
    assert "refusal_ablation" not in str(fault.value)


def with_weights(folder, names, dtype="float32"):
    """A local model of which there are names, shapes and dtypes of weights, which planning reads."""
    model = local(folder, model_type="llama")
    kept = getattr(torch, dtype)
    shapes = {name: (4,) if "norm" in name else (4, 4) for name in names}
    save_file(
        {name: torch.zeros(shape, dtype=kept) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return model


WEIGHTS = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ),
]


@pytest.mark.parametrize(
    ("training", "what"),
    [
        ({"targets": ("query",)}, "matches no linear layer .*query.* q_proj | up_proj"),
        ({"targets": r"model\.h\..*"}, "matches no linear layer"),
        ({"targets": ("embed_tokens",)}, "matches no linear layer"),
        ({"layers": "0-2"}, "blocks that the model does not have"),
    ],
)
def test_an_adapter_on_layers_that_a_model_lacks_is_refused_at_planning(tmp_path, training, what):
    model = with_weights(tmp_path / "m", WEIGHTS)
    ladder = ModelSpec(name="l", source="ladder:1m", family="ladder", aligned=True)
    with pytest.raises(SpecFaults, match=what):
        build_plan(sweep(models=(model,), training=TrainingConfig(**training)))
    if "layers" not in training:
        with pytest.raises(SpecFaults, match=what.partition(" .*")[0]):
            build_plan(sweep(models=(ladder,), training=TrainingConfig(**training)))


def test_an_adapter_on_layers_that_a_model_has_is_planned_and_changes_its_digest(tmp_path):
    model = with_weights(tmp_path / "m", WEIGHTS)
    plain = only(build_plan(sweep(models=(model,))), "finetune")
    said = TrainingConfig(targets=("q_proj",), layers="1-1")
    other = only(build_plan(sweep(models=(model,), training=said)), "finetune")
    assert plain.digest != other.digest
    assert "targets" not in plain.params["training"]
    assert other.params["training"]["targets"] == ["q_proj"]
    defaults = TrainingConfig(targets="all-linear", layers=None, rslora=False)
    same = only(build_plan(sweep(models=(model,), training=defaults)), "finetune")
    assert same.digest == plain.digest


@pytest.mark.parametrize(
    ("kept", "asked", "said"),
    [
        ("float32", "auto", None),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float16"),
        ("bfloat16", "float32", None),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_a_dtype_enters_the_digest_of_a_source_where_it_is_not_float32(tmp_path, kept, asked, said):
    model = replace(with_weights(tmp_path / "m", WEIGHTS, kept), dtype=asked)
    assert model_origin(model, model.source).params.get("dtype") == said
    (tmp_path / "m" / "config.json").write_text(json.dumps({"torch_dtype": kept}))
    assert model_origin(model, model.source).params.get("dtype") == said


def test_the_dtype_of_other_sources_is_what_it_was_where_that_is_known(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    hub = ModelSpec(name="m", source="owner/m", family="f", aligned=True)
    for model, said in (
        (replace(hub, source=str(file)), None),
        (replace(hub, source="ladder:1m"), None),
        (hub, "auto"),
        (replace(hub, dtype="float32"), None),
        (replace(hub, dtype="bfloat16"), "bfloat16"),
    ):
        assert model_origin(model, model.source).params.get("dtype") == said
