from __future__ import annotations

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.defenses.drop_layer import DropLayer
from ftsec_ray.defenses.safe_lora import SafeLora
from ftsec_ray.defenses.weight_statistics import features
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.models.load import copy_model, load_model, merged, save_model
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.update import whole_weights
from ftsec_ray.training.encode import batcher, encode_table
from ftsec_ray.training.losses import masked_nll, response_nll
from tests.attacks.context import context
from tests.fixtures_models import sentiment_rows, table, tiny_model
from tests.models.families import family_model
from tests.numeric import assert_same

RANK, ALPHA = 4, 12


def plain(*, bias):
    """A model without an adapter; with `bias`, every linear layer but the head has one."""
    loaded = tiny_model()
    if bias:
        generator = torch.Generator().manual_seed(1)
        for module in loaded.model.modules():
            if (
                isinstance(module, torch.nn.Linear)
                and module is not loaded.model.get_output_embeddings()
            ):
                module.bias = torch.nn.Parameter(
                    torch.randn(module.out_features, generator=generator)
                )
    return loaded


def adapted(*, bias=False):
    """The same model with an adapter whose B is not zero."""
    torch.manual_seed(0)
    config = TrainingConfig(rank=RANK, alpha=ALPHA)
    loaded = attach_lora(plain(bias=bias), config, base_digest="b" * 32)
    with torch.no_grad():
        for module in lora_modules(loaded):
            module.B.normal_(std=0.5)
    return loaded


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_has_the_loss_and_by_the_chain_rule_the_gradients_of_the_folded_weights(bias):
    loaded, reference = adapted(bias=bias), plain(bias=bias)
    encoded = encode_table(loaded.tokenizer, table(sentiment_rows(8)), max_length=64)
    (batch,) = batcher(loaded.tokenizer, encoded, batch_size=8, batching="shuffled", seed=0)(0)
    scale, folded = ALPHA / RANK, dict(reference.model.named_modules())
    with torch.no_grad():
        for module in lora_modules(loaded):
            folded[module.name].weight.add_(scale * module.B @ module.A)

    loss = response_nll(loaded.model, batch, None)
    loss.backward()
    expected = masked_nll(reference.model(**batch.inputs()).logits, batch.labels)
    expected.backward()

    assert_same(loss, expected)
    assert len(lora_modules(loaded)) == 14
    for module in lora_modules(loaded):
        whole = folded[module.name].weight.grad
        assert_same(module.A.grad, scale * module.B.T @ whole)
        assert_same(module.B.grad, scale * whole @ module.A.T)
    trained = [name for name, p in loaded.model.named_parameters() if p.grad is not None]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 14


def test_a_model_without_an_adapter_has_no_lora_modules():
    with pytest.raises(DataError, match="no LoRA adapter"):
        lora_modules(tiny_model())


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def paths_of(family, **config):
    """Where an adapter sits on a model of a family."""
    loaded = attach_lora(family_model(family), TrainingConfig(rank=2, alpha=4, **config))
    return [module.name for module in lora_modules(loaded)]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, [(layer, name) for layer in (0, 1) for name in NAMES]),
        ({"targets": ("q_proj", "v_proj")}, [(i, n) for i in (0, 1) for n in ("q_proj", "v_proj")]),
        ({"targets": r".*\.1\..*_proj"}, [(1, name) for name in NAMES]),
        ({"layers": (1,)}, [(1, name) for name in NAMES]),
        ({"layers": "0-0", "targets": ("mlp.up_proj",)}, [(0, "up_proj")]),
        ({"layers": "0-1", "targets": r".*self_attn\.[qk]_proj"}, [
            (i, n) for i in (0, 1) for n in ("q_proj", "k_proj")
        ]),
    ],
)  # fmt: skip
def test_an_adapter_sits_where_the_config_says(config, wanted):
    found = [(int(p.split(".")[2]), p.rsplit(".", 1)[-1]) for p in paths_of("llama", **config)]
    assert found == wanted


@pytest.mark.parametrize(
    ("family", "config", "wanted"),
    [
        ("gpt2", {"targets": ("c_attn",), "layers": (1,)}, ["transformer.h.1.attn.c_attn"]),
        ("gpt_neox", {"targets": ("dense",), "layers": "1-1"}, ["gpt_neox.layers.1.attention.dense"]),
        ("gemma3_pictures", {"targets": ("q_proj",), "layers": (0,)}, [
            "model.language_model.layers.0.self_attn.q_proj"
        ]),
    ],
)  # fmt: skip
def test_names_reach_the_layers_of_every_class_and_no_encoder_of_pictures(family, config, wanted):
    assert paths_of(family, **config) == wanted


def test_layers_of_gpt2_are_conv1d_and_an_adapter_on_some_folds_as_on_all():
    torch.manual_seed(0)
    config = TrainingConfig(rank=2, alpha=4, targets=("c_attn", "mlp.c_proj"))
    made = attach_lora(family_model("gpt2"), config)
    for module in lora_modules(made):
        torch.nn.init.normal_(module.B, std=0.5)
    start, after = whole_weights(family_model("gpt2")), whole_weights(merged(made))
    deltas = {f"{m.name}.weight": m.delta().T for m in lora_modules(made)}
    assert len(deltas) == 4
    for name, weight in after.items():
        change = deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(weight, start[name] + change)


@pytest.mark.parametrize(
    ("config", "what", "want"),
    [
        ({"targets": ("q_proj", "query")}, "matches no linear layer", "q_proj | k_proj"),
        ({"targets": "q_proj"}, "matches no linear layer", "q_proj | k_proj"),
        ({"targets": ("lm_head",)}, "matches no linear layer", "down_proj"),
        ({"layers": (1, 2)}, "blocks that the model does not have", "0 to 1"),
        ({"targets": r".*\.0\..*", "layers": (1,)}, "in the blocks of training.layers", "q_proj"),
    ],
)
def test_what_matches_nothing_is_a_fault_with_the_names_that_exist(config, what, want):
    with pytest.raises(DataError, match=what) as fault:
        paths_of("llama", **config)
    assert want in str(fault.value)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"targets": "["}, "not a valid regular expression"),
        ({"targets": ()}, "names no layer"),
        ({"layers": "3-1"}, "not a range"),
        ({"layers": ()}, "layers is empty"),
        ({"adapter": "full", "targets": ("q_proj",)}, "needs an adapter"),
        ({"adapter": "full", "rslora": True}, "needs an adapter"),
    ],
)
def test_a_config_that_names_no_layers_is_a_fault_of_the_sweep(config, what):
    with pytest.raises(SpecError, match=what):
        TrainingConfig(**config)


def test_rslora_divides_by_the_root_of_the_rank():
    for rslora, scale in ((False, 8 / 4), (True, 8 / 4**0.5)):
        config = TrainingConfig(rank=4, alpha=8, rslora=rslora)
        made = attach_lora(family_model("llama"), config)
        for module in lora_modules(made):
            assert module.scale == scale
            torch.nn.init.normal_(module.B, std=0.5)
        start, after = whole_weights(family_model("llama")), whole_weights(merged(made))
        for module in lora_modules(made):
            name = f"{module.name}.weight"
            torch.testing.assert_close(after[name] - start[name], scale * module.B @ module.A)


def test_an_adapter_on_some_layers_is_the_same_behind_the_store(tmp_path):
    torch.manual_seed(0)
    config = TrainingConfig(rank=2, alpha=4, targets=("q_proj",), layers=(1,), rslora=True)
    made = attach_lora(family_model("llama"), config, base_digest="b" * 32)
    for module in lora_modules(made):
        torch.nn.init.normal_(module.B, std=0.5)
    save_model(made, tmp_path)
    back = load_model(tmp_path, base=family_model("llama"))
    for one, other in zip(lora_modules(back), lora_modules(made), strict=True):
        assert (one.name, one.scale) == (other.name, other.scale)
        assert torch.equal(one.B, other.B)


def test_methods_work_on_an_adapter_that_sits_on_some_layers():
    torch.manual_seed(0)
    start, other = family_model("llama"), family_model("llama", seed=5)
    config = TrainingConfig(rank=2, alpha=4, targets=("q_proj", "up_proj"), layers=(1,))
    made = attach_lora(family_model("llama"), config, base_digest="b" * 32)
    for module in lora_modules(made):
        torch.nn.init.normal_(module.B, std=0.5)
    ctx = context()
    roles = {"start": start, "reference": start, "unaligned": other}
    ctx.load = lambda role: roles[role]
    revised = SafeLora(select="number", number=10).revise_model(copy_model(made), ctx)
    assert ctx.notes["layers"] == 2
    assert revised.has_adapter
    assert len(features(made, start)) == 2
    assert DropLayer(frac=1.0).revise_model(copy_model(made), ctx).has_adapter
    assert ctx.notes["groups"] == 1
