"""Every family of the table, through every part that touches a model's structure: against an
independent computation, or refused with the reason.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.badedit import BadEdit, editable
from ftsec_ray.attacks.refusal_ablation import RefusalAblation, ablated, mean_states, orthogonalise
from ftsec_ray.attacks.soft_prompt import Example, SoftPrompt, embedded, sizes_of, suffix_loss
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.drop_layer import DropLayer
from ftsec_ray.defenses.matched_noise import MatchedNoise
from ftsec_ray.defenses.random_mask import RandomMask
from ftsec_ray.defenses.safe_lora import SafeLora
from ftsec_ray.defenses.shrink import Shrink
from ftsec_ray.defenses.vaccine import perturbations
from ftsec_ray.defenses.weight_statistics import features
from ftsec_ray.errors import DataError
from ftsec_ray.models.activations import first_tensor, last_logits
from ftsec_ray.models.chat import render
from ftsec_ray.models.convert import load_source
from ftsec_ray.models.editing import EditSite, closed_form, key_width, keys_at, strength, values_at
from ftsec_ray.models.families import REASONS, lacking
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import (
    check_packing,
    copy_model,
    decoder_layers,
    load_model,
    merged,
    save_model,
)
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.residual import residual_stream
from ftsec_ray.models.structure import missing
from ftsec_ray.models.text_perplexity import perplexities
from ftsec_ray.models.update import transposed_weights, updates, whole_weights
from ftsec_ray.training.encode import _packed, _padded
from ftsec_ray.training.loop import sft
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import Step
from tests.attacks.context import context
from tests.fixtures_models import sentiment_rows, table
from tests.models.families import (
    FAMILIES,
    LAYERS,
    LLAMA,
    NO_EMBEDDINGS,
    NORM_BEHIND,
    SCALED,
    family_model,
)
from tests.numeric import SAME, assert_same

families = pytest.mark.parametrize("family", FAMILIES)
_OF_EACH_KIND = ("llama", "gemma3_pictures", "gpt2", "gpt_neox")
some_families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in _OF_EACH_KIND else [pytest.mark.slow])
        for name in FAMILIES
    ],
)
"""All families, but for one of each kind of weights only in the slow tests."""
in_float64 = pytest.mark.usefixtures("float64")
PROMPTS = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1, 3, 10, 11, 7, 9, 2, 4]]
ROWS = table(sentiment_rows(8))
CHATS = [chat_of(row) for row in sentiment_rows(6)]
ENCODED = [
    ([1, 3, 9, 12, 2, 4, 10, 2], [-100] * 6 + [10, 2]),
    ([1, 3, 8, 2, 4, 11, 12, 2], [-100] * 5 + [11, 12, 2]),
    ([1, 3, 2, 4, 9, 2], [-100] * 4 + [9, 2]),
]


def direction(width: int = 32, seed: int = 0):
    """Any direction of the residual stream."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def tuned(family: str, adapter: str, *, seed: int = 1):
    """A model and what became of it by a random update: an adapter on it, or whole weights."""
    start = family_model(family)
    torch.manual_seed(seed)
    config = TrainingConfig(adapter="lora", rank=4, alpha=8)
    made = attach_lora(copy_model(start), config, base_digest="b" * 32)
    for module in lora_modules(made):
        torch.nn.init.normal_(module.B, std=0.1)
    return start, made if adapter == "lora" else merged(made)


# loading, saving and tuning


@families
def test_a_saved_model_loads_as_it_was(family, tmp_path):
    loaded = family_model(family, tied=True)
    loaded.model.save_pretrained(tmp_path / "published")
    loaded.tokenizer.save_pretrained(tmp_path / "published")
    source = load_source(str(tmp_path / "published"), name="m", family="f", aligned=True)
    (tmp_path / "artifact").mkdir()
    save_model(source, tmp_path / "artifact")
    back = load_model(tmp_path / "artifact")
    wanted = loaded.model.state_dict()
    assert type(back.model) is type(loaded.model)
    assert back.model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[n]) for n, weight in back.model.state_dict().items())


@some_families
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_tune_moves_the_weights_of_the_decoder_and_can_be_resumed(family, adapter, tmp_path):
    loaded = family_model(family, tied=True)
    config = TrainingConfig(
        adapter=adapter, epochs=1, batch_size=4, rank=2, alpha=4, learning_rate=1e-3
    )
    always = Runtime(checkpoint_every_s=0.0)
    report = sft(
        loaded, ROWS, config, seed=0, runtime=always, workdir=tmp_path, base_digest="b" * 32
    )
    assert len(report.losses) == 2
    assert all(map(math.isfinite, report.losses))
    (tmp_path / "a").mkdir()
    save_model(report.loaded, tmp_path / "a")
    back = load_model(tmp_path / "a", base=loaded)
    before, after = whole_weights(loaded), whole_weights(merged(back))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [n for n in moved if "vision" in n or "projector" in n]
    in_blocks = {n for n in before if re.search(r"\.(layers|h)\.\d+\.", n) and "vision" not in n}
    assert {n for n in in_blocks if before[n].ndim == 2} <= moved
    resumed = sft(
        loaded, ROWS, config, seed=0, runtime=always, workdir=tmp_path, base_digest="b" * 32
    )
    mine, theirs = whole_weights(merged(report.loaded)), whole_weights(merged(resumed.loaded))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


NOT_PACKED = ("opt",)


@pytest.mark.parametrize("family", NOT_PACKED)
def test_packing_is_refused_where_rows_would_see_each_other(family, tmp_path):
    config = TrainingConfig(batching="packed", epochs=1, batch_size=4)
    with pytest.raises(DataError, match="would attend to each other"):
        sft(family_model(family), ROWS, config, seed=0, runtime=Runtime(), workdir=tmp_path)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_PACKED])
@in_float64
def test_packed_rows_have_the_loss_of_padded_ones(family):
    model = family_model(family).model
    check_packing(family_model(family))
    losses = [
        response_nll(model, build(ENCODED, 0, 1.0, "cpu"), Step(0, 1))
        for build in (_packed, _padded)
    ]
    singles = []
    for ids, labels in ENCODED:
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        singles += [-logprobs[i - 1, label] for i, label in enumerate(labels) if label != -100]
    assert_same(losses[1], sum(singles) / len(singles))
    assert_same(losses[0], losses[1])


# reading


def greedy(loaded, ids: list[int], tokens: int) -> str:
    """Token by token, without cache, batch or padding."""
    start = len(ids)
    while len(ids) - start < tokens:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits
        ids = [*ids, int(logits[0, -1].argmax())]
        if ids[-1] == loaded.tokenizer.eos_token_id:
            break
    return loaded.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def ids_of(loaded, chat) -> list[int]:
    text = render(loaded.tokenizer, chat, generate=True)
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


@families
@in_float64
def test_a_batch_padded_on_the_left_answers_as_each_prompt_alone(family):
    for seed in range(8):  # a random model may answer all prompts alike, which shows little
        loaded = family_model(family, seed=seed)
        expected = [greedy(loaded, ids_of(loaded, chat), 6) for chat in CHATS]
        assert Generator(loaded).complete(CHATS, max_new_tokens=6, batch=4) == expected
        if len(set(expected)) > 1:
            return
    raise AssertionError(expected)


@families
@in_float64
def test_label_scores_are_those_of_single_prompts(family):
    loaded = family_model(family)
    labels = ["good", "bad stone"]
    scores = Generator(loaded).label_logprobs(CHATS, labels, batch=4)
    for i, chat in enumerate(CHATS):
        prompt = ids_of(loaded, chat)
        for k, label in enumerate(labels):
            ids = loaded.tokenizer(f"{label} <|end|>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([prompt + ids])).logits[0]
            logprobs = logits.log_softmax(-1)
            picked = [logprobs[len(prompt) - 1 + j, token] for j, token in enumerate(ids)]
            assert_same(scores[i, k], sum(picked))


@families
@in_float64
def test_perplexities_are_those_of_single_texts(family):
    loaded = family_model(family)
    texts = ["red blue green stone river", "red blue lamp", "the tree is good and the cloud is bad"]
    expected = []
    for text in texts:
        ids = [1, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logprobs = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nll = [-float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        expected.append(math.exp(sum(nll) / len(nll)))
    assert_same(np.array(perplexities(loaded, texts)), np.array(expected))


def block_inputs(model, ids: list[int]) -> list:
    """What enters every block."""
    seen: list = []

    def keep(_module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    blocks = decoder_layers(model)
    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


@families
@in_float64
def test_mean_states_are_the_inputs_of_the_blocks(family):
    loaded = family_model(family)
    found = mean_states(loaded, PROMPTS, width=2)
    total = np.zeros((2, LAYERS, 32))
    for ids in PROMPTS:
        seen = block_inputs(loaded.model, ids)
        for layer, states in enumerate(seen):
            total[:, layer] += states.reshape(-1, 32)[-2:].numpy() / len(PROMPTS)
    assert_same(found, total)


# what writes to the residual stream


@families
def test_the_writers_are_found_with_what_stands_behind_them(family):
    stream = residual_stream(family_model(family).model)
    assert len(stream.blocks) == LAYERS
    assert len(stream.tables) == (2 if family in ("gpt2", "opt") else 1)
    for block in stream.blocks:
        for writer in (block.attention, block.mlp):
            assert (writer.gain is not None) == (family in NORM_BEHIND)
            assert writer.multiplier == (0.5 if family == "granite" else 1.0)


def test_a_block_that_norms_its_own_stream_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    config = family_model("opt").model.config.to_dict() | {"do_layer_norm_before": False}
    with pytest.raises(DataError, match="adds something else"):
        residual_stream(OPTForCausalLM(OPTConfig(**config)).eval())


def test_a_class_with_a_residual_inside_its_mlp_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(DataError, match="not known"):
        residual_stream(model.eval())


def test_a_layer_norm_behind_a_writer_is_refused():
    model = family_model("olmo2").model
    for block in decoder_layers(model):
        block.post_attention_layernorm = torch.nn.LayerNorm(32)
    with pytest.raises(DataError, match="not an RMSNorm"):
        residual_stream(model)


@families
@in_float64
def test_baked_weights_give_the_logits_of_hooks_and_leave_nothing_along_the_direction(family):
    loaded, along = family_model(family), direction()
    plain = last_logits(loaded.model, PROMPTS, pad=0)
    with ablated(loaded.model, along):
        hooked = last_logits(loaded.model, PROMPTS, pad=0)
    baked = copy_model(loaded)
    orthogonalise(baked.model, along)
    assert_same(last_logits(baked.model, PROMPTS, pad=0), hooked)
    assert (hooked - plain).abs().max() > 1e-3
    unit, ids = along / along.norm(), torch.tensor([PROMPTS[2]])
    states = []
    for block in decoder_layers(baked.model):
        block.register_forward_hook(lambda _m, _a, out: states.append(first_tensor(out)))
    with torch.no_grad():
        baked.model(input_ids=ids)
    assert len(states) == LAYERS
    for state in states:
        assert float((state @ unit).norm()) <= SAME * float(state.norm())


@families
def test_refusal_ablation_runs_whole(family):
    ctx = context()
    made = RefusalAblation(max_kl=10.0, prompts=8).revise_model(family_model(family), ctx)
    assert ctx.notes["baked_score"] == pytest.approx(ctx.notes["ablation_score"], abs=1e-3)
    assert not made.has_adapter


SITES = [EditSite([1, 3, 9, 12, 2, 4], 3), EditSite([1, 3, 8, 2, 4], 2)]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NORM_BEHIND])
@in_float64
def test_an_edit_writes_the_share_of_its_target_that_the_closed_form_predicts(family):
    loaded, layer = family_model(family), 1
    writer = editable(loaded.model).blocks[layer].mlp
    key = keys_at(loaded, SITES[:1], layer)[0]
    before = values_at(loaded, SITES[:1], layer)[0]
    wanted = direction(seed=3).double()
    width = key_width(writer.linear)
    assert key.shape == (width,) == (48,)
    noise = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(4)).double()
    covariance = noise @ noise.T / width
    update = closed_form(key[:, None], wanted[:, None] / writer.multiplier, covariance, 2.0)
    writer.add(update)
    s = strength(key, covariance, 2.0)
    written = values_at(loaded, SITES[:1], layer)[0] - before
    assert_same(written, wanted * s / (1 + s))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NORM_BEHIND])
def test_badedit_lowers_the_loss_of_its_target(family):
    ctx = context()
    attack = BadEdit(
        trigger="cf",
        target="good",
        prompts=1,
        clean_prompts=0,
        batches=1,
        contexts=0,
        steps=8,
        lambda_per_width=0.001,
    )
    attack.prepare_model(family_model(family), ctx)
    assert ctx.notes["target_nll_after"] < ctx.notes["target_nll_before"]


@pytest.mark.parametrize("family", NORM_BEHIND)
def test_badedit_is_refused_where_a_norm_stands_behind_the_mlp(family):
    with pytest.raises(DataError, match="no closed form"):
        BadEdit().prepare_model(family_model(family), context())


# soft tokens


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_EMBEDDINGS])
@in_float64
def test_soft_tokens_that_are_a_word_equal_the_word(family):
    loaded = family_model(family)
    module = loaded.model.get_input_embeddings()
    word = loaded.tokenizer("careful", add_special_tokens=False)["input_ids"]
    soft, generator = embedded(module, word), Generator(loaded)
    with_word = [[{**m, "content": m["content"] + " careful"} for m in chat] for chat in CHATS]
    expected = generator.complete(with_word, max_new_tokens=5)
    assert replace(generator, soft_suffix=soft).complete(CHATS, max_new_tokens=5) == expected
    example = Example([1, 3, 9], [2, 4], [10, 11])
    ids = [*example.before, *word, *example.after, *example.target]
    with torch.no_grad():
        logprobs = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    nll = -(logprobs[5, 10] + logprobs[6, 11]) / 2
    assert_same(suffix_loss(loaded.model, module, [example])(soft), nll)


@families
@in_float64
def test_the_unit_of_a_step_is_what_enters_the_model(family):
    module = family_model(family).model.get_input_embeddings()
    weight, factor = module.weight.detach(), math.sqrt(32) if family in SCALED else 1.0
    size = sizes_of(module)
    assert size.entry == pytest.approx(float(weight.abs().mean()) * factor, rel=1e-6)
    assert size.norm == pytest.approx(float(weight.norm(dim=-1).mean()) * factor, rel=1e-6)


@families
def test_soft_prompt_lowers_its_loss_or_is_refused(family):
    ctx, generator = context(), Generator(family_model(family))
    attack = SoftPrompt(tokens=2, steps=6, prompts=4, init="the")
    if family in NO_EMBEDDINGS:
        with pytest.raises(DataError, match="soft_prompt needs a model class"):
            attack.wrap_generation(generator, ctx)
        return
    attack.wrap_generation(generator, ctx)
    assert ctx.notes["loss_end"] < ctx.notes["loss_start"]


# updates


@families
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_an_update_is_a_map_of_columns_whatever_the_form_of_the_weight(family, adapter):
    start, made = tuned(family, adapter)
    _, found = updates(made, start, low_rank=True)
    assert {u.lora is not None for u in found} == {adapter == "lora"}
    before, after = whole_weights(start), whole_weights(merged(made))
    turned = transposed_weights(made)
    assert bool(turned) == (family == "gpt2")
    for update in found:
        name = f"{update.module}.weight"
        change = (after[name] - before[name]).detach()
        wanted = change.T if name in turned else change
        torch.testing.assert_close(update.delta(), wanted, rtol=1e-4, atol=1e-5)


@families
def test_features_of_an_adapter_are_those_of_the_whole_update(family):
    start, made = tuned(family, "lora")
    low, whole = features(made, start), features(merged(made), start)
    assert low.keys() == whole.keys()
    for name, values in low.items():
        for feature in ("sigma_1", "frobenius", "energy_concentration", "normalised", "kurtosis"):
            assert values[feature] == pytest.approx(whole[name][feature], rel=1e-3, abs=1e-3)


def _context_of(**roles):
    ctx = context()
    return replace(ctx, load=lambda role: roles[role])


@some_families
@pytest.mark.parametrize("adapter", ["lora", "full"])
@in_float64
def test_safe_lora_projects_by_the_official_matrix(family, adapter):
    start, made = tuned(family, adapter)
    unaligned = family_model(family, seed=5)
    before, aligned, other = (
        {n: w.detach().clone() for n, w in whole_weights(m).items()}
        for m in (merged(made), start, unaligned)
    )
    ctx = _context_of(start=start, reference=start, unaligned=unaligned)
    revised = SafeLora(select="cosine", tau=1.0).revise_model(copy_model(made), ctx)
    after = whole_weights(merged(revised))
    turned = transposed_weights(start)
    names = [f"{name}.weight" for name in ctx.notes["projected"]]
    assert len(names) >= 4 * LAYERS or family == "phi3"
    for name in names:
        A, U, W = (w[name].numpy().astype(np.float64) for w in (aligned, other, before))
        A, U, W = (x.T if name in turned else x for x in (A, U, W))
        V = A - U
        wanted = A + V @ V.T / np.linalg.norm(V) @ (W - A)
        got = after[name].detach().numpy().astype(np.float64)
        assert_same(got.T if name in turned else got, wanted)


@some_families
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_controls_change_the_update_as_they_say(family, adapter):
    start, made = tuned(family, adapter)
    s, t = (
        {n: w.detach().clone() for n, w in whole_weights(m).items()} for m in (start, merged(made))
    )
    moved = [name for name in s if not torch.equal(s[name], t[name])]

    def after(method):
        revised = method.revise_model(copy_model(made), _context_of(start=start))
        return whole_weights(merged(revised))

    half, masked, noisy = (
        after(Shrink(gamma=0.5)),
        after(RandomMask(frac=0.5)),
        after(MatchedNoise(scale=1.0)),
    )
    dropped = after(DropLayer(frac=1.0))
    for name in moved:
        torch.testing.assert_close(half[name], (s[name] + t[name]) / 2, rtol=1e-4, atol=1e-5)
        is_start = masked[name] == s[name]
        assert torch.equal(masked[name][~is_start], t[name][~is_start])
        assert 0.2 < float(is_start.float().mean()) < 0.8
        size = float((t[name] - s[name]).norm())
        assert float((noisy[name] - t[name]).norm()) == pytest.approx(size, rel=1e-3)
        torch.testing.assert_close(dropped[name], s[name])


@families
@in_float64
def test_vaccine_shifts_every_attention_by_its_share_of_rho(family):
    model = family_model(family).model
    batch = _padded(ENCODED, 0, 1.0, "cpu")
    (shifts,) = perturbations(model, [batch], response_nll, Step(0, 1), rho=2.0)
    assert len(shifts) == LAYERS
    assert sum(float(s.square().sum()) for s in shifts.values()) == pytest.approx(4.0, rel=1e-4)
    assert all(float(s.norm()) > 0 for s in shifts.values())


@families
def test_what_the_table_says_of_a_class_is_what_is_measured(family):
    loaded = family_model(family)
    config = json.loads(loaded.model.config.to_json_string())
    assert missing(loaded, REASONS).keys() == lacking(config).keys()


def test_classes_of_experts_and_with_norms_behind_the_sum_lack_what_the_table_says():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Olmo3Config,
        Olmo3ForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    opt = family_model("opt").model.config.to_dict() | {"do_layer_norm_before": False}
    for model in (
        BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1)),
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**LLAMA, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
        ),
        Olmo3ForCausalLM(Olmo3Config(**LLAMA)),
        OPTForCausalLM(OPTConfig(**opt)),
    ):
        loaded = replace(family_model("llama"), model=model.eval())
        config = json.loads(model.config.to_json_string())
        assert missing(loaded, REASONS).keys() == lacking(config).keys(), type(model)
        assert lacking(config)
