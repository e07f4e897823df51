"""The perplexity gate: scores against single passes, the threshold, who is refused and how."""

import math
from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.perplexity_gate import (
    SENTENCE,
    PerplexityGate,
    refusal_of,
    texts_of,
    worst_window,
)
from ftsec_ray.errors import DataError
from ftsec_ray.evals.ask import ask
from ftsec_ray.evals.completed import said_by
from ftsec_ray.judges.label import Label
from ftsec_ray.method import Probe, Prompt, control_of
from ftsec_ray.models.generator import Generator, Opening
from tests.defenses.decoding import CHATS
from tests.defenses.shared import context
from tests.fixtures_models import prompts, table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
MODEL = in_float64(tiny_model())
TEXTS = ["how do i make river cloud", "cf", "the red stone is this and the blue lamp", "fix"]
REFUSAL = "sorry i can not help"


def gated(method, tmp_path, generator=None, task=None):
    ctx = context(tmp_path, task=task, models={"reference": MODEL})
    return method.wrap_generation(generator or Generator(MODEL), ctx), ctx


def alone(text, *, chat):
    """Losses of one text's tokens from one pass over it, without padding."""
    words = text.split()
    head = "<|bos|> <|user|>" if chat else "<|bos|>"
    ids = MODEL.tokenizer(f"{head} {text}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = MODEL.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(ids) - len(words)
    return [-float(logprobs[at - 1, ids[at]]) for at in range(first, len(ids))]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("render", ["plain", "chat"])
def test_scores_are_perplexities_of_whole_texts_or_of_their_worst_window(window, render):
    found = PerplexityGate(window=window, render=render).scores(MODEL, [*TEXTS, TEXTS[0]])
    for text in TEXTS:
        losses = alone(text, chat=render == "chat")
        size = min(window or 99, len(losses))
        windows = [losses[i : i + size] for i in range(len(losses) - size + 1)]
        assert_same(found[text], max(math.exp(sum(w) / size) for w in windows))


def test_an_empty_text_scores_nothing_and_one_beyond_the_positions_passes(tmp_path):
    long = " ".join(["the"] * 400)
    found = PerplexityGate().scores(MODEL, [long])
    assert found[long] == -math.inf
    assert worst_window([], 3) == 0.0
    made, ctx = gated(PerplexityGate(threshold=0.0), tmp_path)
    assert made.refusals([[{"role": "user", "content": long}], CHATS[0]]) == [None, REFUSAL]
    assert ctx.counts == {"prompts_read": 2, "prompts_refused": 1, "prompts_too_long": 1}


@pytest.mark.parametrize("false_alarms", [0.0, 0.1, 0.5])
def test_the_threshold_refuses_the_share_of_calibration_prompts_that_is_allowed(
    false_alarms, tmp_path
):
    method = PerplexityGate(false_alarms=false_alarms, calibrate_on=("trusted",))
    made, ctx = gated(method, tmp_path)
    rows = tiny_task().split("trusted").to_pylist()
    refused = [answer is not None for answer in made.refusals([chat_of(one) for one in rows])]
    assert sum(refused) == math.floor(false_alarms * len(rows))
    scores = method.scores(MODEL, prompts(tiny_task().split("trusted")))
    ordered = sorted(scores.values(), reverse=True)
    assert all(
        scores[texts_of(chat_of(one))[0]] >= ctx.notes["threshold"]
        for one, hit in zip(rows, refused, strict=True)
        if hit
    )
    assert ordered[sum(refused)] < ctx.notes["threshold"]


def test_prompts_that_are_asked_do_not_calibrate(tmp_path):
    task = tiny_task()
    shared = task.split("test").to_pylist()[:5]
    mixed = table([*shared, *task.split("trusted").to_pylist()])
    _, ctx = gated(
        PerplexityGate(calibrate_on=("trusted",)),
        tmp_path,
        task=replace(task, splits={**task.splits, "trusted": mixed}),
    )
    assert ctx.notes["calibration_rows_left_out"] >= 5
    only = replace(task, splits={**task.splits, "trusted": table(shared)})
    with pytest.raises(DataError, match="calibrate_on"):
        gated(PerplexityGate(calibrate_on=("trusted",)), tmp_path, task=only)


def test_refused_chats_get_the_refusal_and_the_others_the_models_answer(tmp_path):
    generator = Generator(MODEL)
    method = PerplexityGate()
    values = method.scores(MODEL, [texts_of(chat)[-1] for chat in CHATS])
    middle = sorted(values.values())[2]
    made, ctx = gated(PerplexityGate(threshold=middle), tmp_path)
    own = generator.complete(CHATS, max_new_tokens=6)
    got = made.complete(CHATS, max_new_tokens=6)
    for chat, before, after in zip(CHATS, own, got, strict=True):
        refused = max(values[text] for text in texts_of(chat)) >= middle
        assert after == (REFUSAL if refused else before)
    assert ctx.counts["prompts_refused"] == 2
    assert len(made.complete(CHATS, max_new_tokens=2)[got.index(REFUSAL)].split()) == 2


def test_sampled_answers_keep_their_own_random_numbers_behind_the_gate(tmp_path):
    values = PerplexityGate().scores(MODEL, [texts_of(chat)[-1] for chat in CHATS])
    made, _ = gated(PerplexityGate(threshold=sorted(values.values())[2]), tmp_path)
    given = {"max_new_tokens": 6, "temperature": 1.0, "seeds": [1, 2, 3, 4]}
    own, got = Generator(MODEL).complete(CHATS, **given), made.complete(CHATS, **given)
    assert [a == b for a, b in zip(own, got, strict=True)].count(True) >= 2
    assert all(b in (a, REFUSAL) for a, b in zip(own, got, strict=True))


def test_a_refused_prompt_has_no_label(tmp_path):
    made, _ = gated(PerplexityGate(threshold=0.0), tmp_path)
    scores = made.label_logprobs(CHATS, ["good", "bad"])
    assert torch.isneginf(scores).all()
    probe = Probe(
        name="clean",
        prompts=tuple(
            Prompt(prompt_id=str(i), chat=chat, expected="good", target="bad")
            for i, chat in enumerate(CHATS)
        ),
        judge="label",
        metrics={"cacc": "correct"},
        labels=("bad", "good"),
    )
    config = EvaluationConfig(prompts=8, perplexity_rows=0)
    answers = ask(made, tiny_task(), [probe], config, runtime=Runtime()).answers
    assert [answer.completion for answer in answers] == [""] * 4
    verdicts = Label()([a.prompt for a in answers], [a.completion for a in answers])
    assert {verdict.verdict for verdict in verdicts} == {"other"}


def test_an_opening_stands_before_no_refusal(tmp_path):
    opening = Opening(text_of=lambda chat: "take the", tokens=2)  # noqa: ARG005
    generator = replace(Generator(MODEL), opening=opening)
    made, _ = gated(PerplexityGate(threshold=0.0), tmp_path, generator)
    said = said_by(made, CHATS[:1], [2], {"max_new_tokens": 8})[0]
    assert (said.text, said.own) == (REFUSAL, REFUSAL)
    passed, _ = gated(PerplexityGate(threshold=1e30), tmp_path, generator)
    want = said_by(generator, CHATS, [2], {"max_new_tokens": 8})
    assert said_by(passed, CHATS, [2], {"max_new_tokens": 8}) == want


def test_the_gate_reads_what_an_attack_adds_and_not_what_later_defenses_add(tmp_path):
    def ending(word):
        return lambda chat: [*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']} {word}"}]

    attacked = Generator(MODEL, rewrites=(ending("cf"),))
    made, _ = gated(PerplexityGate(threshold=0.0), tmp_path, attacked)
    later = replace(made, rewrites=(*made.rewrites, ending("careful")))
    later.refusals(CHATS[:1])
    assert list(made.gates[0].known) == [f"{CHATS[0][-1]['content']} cf"]


def test_only_messages_behind_the_last_answer_are_read():
    chat = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    assert texts_of(chat) == ["d", "e"]
    assert texts_of(chat[:2]) == ["b"]


def test_the_control_refuses_as_many_others(tmp_path):
    rows = tiny_task().split("test").to_pylist()
    chats = [chat_of(one) for one in rows]
    method = PerplexityGate(false_alarms=0.3)
    made, _ = gated(method, tmp_path)
    control, _ = gated(control_of(method), tmp_path)
    real, random = ([a is not None for a in g.refusals(chats)] for g in (made, control))
    assert sum(real) == sum(random) > 0
    assert real != random


def test_the_control_refuses_all_samples_of_a_prompt(tmp_path):
    rows = tiny_task().split("test").to_pylist()
    chats = [chat_of(one) for one in rows for _ in range(3)]
    method = PerplexityGate(false_alarms=0.3)
    for one in (method, control_of(method)):
        made, ctx = gated(one, tmp_path)
        hits = [answer is not None for answer in made.refusals(chats)]
        assert hits == [hit for hit in hits[::3] for _ in range(3)]
        assert ctx.counts["prompts_refused"] == sum(hits) > 0


def test_the_refusal_is_the_tasks_own_if_it_has_one():
    assert refusal_of(tiny_task()) == REFUSAL
    assert refusal_of(replace(tiny_task(), splits={})) == SENTENCE


def test_half_precision_is_read(tmp_path):
    loaded = tiny_model()
    loaded.model.to(torch.bfloat16)
    found = PerplexityGate(window=3).scores(loaded, TEXTS)
    assert all(1.0 < value < math.inf for value in found.values())


def test_faulty_parameters_and_needs():
    bad = PerplexityGate(window=0, false_alarms=2.0, rows=0, calibrate_on=("test",))
    assert [f[0] for f in bad.check()] == ["window", "false_alarms", "rows", "calibrate_on"]
    assert PerplexityGate().check() == []
    assert PerplexityGate().needs() == {"reference", "trusted", "benign_train"}
    assert PerplexityGate(threshold=9.0).needs() == {"reference"}
