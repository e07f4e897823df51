"""What generates: token ids in, token ids out, by settings of our own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.conversation import chat_of
from ftsec_ray.errors import StageError
from ftsec_ray.models.backends import (
    FELL_BACK,
    ContinuousBatching,
    Decoding,
    PaddedGenerate,
    until,
    unused_settings,
)
from ftsec_ray.models.batches import HALVED, Prompts, in_batches
from ftsec_ray.models.chat import render, spoken
from ftsec_ray.models.generator import Generator, in_words
from ftsec_ray.models.lora import attach_lora, lora_modules
from tests.fixtures_models import sentiment_rows, tiny_model
from tests.models.families import family_model
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
    assert ids == [greedy_ids(loaded, chat, 8, generator.stops()) for chat in CHATS]
    assert len({tuple(answer) for answer in ids}) > 1
    assert any(len(set(answer)) < len(answer) for answer in ids)  # a penalty would show
    assert generator.complete(CHATS, max_new_tokens=8) == [
        spoken(loaded.tokenizer, answer) for answer in ids
    ]
    assert loaded.model.generation_config.repetition_penalty == 5.0
    assert unused_settings(loaded.model) == dict(sorted(OF_THE_MODEL.items()))


def test_a_model_without_settings_of_its_own_leaves_none_unused():
    assert unused_settings(tiny_model().model) == {}


def test_an_answer_ends_before_its_first_stop():
    assert until([5, 6, 2, 7, 2], (2, 9)) == [5, 6]
    assert until([2, 5], (2,)) == []
    assert until([5, 6], (2,)) == [5, 6]


# continuous batching

SERVED = ("llama", "gemma3", "gpt2")
FURTHER = ("mistral", "qwen3", "gemma2", "gemma3_pictures", "granite")


@pytest.mark.parametrize(
    "family", [*SERVED, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)]
)
def test_continuous_batching_gives_the_tokens_of_padded_batches(family):
    loaded = family_model(family, seed=2)
    own = loaded.model.config._attn_implementation
    padded = Generator(loaded).complete_ids(CHATS, max_new_tokens=10, batch=5)
    generator = Generator(loaded, backend=ContinuousBatching())
    assert generator.complete_ids(CHATS, max_new_tokens=10, batch=5) == padded
    assert not generator.tally
    assert loaded.model.config._attn_implementation == own
    assert any(padded)


def test_a_class_that_continuous_batching_lacks_is_answered_by_padded_batches_and_counted():
    loaded = family_model("opt")
    generator = Generator(loaded, backend=ContinuousBatching())
    expected = Generator(loaded).complete_ids(CHATS, max_new_tokens=4)
    assert generator.complete_ids(CHATS, max_new_tokens=4) == expected
    assert [key.partition(": ")[0] for key in generator.tally] == [FELL_BACK]
    assert sum(generator.tally.values()) == len(CHATS)
    assert "12 prompts" in next(in_words(generator.tally))


def test_soft_tokens_are_answered_by_padded_batches_and_counted():
    loaded = family_model("llama")
    padded = replace(Generator(loaded), soft_suffix=torch.zeros(2, 32))
    generator = replace(padded, backend=ContinuousBatching(), tally=Counter())
    expected = padded.complete_ids(CHATS, max_new_tokens=3)
    assert generator.complete_ids(CHATS, max_new_tokens=3) == expected
    assert sum(generator.tally.values()) == len(CHATS)


def test_continuous_batching_draws_nothing():
    generator = Generator(family_model("llama"), backend=ContinuousBatching())
    with pytest.raises(
        StageError, match=r"(?s)continuous batching.*temperature 1\.0.*transformers"
    ):
        generator.complete_ids(CHATS, max_new_tokens=3, temperature=1.0, seeds=range(12))


# memory


class Tight:
    """Work that has room for so many items at once."""

    def __init__(self, room, error):
        self.room, self.error, self.calls = room, error, []

    def __call__(self, indices):
        self.calls.append(list(indices))
        if len(indices) > self.room:
            raise self.error


NO_ROOM = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    MemoryError(),
)


@pytest.mark.parametrize("error", NO_ROOM, ids=str)
def test_a_batch_without_room_is_halved_until_it_fits_and_nothing_is_left_out(error):
    work, tally = Tight(2, error), Counter()
    in_batches([5, 1, 4, 2, 3, 9, 8], 7, work, tally)
    done = [indices for indices in work.calls if len(indices) <= 2]
    assert list(chain.from_iterable(done)) == [1, 3, 4, 2, 0, 6, 5]
    assert tally == {HALVED: 2}
    assert [len(indices) for indices in work.calls] == [7, 4, 2, 2, 2, 1]


def test_other_errors_and_one_item_without_room_are_raised():
    for work in (Tight(0, NO_ROOM[0]), Tight(2, RuntimeError("shapes differ"))):
        tally = Counter()
        with pytest.raises(RuntimeError) as raised:
            in_batches([1, 2, 3], 3, work, tally)
        assert raised.value is work.error


def test_a_generator_halves_its_batches_and_says_so(monkeypatch):
    loaded = tiny_model(seed=3, tied=False)
    expected = Generator(loaded).complete_ids(CHATS, max_new_tokens=4)
    scores = Generator(loaded).label_logprobs(CHATS, ["good", "bad stone"])
    forward = loaded.model.forward

    def tight(*args, **kwargs):
        if kwargs["input_ids"].shape[0] > 3:
            raise NO_ROOM[1]
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", tight)
    generator = Generator(loaded)
    assert generator.complete_ids(CHATS, max_new_tokens=4) == expected
    assert generator.tally == {HALVED: 2}
    torch.testing.assert_close(generator.label_logprobs(CHATS, ["good", "bad stone"]), scores)
    # the pass over the prompts, and the one behind their cache
    assert generator.tally == {HALVED: 2 + 2 + 2}
    assert "6 times a batch" in next(in_words(generator.tally))


# drawing


def drawn(generator, chats, seeds, batch, temperature=0.8, tokens=5):
    """Token ids of answers that are drawn."""
    return generator.complete_ids(
        chats, max_new_tokens=tokens, batch=batch, temperature=temperature, seeds=seeds
    )


@pytest.mark.usefixtures("float64")
def test_a_draw_depends_on_its_seed_and_not_on_its_batch():
    generator = Generator(in_float64(tiny_model(seed=3, tied=False)))
    seeds = list(range(100, 112))
    together = drawn(generator, CHATS, seeds, 12)
    assert drawn(generator, CHATS, seeds, 5) == together
    assert drawn(generator, CHATS[::-1], seeds[::-1], 4)[::-1] == together
    assert drawn(generator, CHATS, [seed + 1 for seed in seeds], 12) != together
    assert together != generator.complete_ids(CHATS, max_new_tokens=5)


def test_draws_have_the_distribution_of_the_model_at_the_temperature():
    loaded, count, temperature = tiny_model(seed=3, tied=False), 4000, 0.7
    ids = [1, 3, 9, 12, 2, 4]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    wanted = (logits / temperature).softmax(-1)
    decoding = Decoding(
        max_new_tokens=1, stops=(), batch=2000, temperature=temperature, seeds=range(count)
    )
    prompts = Prompts([(ids, [])] * count)
    answers = PaddedGenerate().complete(loaded, prompts, decoding, Counter())
    seen = torch.bincount(torch.tensor(answers).flatten(), minlength=len(wanted)).double()
    expected = wanted * count
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    free = len(wanted) - 1
    assert chi_square < free + 5 * (2 * free) ** 0.5  # mean and spread of chi-square
    assert int(seen.sum()) == count
