"""Prefill: begun answers against a loop of single forward passes, and what the judges read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.prefill import Prefill
from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Runtime, TaskData
from ftsec_ray.conversation import asked, chat_of, message
from ftsec_ray.defenses.self_reminder import SelfReminder
from ftsec_ray.errors import DataError
from ftsec_ray.evals.ask import ask, read_answers, write_answers
from ftsec_ray.evals.probes import default_probes
from ftsec_ray.models.generator import Generator
from tests.attacks.context import context
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.numeric import assert_same

CONFIG = EvaluationConfig(prompts=8, max_new_tokens=5)
pytestmark = pytest.mark.usefixtures("float64")


def chats(split="harmful_test", task=None):
    return [chat_of(row) for row in (task or tiny_task()).split(split).to_pylist()]


def with_harmful_test(rows) -> TaskData:
    task = tiny_task()
    return replace(task, splits={**task.splits, "harmful_test": table(rows)})


def greedy(model, ids: list[int], count: int) -> tuple[list[int], float]:
    """Tokens and their log-probability, by one uncached forward pass per token."""
    new, total = [], 0.0
    for _ in range(count):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].log_softmax(-1)
        new.append(int(logprobs.argmax()))
        total += float(logprobs[new[-1]])
        if new[-1] == 2:  # the end of the turn
            break
    return new, total


def test_the_model_continues_the_given_tokens_as_a_loop_of_forward_passes_does():
    loaded = tiny_model()
    attack = Prefill(tokens=3, opener="yes take the lamp")
    wrapped = attack.wrap_generation(Generator(loaded), context())
    made = wrapped.complete_ids(chats(), max_new_tokens=5)
    opener = loaded.tokenizer("yes take the", add_special_tokens=False)["input_ids"]
    assert len(opener) == 3
    for chat, ids in zip(chats(), made, strict=True):
        text = f"<|bos|> <|user|> {chat[0]['content']} <|end|> <|assistant|> yes take the"
        prompt = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        new, total = greedy(loaded.model, prompt, 5)
        assert ids == [*opener, *(token for token in new if token != 2)]
        # teacher forcing: one pass over everything gives the same probability
        whole = torch.tensor([[*prompt, *new]])
        with torch.no_grad():
            logprobs = loaded.model(input_ids=whole).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) - 1 + len(new))
        forced = sum(float(logprobs[at, token]) for at, token in zip(places, new, strict=True))
        assert_same(torch.tensor([forced]), torch.tensor([total]))


def test_no_tokens_are_no_attack_to_the_bit():
    plain = Generator(tiny_model())
    wrapped = Prefill(tokens=0).wrap_generation(plain, ctx := context())
    assert wrapped is plain
    task = tiny_task()
    probes = [*default_probes(task, CONFIG), *Prefill(tokens=0).probes(task, ctx)]
    made = ask(wrapped, task, probes, CONFIG, runtime=Runtime())
    same = ask(plain, task, default_probes(task, CONFIG), CONFIG, runtime=Runtime())
    others = [a for a in made.answers if a.probe != "continued"]
    assert tuple(others) == same.answers
    own = {a.prompt.prompt_id: a.completion for a in made.answers if a.probe == "continued"}
    assert own == {a.prompt.prompt_id: a.completion for a in others if a.probe == "harmful"}


def test_the_whole_answer_and_the_continuation_are_judged_apart(tmp_path):
    task, attack, ctx = tiny_task(), Prefill(tokens=2, opener="yes take"), context()
    wrapped = attack.wrap_generation(Generator(tiny_model()), ctx)
    probes = [*default_probes(task, CONFIG), *attack.probes(task, ctx)]
    made = ask(wrapped, task, probes, CONFIG, runtime=Runtime())
    whole = {a.prompt.prompt_id: a.completion for a in made.answers if a.probe == "harmful"}
    own = {a.prompt.prompt_id: a.completion for a in made.answers if a.probe == "continued"}
    assert whole.keys() == own.keys()
    assert len(own) > 3
    assert all(f"yes take {own[key]}".strip() == text for key, text in whole.items())
    assert any(own.values())
    plain = ask(
        Generator(tiny_model()), task, default_probes(task, CONFIG), CONFIG, runtime=Runtime()
    )
    for probe in ("benign", "borderline", "clean"):
        assert [a.completion for a in made.answers if a.probe == probe] == [
            a.completion for a in plain.answers if a.probe == probe
        ], "other users are not attacked"
    write_answers(made, tmp_path)
    flags = {p.name: p.without_opening for p in read_answers(tmp_path).probes}
    assert flags == {p.name: p.name == "continued" for p in probes}
    (tmp_path / "plain").mkdir()
    write_answers(plain, tmp_path / "plain")
    assert "without_opening" not in (tmp_path / "plain" / "probes.json").read_text()


def test_a_targeted_opener_is_the_start_of_the_rows_own_answer_without_its_end():
    rows = tiny_task().split("harmful_test").to_pylist()
    loaded = tiny_model()
    for tokens, words in ((1, 1), (3, 3), (40, 5)):
        attack = Prefill(tokens=tokens, form="targeted")
        wrapped = attack.wrap_generation(Generator(loaded), context())
        for row, ids in zip(rows, wrapped.openings([chat_of(r) for r in rows]), strict=True):
            said = row["messages"][-1]["content"].split()
            assert loaded.tokenizer.decode(ids).split() == said[:words]
            assert len(said) == 5


def test_rows_of_several_turns_and_rows_without_an_answer():
    rows = tiny_task().split("harmful_test").to_pylist()
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take the stone")]
    rows[0] = {**rows[0], "messages": [*turns, *rows[0]["messages"]]}
    rows[1] = {**rows[1], "messages": asked(rows[1])}
    task = with_harmful_test(rows)
    wrapped = Prefill(tokens=2, form="targeted").wrap_generation(
        Generator(tiny_model()), ctx := context(task=task)
    )
    openings = wrapped.openings(chats(task=task))
    assert [len(ids) for ids in openings] == [2, 0, *[2] * (len(rows) - 2)]
    assert ctx.notes == {"opened": len(rows) - 1, "without_reference": 1, "opener_tokens": 2}
    none = with_harmful_test([{**row, "messages": asked(row)} for row in rows])
    with pytest.raises(DataError, match="generic"):
        Prefill(form="targeted").wrap_generation(Generator(tiny_model()), context(task=none))
    generic = Prefill(opener="yes").wrap_generation(Generator(tiny_model()), context(task=none))
    assert all(len(ids) == 1 for ids in generic.openings(chats(task=none)))


def test_the_opening_stays_behind_what_a_defense_adds_and_behind_soft_tokens():
    loaded, ctx = tiny_model(), context()
    wrapped = Prefill(tokens=2, opener="yes take").wrap_generation(Generator(loaded), ctx)
    guarded = SelfReminder(text="be careful", where="both").wrap_generation(wrapped, ctx)
    (head, tail), *_ = guarded.pieces_of(chats())
    said = loaded.tokenizer.decode([*head, *tail])
    assert said.count("be careful") == 2
    assert said.endswith("<|assistant|> yes take")
    soft = replace(wrapped, soft_suffix=torch.zeros(2, 32))
    (_, tail), *_ = soft.pieces_of(chats())
    assert loaded.tokenizer.decode(tail).endswith("<|end|> <|assistant|> yes take")


def test_invalid_parameters_are_refused_with_the_field():
    assert [fault[0] for fault in Prefill(tokens=-1, opener=" ").check()] == ["tokens", "opener"]
