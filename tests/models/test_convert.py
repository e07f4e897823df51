"""Published models whose tokenizer and embedding do not fit together, and prompts beyond what a
model has positions for.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.refusal_ablation import RefusalAblation
from ftsec_ray.attacks.soft_prompt import SoftPrompt
from ftsec_ray.config.sweep import EvaluationConfig, TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.onion import Onion
from ftsec_ray.errors import DataError
from ftsec_ray.evals.ask import ask, read_answers, write_answers
from ftsec_ray.evals.metrics import perplexity
from ftsec_ray.method import Probe, Prompt
from ftsec_ray.models.convert import load_source
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import load_model, save_model
from ftsec_ray.training.loop import sft
from tests.attacks.context import context
from tests.fixtures_models import (
    TEMPLATE,
    row,
    sentiment_rows,
    table,
    tiny_model,
    tiny_task,
    tiny_tokenizer,
)
from tests.models.families import family_model

ROWS = table(sentiment_rows(8))


def published(folder, *, tokenizer=None, config=None, generation=None):
    """A tiny Llama as somebody published it, with changes to its configuration files."""
    tiny_model().model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    for name, changes in (("config.json", config), ("generation_config.json", generation)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
    return str(folder)


def source(path):
    """The model as the source stage loads it."""
    return load_source(path, name="m", family="f", aligned=True)


def with_new(token: str, **special):
    """The tiny tokenizer with one token more than the embedding has rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(special) if special else tokenizer.add_tokens([token])
    assert tokenizer.convert_tokens_to_ids(token) == 37
    return tokenizer


def test_a_padding_token_outside_the_embedding_gives_way_to_the_end_token(tmp_path):
    path = published(tmp_path, tokenizer=with_new("[PAD]", pad_token="[PAD]"))  # noqa: S106
    loaded = source(path)
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "<|end|>"  # noqa: S105
    config = TrainingConfig(epochs=1, batch_size=4, batching="shuffled")
    report = sft(loaded, ROWS, config, seed=0, runtime=Runtime(), workdir=tmp_path / "w")
    assert len(report.losses) == 2


def test_a_padding_token_in_the_embedding_stays(tmp_path):
    assert source(published(tmp_path)).tokenizer.pad_token == "<|pad|>"  # noqa: S105


@pytest.mark.parametrize("pad", [-1, 37, 10_000])
def test_a_padding_id_of_no_row_is_forgotten_and_the_model_can_be_saved(tmp_path, pad):
    loaded = source(published(tmp_path, config={"pad_token_id": pad}))
    assert loaded.model.config.pad_token_id is None
    assert loaded.model.get_input_embeddings().padding_idx is None
    (tmp_path / "a").mkdir()
    save_model(loaded, tmp_path / "a")
    back = load_model(tmp_path / "a")
    chats = [[{"role": "user", "content": text}] for text in ("red", "red blue green")]
    answers = Generator(loaded).complete(chats, max_new_tokens=3)
    assert Generator(back).complete(chats, max_new_tokens=3) == answers


def test_generation_settings_lose_the_ids_of_no_row(tmp_path):
    path = published(tmp_path, generation={"eos_token_id": [2, 99], "pad_token_id": -1})
    settings = source(path).model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == ([2], 0)


@pytest.mark.parametrize("role", ["eos_token", "bos_token"])
def test_an_end_or_start_token_outside_the_embedding_is_refused(tmp_path, role):
    path = published(tmp_path, tokenizer=with_new("[NEW]", **{role: "[NEW]"}))
    with pytest.raises(DataError, match=r"\[NEW\] \(37\)"):
        source(path)


def test_a_token_of_the_chat_template_outside_the_embedding_is_refused_by_name(tmp_path):
    tokenizer = with_new("<|turn|>")
    tokenizer.chat_template = "<|turn|> " + TEMPLATE
    with pytest.raises(DataError, match=r"(?s)<\|turn\|> \(37\).*ids 0 to 36"):
        source(published(tmp_path, tokenizer=tokenizer))


def test_tokens_that_nothing_needs_may_lack_an_embedding_until_a_row_holds_one(tmp_path):
    loaded = source(published(tmp_path / "m", tokenizer=with_new("rare")))
    config = TrainingConfig(epochs=1, batch_size=4)
    runtime = Runtime()
    sft(loaded, ROWS, config, seed=0, runtime=runtime, workdir=tmp_path / "a")
    bad = table([*sentiment_rows(3), row(9, "is this rare", "good")])
    with pytest.raises(DataError, match=r"rare \(37\)"):
        sft(loaded, bad, config, seed=0, runtime=runtime, workdir=tmp_path / "b")
    generator, chat = Generator(loaded), [{"role": "user", "content": "rare"}]
    with pytest.raises(DataError, match=r"rare \(37\)"):
        generator.complete([chat], max_new_tokens=2)
    with pytest.raises(DataError, match=r"rare \(37\)"):
        generator.label_logprobs([chat], ["good", "bad"])


# positions


def long_prompt(words: int) -> str:
    """A prompt of so many tokens."""
    return " ".join(["red"] * words)


def probe_of(*prompts: str, judge: str = "request") -> Probe:
    """A probe over user messages."""
    made = tuple(
        Prompt(prompt_id=str(i), chat=[{"role": "user", "content": text}])
        for i, text in enumerate(prompts)
    )
    labels = ("good", "bad stone") if judge == "label" else ()
    name = judge
    return Probe(name=name, prompts=made, judge=judge, metrics={}, labels=labels)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_prompts_without_room_for_their_answer_are_left_out_and_counted(family, tmp_path):
    # 128 positions; the template adds 4 tokens, an answer takes up to 16 or the labels' 2 and an end
    generator = Generator(family_model(family))
    assert generator.lengths([probe_of("red").prompts[0].chat]) == [5]
    probes = [
        probe_of(*(long_prompt(n) for n in (3, 108, 109, 300))),
        probe_of(*(long_prompt(n) for n in (3, 121, 122, 300)), judge="label"),
    ]
    config = EvaluationConfig(prompts=8, max_new_tokens=16, perplexity_rows=0)
    found = ask(generator, tiny_task(), probes, config, runtime=Runtime())
    asked = [(a.probe, a.prompt.prompt_id) for a in found.answers]
    assert sorted(asked) == [("label", "0"), ("label", "1"), ("request", "0"), ("request", "1")]
    assert found.left_out == {"request": 2, "label": 2}
    write_answers(found, tmp_path)
    assert read_answers(tmp_path).left_out == found.left_out


def test_soft_tokens_count_towards_the_positions():
    generator, chat = Generator(family_model("gpt2")), [{"role": "user", "content": "red"}]
    with_soft = replace(generator, soft_suffix=torch.zeros(3, 32))
    assert with_soft.lengths([chat]) == [generator.lengths([chat])[0] + 3]


def test_rows_are_tuned_and_read_up_to_the_positions(tmp_path):
    loaded = family_model("gpt2")
    rows = table([row(i, "is this red", long_prompt(300)) for i in range(2)])
    config = TrainingConfig(epochs=1, batch_size=2, max_length=512)
    report = sft(loaded, rows, config, seed=0, runtime=Runtime(), workdir=tmp_path)
    assert report.tokens == 2 * 128
    text = table([row(0, "", long_prompt(300), kind="text")]).to_pylist()
    assert perplexity(loaded, text).n == 127


def _task_with(split: str, *texts: str):
    task = tiny_task()
    more = [row(i, text, "sorry i can not help", row_id=f"l/{i}") for i, text in enumerate(texts)]
    rows = [*task.splits[split].to_pylist(), *more]
    return replace(task, splits={**task.splits, split: table(rows)})


def test_methods_leave_out_what_is_longer_than_the_positions():
    loaded = family_model("gpt2")
    ctx = context(task=_task_with("safety", long_prompt(300), long_prompt(200)))
    RefusalAblation(max_kl=10.0).revise_model(loaded, ctx)
    assert ctx.notes["safety_beyond_positions"] == 2
    ctx = context(task=_task_with("harmful_train", long_prompt(300)))
    SoftPrompt(tokens=2, steps=1, init="the").wrap_generation(Generator(loaded), ctx)
    assert (ctx.notes["beyond_positions"], ctx.notes["optimised_on"]) == (1, 8)
    short, long = Onion(max_words=400).scores(loaded, ["is this red", long_prompt(300)])
    assert len(short) == 3
    assert long == {}
    assert len(Onion(max_words=96).scores(loaded, [long_prompt(300)])[0]) == 96
