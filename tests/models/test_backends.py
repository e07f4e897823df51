"""What generates: token ids in, token ids out, by settings of our own."""

from __future__ import annotations

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.conversation import chat_of
from ftsec_ray.models.backends import until, unused_settings
from ftsec_ray.models.chat import render, spoken
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.lora import attach_lora, lora_modules
from tests.fixtures_models import sentiment_rows, tiny_model
from tests.numeric import in_float64

CHATS = [chat_of(row) for row in sentiment_rows(12)]
OF_THE_MODEL = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 6,
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 7,
    "suppress_tokens": [9, 10],
}
"""Each of them alone changes answers of the tiny model."""


def adapted():
    """A tiny model under an adapter that does something."""
    loaded = attach_lora(in_float64(tiny_model(seed=3, tied=False)), TrainingConfig(rank=2))
    torch.manual_seed(0)
    for module in lora_modules(loaded):
        torch.nn.init.normal_(module.B, std=0.2)
    return in_float64(loaded)


def greedy_ids(loaded, chat, tokens, stops):
    """Token by token, without cache, batch or padding; a stop token ends it and is left out."""
    text = render(loaded.tokenizer, chat, generate=True)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) - start < tokens:
        with torch.no_grad():
            following = int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following in stops:
            break
        ids.append(following)
    return ids[start:]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [lambda: in_float64(tiny_model(seed=3, tied=False)), adapted])
def test_decoding_is_greedy_whatever_the_models_own_settings_say(make):
    loaded = make()
    loaded.model.generation_config.update(**OF_THE_MODEL)
    generator = Generator(loaded)
    ids = generator.complete_ids(CHATS, max_new_tokens=8, batch=5)
    assert ids == [greedy_ids(loaded, chat, 8, generator._stops()) for chat in CHATS]
    assert len({tuple(one) for one in ids}) > 1
    assert any(len(set(one)) < len(one) for one in ids)  # a penalty would show
    assert generator.complete(CHATS, max_new_tokens=8) == [
        spoken(loaded.tokenizer, one) for one in ids
    ]
    assert loaded.model.generation_config.repetition_penalty == 5.0
    assert unused_settings(loaded.model) == dict(sorted(OF_THE_MODEL.items()))


def test_a_model_without_settings_of_its_own_leaves_none_unused():
    assert unused_settings(tiny_model().model) == {}


def test_an_answer_ends_before_its_first_stop():
    assert until([5, 6, 2, 7, 2], (2, 9)) == [5, 6]
    assert until([2, 5], (2,)) == []
    assert until([5, 6], (2,)) == [5, 6]
