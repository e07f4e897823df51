from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.conversation import answer_of, chat_of
from ftsec_ray.models.chat import render
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import load_model, merged, save_model
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.row_tokens import encode_row
from tests.fixtures_models import sentiment_rows, tiny_model
from tests.numeric import assert_same, float64, in_float64


@pytest.fixture(scope="module")
def generator():
    return Generator(in_float64(tiny_model(seed=3, tied=False)))


@pytest.fixture(scope="module")
def chats():
    return [chat_of(row) for row in sentiment_rows(12)]


def greedy(loaded, chat, tokens):
    """Token by token, without cache, batch or padding."""
    ids = loaded.tokenizer(render(loaded.tokenizer, chat, generate=True), add_special_tokens=False)[
        "input_ids"
    ]
    start = len(ids)
    while len(ids) - start < tokens:
        with torch.no_grad():
            following = int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(following)
        if following == loaded.tokenizer.eos_token_id:
            break
    return loaded.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.usefixtures("float64")
def test_batched_completions_equal_a_loop_without_padding(generator, chats):
    expected = [greedy(generator.loaded, chat, 8) for chat in chats]
    assert generator.complete(chats, max_new_tokens=8, batch=5) == expected
    assert len(set(expected)) > 1


@pytest.mark.usefixtures("float64")
def test_label_scores_equal_a_slow_loop(generator, chats):
    loaded = generator.loaded
    labels = ["good", "bad stone"]
    scores = generator.label_logprobs(chats, labels, batch=5)
    for i, chat in enumerate(chats):
        prompt = loaded.tokenizer(
            render(loaded.tokenizer, chat, generate=True), add_special_tokens=False
        )["input_ids"]
        for k, label in enumerate(labels):
            # the labels are not of one length: each is followed by the end of the turn
            ids = loaded.tokenizer(f"{label} <|end|>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = (
                    loaded.model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
                )
            picked = [logprobs[len(prompt) - 1 + j, token] for j, token in enumerate(ids)]
            assert_same(scores[i, k], sum(picked))


@pytest.mark.usefixtures("float64")
def test_single_token_labels_score_as_the_general_path(generator, chats):
    single = generator.label_logprobs(chats, ["good", "bad"])
    alone = generator.label_logprobs(chats, ["good"])
    pairs = generator.label_logprobs(chats, ["good stone", "bad stone"])
    assert_same(single[:, :1], alone)
    ends = generator.label_logprobs(chats, ["good", "bad", "bad stone"])
    assert bool((ends[:, :2] < single).all())
    assert bool((pairs < single).all())


@pytest.mark.usefixtures("float64")
def test_soft_tokens_that_are_a_word_equal_the_word(generator, chats):
    loaded = generator.loaded
    word = loaded.tokenizer("careful", add_special_tokens=False)["input_ids"]
    soft = loaded.model.get_input_embeddings().weight[word].detach()
    with_word = [[{**m, "content": m["content"] + " careful"} for m in chat] for chat in chats]
    assert replace(generator, soft_suffix=soft).complete(
        chats, max_new_tokens=6
    ) == generator.complete(with_word, max_new_tokens=6)


def test_the_last_rewrite_added_sees_the_users_chat_first(generator):
    def adding(word):
        return lambda chat: [{**m, "content": m["content"] + " " + word} for m in chat]

    both = replace(generator, rewrites=(adding("attack"), adding("defense")))
    assert both.rewritten([{"role": "user", "content": "x"}])[0]["content"] == "x defense attack"


def test_loss_falls_on_the_answer_and_its_end_only():
    loaded = tiny_model()
    ids, labels = encode_row(loaded.tokenizer, sentiment_rows(1)[0], max_length=64)
    kept = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert loaded.tokenizer.decode(kept).split() == [answer_of(sentiment_rows(1)[0]), "<|end|>"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_comes_back_from_disk_as_it_was(tmp_path, chats, whole):
    base = tiny_model()
    loaded = replace(base, model=tiny_model().model)
    torch.manual_seed(0)
    loaded = attach_lora(loaded, TrainingConfig(), base_digest="b" * 32)
    for module in lora_modules(loaded):
        torch.nn.init.normal_(module.B, std=0.5)
    if whole:
        loaded = merged(loaded)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_model(loaded, tmp_path / "a")
    back = load_model(tmp_path / "a", base=base)
    assert back.base_digest == loaded.base_digest
    save_model(back, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    with float64():
        scores, expected = (
            Generator(in_float64(one)).label_logprobs(chats, ["good", "bad"])
            for one in (back, loaded)
        )
    assert_same(scores, expected)


@pytest.mark.usefixtures("float64")
def test_merging_folds_in_the_sum_of_the_updates():
    loaded = attach_lora(tiny_model(), TrainingConfig(rank=4, alpha=8))
    torch.manual_seed(0)
    for module in lora_modules(loaded):
        torch.nn.init.normal_(module.B)
    modules = {m.name: (m.base_weight.detach().clone(), m.delta()) for m in lora_modules(loaded)}
    whole = dict(merged(loaded).model.named_modules())
    assert len(modules) == 14
    for name, (weight, delta) in modules.items():
        assert_same(whole[name].weight, weight + delta)
