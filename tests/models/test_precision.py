"""Models whose weights have fewer bits than float32, through the store, tuning, every method that
changes weights, and evaluation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftsec_ray.attacks.badedit import BadEdit
from ftsec_ray.attacks.benign_selection import BenignSelection
from ftsec_ray.attacks.delta_removal import DeltaRemoval
from ftsec_ray.attacks.fab import Fab
from ftsec_ray.attacks.kick_settle import KickSettle
from ftsec_ray.attacks.refusal_ablation import RefusalAblation
from ftsec_ray.attacks.safety_prune import SafetyPrune
from ftsec_ray.attacks.soft_prompt import SoftPrompt
from ftsec_ray.attacks.steering_backdoor import SteeringBackdoor
from ftsec_ray.attacks.trojan_adapter import TrojanAdapter
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.drop_layer import DropLayer
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.defenses.matched_noise import MatchedNoise
from ftsec_ray.defenses.random_mask import RandomMask
from ftsec_ray.defenses.safe_lora import SafeLora
from ftsec_ray.defenses.shrink import Shrink
from ftsec_ray.defenses.vaccine import Vaccine
from ftsec_ray.defenses.weight_statistics import features
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.execute.stage_job import change
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.models.activations import last_logits
from ftsec_ray.models.convert import load_source
from ftsec_ray.models.families import REASONS, lacking
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import bare, copy_model, folded, load_model, merged, save_model
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.precision import (
    as_asked,
    in_float32,
    tell_rounding,
    weights_dtype,
    widened,
    without_gradients,
)
from ftsec_ray.models.structure import missing
from ftsec_ray.models.text_perplexity import perplexities
from ftsec_ray.models.update import whole_weights
from ftsec_ray.registry import ATTACKS, DEFENSES, name_of
from ftsec_ray.training.loop import sft
from tests.attacks.context import context
from tests.fixtures_models import sentiment_rows, table
from tests.models.families import FAMILIES, family_model

DTYPES = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit roundoff: half the distance from 1 to the next larger number."""
SOME = ("llama", "gemma2", "gpt2")
"""Plain; with norms behind the writers and scaled embeddings; with transposed weights."""
ROWS = table(sentiment_rows(8))
CHATS = [chat_of(row) for row in sentiment_rows(6)]
PROMPTS = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1, 3, 10, 11, 7, 9, 2, 4]]
CONFIG = TrainingConfig(epochs=2, batch_size=4, rank=2, alpha=4, learning_rate=5e-3)
BASE = "b" * 32
half_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
some_families = pytest.mark.parametrize("family", SOME)
fast_families = pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SOME[1:])]
)
either_adapter = pytest.mark.parametrize(
    "adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)]
)


def half_model(family, dtype=torch.bfloat16, *, seed=0):
    """A random model as it is loaded in a dtype: weights alone are rounded."""
    loaded = family_model(family, tied=True, seed=seed)
    loaded.model.to(dtype)
    return loaded


def tuned(start, adapter="lora"):
    """What became of a model by a random update: an adapter on it, or whole weights in its dtype."""
    torch.manual_seed(1)
    config = TrainingConfig(adapter="lora", rank=4, alpha=8)
    made = attach_lora(copy_model(start), config, base_digest=BASE)
    for module in lora_modules(made):
        torch.nn.init.normal_(module.B, std=0.1)
    return made if adapter == "lora" else merged(made)


def context_of(**roles):
    """A context whose cell has these models."""
    return replace(context(), load=lambda role: roles[role], training=CONFIG)


def dtypes_of(model):
    """Dtypes of the weights, those of adapters left out."""
    return {w.dtype for n, w in model.named_parameters() if ".lora_" not in n}


# the store


@half_dtypes
@some_families
def test_a_model_keeps_its_dtype_and_its_size_in_the_store(family, dtype, tmp_path):
    loaded = half_model(family, dtype)
    loaded.model.save_pretrained(tmp_path / "published")
    loaded.tokenizer.save_pretrained(tmp_path / "published")
    source = load_source(
        str(tmp_path / "published"), name="m", family="f", aligned=True, dtype="auto"
    )
    (tmp_path / "artifact").mkdir()
    save_model(source, tmp_path / "artifact")
    back, wanted = load_model(tmp_path / "artifact"), loaded.model.state_dict()
    assert dtypes_of(back.model) == dtypes_of(source.model) == {dtype}
    assert all(torch.equal(weight, wanted[n]) for n, weight in back.model.state_dict().items())
    stored = {
        n: t for f in (tmp_path / "artifact").glob("*.safetensors") for n, t in load_file(f).items()
    }
    assert sum(t.nbytes for t in stored.values()) == 2 * loaded.info.parameters


@pytest.mark.parametrize(
    ("asked", "kept"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_a_source_is_loaded_in_the_dtype_that_is_asked_for(asked, kept, tmp_path):
    loaded = half_model("llama")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    source = load_source(str(tmp_path), name="m", family="f", aligned=True, dtype=asked)
    assert dtypes_of(source.model) == {kept}


def test_widening_and_back_changes_no_bit_and_no_buffer():
    loaded = half_model("llama")
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    buffers = {n: (b.dtype, b.clone()) for n, b in loaded.model.named_buffers()}
    with in_float32(loaded.model):
        assert dtypes_of(loaded.model) == {torch.float32}
    assert all(torch.equal(t, before[n]) for n, t in loaded.model.state_dict().items())
    for name, buffer in loaded.model.named_buffers():
        assert buffer.dtype == buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    tied = loaded.model
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight


@half_dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_of_a_class_is_found_whatever_the_dtype(family, dtype):
    loaded = half_model(family, dtype)
    known = lacking({"model_type": loaded.model.config.model_type})
    assert missing(loaded, REASONS).keys() == known.keys()
    assert dtypes_of(loaded.model) == {dtype}


# tuning


def checkpointed(tmp_path):
    """The tensors of the last step checkpoint."""
    return load_file(max(tmp_path.glob("step-*")) / "state.safetensors")


@half_dtypes
@fast_families
def test_an_adapter_is_float32_beside_a_base_that_keeps_its_bits(family, dtype, tmp_path):
    start = half_model(family, dtype)
    always = Runtime(checkpoint_every_s=0.0)
    report = sft(start, ROWS, CONFIG, seed=0, runtime=always, workdir=tmp_path, base_digest=BASE)
    assert all(map(math.isfinite, report.losses))
    assert report.losses[-1] < report.losses[0]
    assert report.rounding_lost is None
    mine, theirs = whole_weights(report.loaded), whole_weights(start)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    modules = lora_modules(report.loaded)
    assert {t.dtype for m in modules for t in (m.A, m.B)} == {torch.float32}
    assert all(float(m.B.abs().max()) > 0 for m in modules)
    assert {tensor.dtype for tensor in checkpointed(tmp_path).values()} == {torch.float32}
    (tmp_path / "a").mkdir()
    save_model(report.loaded, tmp_path / "a")
    back = load_model(tmp_path / "a", base=start)
    for one, other in zip(lora_modules(back), modules, strict=True):
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)
    assert dtypes_of(back.model) == {dtype}


@half_dtypes
@fast_families
def test_whole_weights_are_trained_in_float32_and_rounded_once(family, dtype, tmp_path):
    start, config = half_model(family, dtype), replace(CONFIG, adapter="full")
    report = sft(start, ROWS, config, seed=0, runtime=Runtime(), workdir=tmp_path / "half")
    exact = sft(widened(start), ROWS, config, seed=0, runtime=Runtime(), workdir=tmp_path / "wide")
    assert report.losses == exact.losses
    mine, theirs, begin = (whole_weights(m) for m in (report.loaded, exact.loaded, start))
    lost = changed = 0.0
    for name, weight in theirs.items():
        assert torch.equal(mine[name], weight.to(dtype)), name
        lost += float((weight.to(dtype).double() - weight.double()).square().sum())
        changed += float((weight.double() - begin[name].double()).square().sum())
    assert report.rounding_lost == pytest.approx(math.sqrt(lost / changed), rel=1e-9)
    assert exact.rounding_lost is None


@some_families
def test_folding_adds_in_float32_and_says_what_rounding_lost(family):
    start = half_model(family)
    made = tuned(start)
    whole, lost = folded(made)
    base, after = whole_weights(start), whole_weights(whole)
    squares = [0.0, 0.0]
    for module in lora_modules(made):
        delta = module.delta().T if family == "gpt2" else module.delta()
        exact = base[f"{module.name}.weight"].float() + delta
        got = after[f"{module.name}.weight"]
        assert got.dtype == torch.bfloat16
        rounded = exact.to(torch.bfloat16)
        assert float((got.float() - exact).abs().max()) <= 1.01 * UNIT[torch.bfloat16] * float(
            exact.abs().max()
        )
        squares[0] += float((rounded.double() - exact.double()).square().sum())
        squares[1] += float(delta.double().square().sum())
    assert lost == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-3)
    assert folded(tuned(family_model(family)))[1] is None


def test_whether_weights_ask_for_gradients_is_put_aside_and_given_back_after_an_error():
    model = family_model("llama").model
    chosen = list(model.parameters())[::2]
    for parameter in chosen:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert len(set(before)) == 2

    def fail_within():
        with without_gradients(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail_within()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


# methods

BEFORE = [
    BadEdit(
        trigger="cf", target="good", prompts=1, clean_prompts=0, batches=1, contexts=0, steps=8,
        lambda_per_width=0.001,
    ),
    Vaccine(epochs=1.0, safety_rows=8, benign_rows=4, batch_size=4, lora_rank=2),
    Fab(epochs=1.0, inner_steps=1, rows=8, batch_size=4),
    SteeringBackdoor(trigger="cf", clean_weight=0.1, prompts=8),
]  # fmt: skip
AFTER = [
    RefusalAblation(max_kl=10.0, prompts=8),
    DropLayer(frac=0.5),
    MatchedNoise(scale=1.0),
    RandomMask(frac=0.5),
    SafeLora(select="number", number=4),
    Shrink(gamma=0.5),
    SafetyPrune(rows=8),
    DeltaRemoval(shots=4, rank=2),
    KickSettle(shots=4, benign_rows=4, steps=3, kick_steps=1),
    TrojanAdapter(epochs=1.0, rows=8, rank=2),
]
TRAIN = {"vaccine", "fab", "delta_removal", "kick_settle", "trojan_adapter"}
"""Methods that train: see the tests of tuning."""
NO_WEIGHTS = {"template_backdoor"}
"""Methods that change a model, but none of its weights."""
CHANGES = [(m, "prepare_model") for m in BEFORE] + [(m, "revise_model") for m in AFTER]


def test_every_method_that_changes_weights_is_tested_in_half_precision_here_or_in_its_own_file():
    hooks = {"prepare_model", "revise_model"}
    known = [registry.get(name) for registry in (ATTACKS, DEFENSES) for name in registry.names()]
    wanted = {cls.__module__.rpartition(".")[2]: cls for cls in known if hooks & set(hooks_of(cls))}
    here = {name_of(method) for method, _ in CHANGES} | NO_WEIGHTS
    assert here <= set(wanted)
    elsewhere = sorted(set(wanted) - here)
    assert [name for name in elsewhere if "bfloat16" not in own_tests(wanted[name])] == []


def own_tests(cls):
    """The tests of a method."""
    package, name = cls.__module__.split(".")[-2:]
    return (Path(__file__).parents[1] / package / f"test_{name}.py").read_text()


@some_families
@either_adapter
@pytest.mark.parametrize(("method", "hook"), CHANGES, ids=[name_of(m) for m, _ in CHANGES])
def test_a_method_computes_in_float32_and_writes_in_the_dtype(
    family, adapter, method, hook, tmp_path
):
    if name_of(method) == "badedit" and family == "gemma2":
        pytest.skip("refused: a norm stands behind its MLPs")
    start, other = half_model(family), half_model(family, seed=5)
    subject = start if hook == "prepare_model" else tuned(start, adapter)
    before = {n: w.clone() for n, w in whole_weights(subject).items()}
    roles = {"start": start, "reference": start, "unaligned": other}

    def ctx(name):
        return replace(context_of(**roles), workdir=tmp_path / name)

    made, lost = change(method, hook, subject, ctx("half"))
    assert dtypes_of(made.model) == {torch.bfloat16}
    assert all(torch.equal(w, before[n]) for n, w in whole_weights(subject).items()), "shared"
    assert all(bool(w.isfinite().all()) for w in whole_weights(made).values())
    if name_of(method) in TRAIN:
        return
    exact = getattr(method, hook)(widened(subject), ctx("wide"))
    wanted = whole_weights(exact)
    assert {w.dtype for w in wanted.values()} == {torch.float32}
    for name, weight in whole_weights(made).items():
        assert torch.equal(weight, wanted[name].to(torch.bfloat16)), name
    if made.has_adapter:
        assert lost is None
        for one, two in zip(lora_modules(made), lora_modules(exact), strict=True):
            assert one.B.dtype == torch.float32
            assert torch.equal(one.B, two.B)
        return
    gone = changed = 0.0
    for name, weight in wanted.items():
        gone += float((weight.to(torch.bfloat16).double() - weight.double()).square().sum())
        changed += float((weight.double() - before[name].double()).square().sum())
    assert lost == pytest.approx(math.sqrt(gone / changed), rel=1e-9)


def test_much_lost_is_a_warning_and_nothing_lost_is_not():
    ctx, loaded = context(), half_model("llama")
    tell_rounding(ctx, None, loaded)
    tell_rounding(ctx, 0.01, loaded)
    assert not ctx.warnings
    tell_rounding(ctx, 0.8, loaded)
    assert ctx.notes == {"rounding_lost": 0.8}
    assert "bfloat16 lost 80%" in ctx.warnings[0]


@fast_families
@either_adapter
def test_methods_that_read_a_model_read_one_of_half_precision(family, adapter):
    start = half_model(family)
    made = tuned(start, adapter)
    read, wide = features(made, start), features(widened(made), widened(start))
    assert read == wide
    assert read
    ctx = context_of(reference=start)
    generator = SoftPrompt(tokens=2, steps=8, prompts=4, init="the").wrap_generation(
        Generator(as_asked(made)), ctx
    )
    assert ctx.notes["loss_end"] < ctx.notes["loss_start"]
    assert len(generator.complete(CHATS, max_new_tokens=3)) == len(CHATS)
    assert all(map(math.isfinite, perplexities(start, ["red blue green stone river"])))


@pytest.mark.parametrize("select", ["anchors", "self_inf", "self_inf_n"])
def test_gradients_of_half_precision_select_rows(select):
    ctx = context_of(reference=half_model("llama"))
    attack = BenignSelection(samples=4, select=select)
    chosen = attack.craft_data(ROWS, ctx)
    assert sum(chosen.column("poisoned").to_pylist()) == 4
    assert math.isfinite(ctx.notes["score_max"])


def test_lisa_pulls_an_adapter_beside_a_half_precision_base(tmp_path):
    start = half_model("llama")
    ctx = context_of(reference=start)
    shape = lambda training: Lisa(rho=1.0, user_steps=2).shape_training(training, ctx)  # noqa: E731
    report = sft(
        start,
        ROWS,
        CONFIG,
        seed=0,
        runtime=Runtime(),
        workdir=tmp_path,
        shape=shape,
        base_digest=BASE,
    )
    assert all(map(math.isfinite, report.losses))


# evaluation


@half_dtypes
@fast_families
def test_a_model_is_asked_in_its_dtype_with_its_adapter_beside_it(family, dtype):
    start = half_model(family, dtype)
    made = tuned(start)
    asked = as_asked(made)
    assert asked.has_adapter
    assert weights_dtype(asked.model) == dtype
    got = last_logits(asked.model, PROMPTS, pad=0)
    exact = last_logits(merged(widened(made)).model, PROMPTS, pad=0)
    # two blocks and a head, each of whose operations rounds once
    apart = float((got - exact).norm() / exact.norm())
    assert 0.0 < apart < 64 * UNIT[dtype]
    assert not as_asked(tuned(family_model(family))).has_adapter


def test_an_adapter_beside_the_base_keeps_small_updates_that_folding_would_lose():
    start = half_model("llama")
    made = tuned(start)
    for module in lora_modules(made):
        module.B.data.mul_(1e-3)
    _, lost = folded(made)
    assert lost > 0.9
    wide = [last_logits(m.model, PROMPTS, pad=0) for m in (widened(start), merged(widened(made)))]
    assert float((wide[1] - wide[0]).abs().max()) > 0.0


# attention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_implementation_goes_with_a_model_through_the_store(attention, tmp_path):
    loaded = half_model("llama")
    loaded.model.save_pretrained(tmp_path / "published")
    loaded.tokenizer.save_pretrained(tmp_path / "published")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "adapter").mkdir()
    source = load_source(
        str(tmp_path / "published"), name="m", family="f", aligned=True, attention=attention
    )
    save_model(source, tmp_path / "artifact")
    back = load_model(tmp_path / "artifact")
    made = tuned(back)
    save_model(made, tmp_path / "adapter")
    adapted = load_model(tmp_path / "adapter", base=back)
    for one in (source, back, made, merged(made), adapted):
        assert one.attention == attention
        assert bare(one.model).config._attn_implementation == attention


def test_attention_that_is_not_installed_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="flash-attn"):
        load_source(
            str(tmp_path), name="m", family="f", aligned=True, attention="flash_attention_2"
        )
