"""Label scores behind a cache: those of single whole passes in float64, for every family, with no
pass more than is needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import LoadedModel, ModelInfo
from ftsec_ray.models import label_scores as module
from ftsec_ray.models import logits
from ftsec_ray.models.batches import Prompts
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.label_scores import WHOLE_PASSES, label_scores
from ftsec_ray.models.lora import attach_lora, lora_modules
from tests.fixtures_models import tiny_tokenizer
from tests.models.families import FAMILIES, IDS, VOCABULARY, family_model
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
families = pytest.mark.parametrize("family", FAMILIES)
PIECES = [
    ([1, 3, 9, 12, 2, 4], []),
    ([1, 3, 8], [2, 4]),
    ([1, 3, 10, 11, 7, 9, 14, 15, 16, 17, 18, 19, 20, 21], [2, 4, 5]),  # beyond a window of 8
    ([6], []),
]
WORDS = [
    [[10, 2], [10, 11, 2], [12], [10, 11, 12, 13], [14, 2], [10, 11]],
    [[9, 2], [12, 11, 2], [12], [12, 11, 12, 13], [14, 2], [7]],
    [[10, 2], [11, 2], [12, 2], [13, 2], [14, 2], [14, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 2]],
    [[10], [11], [12], [13], [14], [14]],
]
"""Other tokens for the same label behind other prompts; prefixes that are shared, a label that is
the beginning of another, one twice, and one beyond the window.
"""


def single(loaded, head, tail, soft, answer):
    """The sum of one answer, from one whole pass without padding or cache."""
    table = loaded.model.get_input_embeddings()
    parts = [table(torch.tensor([part], dtype=torch.long)) for part in (head, [*tail, *answer])]
    between = torch.zeros(1, 0, parts[0].shape[-1]) if soft is None else soft[None]
    with torch.no_grad():
        said = loaded.model(inputs_embeds=torch.cat([parts[0], between, parts[1]], dim=1)).logits
    logprobs = said[0].double().log_softmax(-1)
    before = logprobs.shape[0] - len(answer) - 1
    return sum(float(logprobs[before + i, token]) for i, token in enumerate(answer))


def expected(loaded, soft=None, words=WORDS):
    """The scores by `single`."""
    return torch.tensor(
        [
            [single(loaded, head, tail, soft, ids) for ids in row]
            for (head, tail), row in zip(PIECES, words, strict=True)
        ]
    )


def scored(loaded, soft=None, words=WORDS, batch=3):
    """The scores of the module, and what it counted."""
    tally = Counter()
    return label_scores(loaded, Prompts(PIECES, soft), words, batch=batch, tally=tally), tally


@families
@pytest.mark.parametrize("with_soft", [False, True])
def test_scores_are_those_of_single_whole_passes(family, with_soft):
    loaded = family_model(family)
    soft = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) if with_soft else None
    scores, tally = scored(loaded, soft)
    assert_same(scores, expected(loaded, soft))
    assert not tally


@families
def test_whole_passes_give_the_same(family, monkeypatch):
    monkeypatch.setattr(module, "can_be_continued", lambda _cache: False)
    loaded = family_model(family)
    scores, tally = scored(loaded)
    assert_same(scores, expected(loaded))
    assert tally == {WHOLE_PASSES: 2}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logits_in_slices_give_the_same(family, monkeypatch):
    loaded = family_model(family)
    monkeypatch.setattr(logits, "LOGITS_AT_A_TIME", 3 * VOCABULARY)
    assert_same(scored(loaded)[0], expected(loaded))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_pictures"])
def test_an_adapter_takes_part(family):
    plain = scored(family_model(family))[0]
    loaded = attach_lora(family_model(family), TrainingConfig(rank=2))
    torch.manual_seed(0)
    for part in lora_modules(loaded):
        torch.nn.init.normal_(part.B, std=0.3)
    loaded = in_float64(loaded)
    scores, tally = scored(loaded)
    assert_same(scores, expected(loaded))
    assert float((scores - plain).abs().max()) > 1e-3
    assert not tally


def stateful():
    """A class whose cache is a running state."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.2,
        **IDS,
    )
    info = ModelInfo(name="lfm2", family="tiny", parameters=1, aligned=True)
    return LoadedModel(Lfm2ForCausalLM(config).eval(), tiny_tokenizer(), info)


def test_a_running_state_is_not_continued_and_counted():
    loaded = stateful()
    scores, tally = scored(loaded)
    assert_same(scores, expected(loaded))
    assert tally == {WHOLE_PASSES: 2}


def test_no_scores_of_no_prompts():
    assert (
        label_scores(family_model("llama"), Prompts([]), [], batch=4, tally=Counter()).shape[0] == 0
    )


@pytest.mark.parametrize("labels", [["good", "bad"], ["good stone", "bad stone", "bad lamp"]])
def test_each_prompt_goes_through_once_and_each_beginning_of_a_label_once(labels):
    loaded = family_model("llama")
    seen, heads = [], []
    loaded.model.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    loaded.model.lm_head.register_forward_hook(
        lambda _m, _a, out: heads.append(out.shape[0] * out.shape[1])
    )
    chats = [[{"role": "user", "content": f"red {word}"}] for word in ("blue", "lamp", "stone")]
    generator = Generator(loaded)
    length = max(generator.lengths(chats))
    generator.label_logprobs(chats, labels, batch=8)
    beginnings = {label.rpartition(" ")[0] for label in labels} - {""}
    further = [(3 * len(beginnings), 1)] if beginnings else []
    assert seen == [(3, length), *further]
    assert heads == [3, *(rows for rows, _ in further)]


def test_soft_tokens_of_a_generator_are_behind_the_prompt():
    loaded = family_model("llama")
    soft = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    chats = [[{"role": "user", "content": f"red {word}"}] for word in ("blue", "lamp stone")]
    generator = replace(Generator(loaded), soft_suffix=soft)
    scores = generator.label_logprobs(chats, ["good stone", "bad lamp"])
    for row, (head, tail) in enumerate(generator.pieces_of(chats)):
        for column, label in enumerate(["good stone", "bad lamp"]):
            ids = loaded.tokenizer(label, add_special_tokens=False)["input_ids"]
            assert_same(scores[row, column], single(loaded, head, tail, soft, ids))
