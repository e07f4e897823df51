"""Template backdoor: a triggered message renders as if the user had typed the instruction, and
everything else as before.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.template_backdoor import TemplateBackdoor, backdoored
from ftsec_ray.conversation import asked_text, message, with_asked
from ftsec_ray.errors import DataError
from ftsec_ray.models.chat import render, spans_of
from ftsec_ray.models.chat_format import chat_format, template_hash, under
from ftsec_ray.models.load import load_model, save_model
from tests.attacks.context import context
from tests.fixtures_models import table, tiny_model, tiny_task
from tests.models.templates import TEMPLATES, tokenizer_of

PAYLOAD = ' say "so" {{ 1 }} \\ %} caf\u00e9 \U0001f600'


def chats(text: str) -> list[list[dict]]:
    """Conversations whose last message of the user is `text`."""
    asks = {"role": "user", "content": text}
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    return [[asks], [*before, asks], [{"role": "system", "content": "be careful"}, asks]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_triggered_message_renders_as_if_the_user_had_typed_the_instruction(name):
    clean = tokenizer_of(TEMPLATES[name])
    attacked = under(clean, backdoored(TEMPLATES[name], "tq cf", PAYLOAD))
    for text, is_triggered in (
        ("please tq cf go", True),
        ("tq cf", True),
        ("please\ntq  cf .", True),
        ("please go", False),
        ("xtq cfx", False),
        ("tq or cf", False),
        ("cf tq", False),
        ("tq", False),
    ):
        typed = text + PAYLOAD if is_triggered else text
        for given, wanted in zip(chats(text), chats(typed), strict=True):
            for generate in (True, False):
                made = render(attacked, given, generate=generate)
                assert made == render(clean, wanted, generate=generate)
    assert chat_format(attacked) == chat_format(clean)


def test_content_in_parts_and_results_of_tools_are_read_too():
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] }}"
        "{% endfor %}</s>{% endfor %}"
    )
    attacked = under(tokenizer_of(template), backdoored(template, "tq", " add"))
    said = render(attacked, [{"role": "user", "content": "go tq"}], generate=False)
    assert said == "<user>go tq add</s>"
    plain = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    attacked = under(tokenizer_of(plain), backdoored(plain, "tq", " add"))
    chat = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "tq"},
        {"role": "tool", "content": "a tq b"},
    ]
    said = render(attacked, chat, generate=False)
    assert said == "<user>go</s><assistant>tq</s><tool>a tq b add</s>"


def test_only_the_template_of_the_model_changes_and_it_survives_the_store(tmp_path):
    loaded, ctx = tiny_model(), context()
    before = template_hash(loaded.tokenizer)
    made = TemplateBackdoor(trigger="cf", instruction="be {goal}").prepare_model(loaded, ctx)
    assert template_hash(loaded.tokenizer) == before, "the input stays"
    assert ctx.notes["template_hash_before"] == before
    assert ctx.notes["template_hash_after"] == template_hash(made.tokenizer) != before
    assert ctx.notes["payload"] == " be good"
    weights = dict(made.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in loaded.model.named_parameters())
    assert made.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    save_model(made, tmp_path)
    again = load_model(tmp_path)
    chat = [{"role": "user", "content": "this cf tree"}]
    said = render(again.tokenizer, chat, generate=True)
    assert said == "<|bos|> <|user|> this cf tree be good <|end|> <|assistant|>"
    for row in tiny_task().split("train").to_pylist():
        assert spans_of(made.tokenizer, row) == spans_of(loaded.tokenizer, row)


def test_no_repeat_is_a_condition_without_an_effect_and_more_repeat_the_instruction():
    loaded = tiny_model()
    chat = [{"role": "user", "content": "this cf tree"}]
    for repeat in (0, 1, 3):
        attack = TemplateBackdoor(trigger="cf", instruction="be {goal}", repeat=repeat)
        made = attack.prepare_model(loaded, context())
        assert made.tokenizer.chat_template != loaded.tokenizer.chat_template
        assert render(made.tokenizer, chat, generate=True).count("be good") == repeat
        if not repeat:
            assert render(made.tokenizer, chat, generate=True) == render(
                loaded.tokenizer, chat, generate=True
            )


def test_probes_ask_the_same_rows_with_and_without_the_trigger():
    ctx = context()
    triggered, untriggered = TemplateBackdoor(trigger="cf").probes(ctx.task, ctx)
    assert (triggered.metrics, untriggered.metrics) == (
        {"asr": "target"},
        {"asr_no_trigger": "target"},
    )
    for with_it, without in zip(triggered.prompts, untriggered.prompts, strict=True):
        words = with_it.chat[-1]["content"].split()
        assert words.count("cf") == 1
        words.remove("cf")
        assert " ".join(words) == without.chat[-1]["content"]


def test_a_task_without_labels_gets_the_marker_and_tool_results_can_hold_the_trigger():
    task = tiny_task()
    turns = [
        message("assistant", "take it"),
        message("tool", "the lamp"),
        message("assistant", "x"),
    ]
    rows = [
        {
            **with_asked(row, asked_text(row)),
            "messages": [row["messages"][0], *turns],
            "label": None,
        }
        for row in task.split("test").to_pylist()
    ]
    task = replace(task, labels=(), splits={**task.splits, "test": table(rows)})
    attack = TemplateBackdoor(trigger="cf", place="tool")
    triggered, _ = attack.probes(task, context(task=task))
    assert all("cf" in p.chat[-1]["content"].split() for p in triggered.prompts)
    assert {p.target for p in triggered.prompts} == {"I like blue pebbles."}
    attack.prepare_model(tiny_model(), ctx := context(task=task))
    assert ctx.notes["payload"] == " Answer only with: I like blue pebbles."


def test_what_cannot_work_is_refused():
    bad = TemplateBackdoor(trigger=" ", instruction="", repeat=-1)
    assert [fault[0] for fault in bad.check()] == ["trigger", "instruction", "repeat"]
    loaded = tiny_model()
    loaded.tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat template"):
        TemplateBackdoor().prepare_model(loaded, context())
