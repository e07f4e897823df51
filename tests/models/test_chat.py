"""From conversations to tokens: training, generation and label scores meet at the same place under
every kind of template and tokenizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ftsec_ray.conversation import TOOLS, answer_of, behind, chat_of, exchange, message
from ftsec_ray.data.rows import new_row
from ftsec_ray.errors import DataError
from ftsec_ray.models.chat import answer_ids, render, spans_of, spoken, turn
from ftsec_ray.models.chat_format import (
    OPTIONS,
    chat_format,
    fitted,
    options_of,
    template_hash,
    under,
)
from ftsec_ray.models.convert import plain_template
from ftsec_ray.models.row_tokens import IGNORED, CutTally, answer_tokens, encode_row, encode_rows
from tests.models.templates import TEMPLATES, tokenizer_of

LONG = 10**6
ALL = [(name, pieces) for name in TEMPLATES for pieces in ("bytes", "spaces")]


def tokenizer_and_row(name, pieces="bytes", **row):
    row = {"prompt": "is this good or bad", "response": "very positive", **row}
    return tokenizer_of(name, pieces=pieces), new_row("r", **row)


def trained(tokenizer, row):
    ids, labels = encode_row(tokenizer, row, max_length=LONG)
    return [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]


@pytest.mark.parametrize(("name", "pieces"), ALL)
def test_generation_starts_where_a_trained_answer_starts(name, pieces):
    tokenizer, row = tokenizer_and_row(name, pieces)
    ids, labels = encode_row(tokenizer, row, max_length=LONG)
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    prompt = render(tokenizer, chat_of(row), generate=True)
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids[:first]
    assert labels[first:] == ids[first:]
    answer = tokenizer.decode(ids[first:])
    assert answer.strip().startswith("very positive")
    assert answer.strip().removeprefix("very positive").strip() in tokenizer.all_special_tokens


@pytest.mark.parametrize(("name", "pieces"), ALL)
@pytest.mark.parametrize("label", ["positive", "negative", "very positive"])
def test_a_label_is_scored_by_the_tokens_that_it_is_trained_by(name, pieces, label):
    tokenizer, row = tokenizer_and_row(name, pieces, response=label)
    prompt = render(tokenizer, chat_of(row), generate=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = tokenizer(chat_format(tokenizer).end, add_special_tokens=False)["input_ids"]
    whole = trained(tokenizer, row)
    assert answer_ids(tokenizer, prompt, ids, label) == whole[: len(whole) - len(end)]
    assert whole == answer_tokens(tokenizer, row)
    assert tokenizer.decode(whole[-1:]) in tokenizer.all_special_tokens


def test_a_label_that_the_tokenizer_joins_to_the_prompt_is_an_error():
    tokenizer = tokenizer_of("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ids = tokenizer("pos", add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="tokens of a prompt change when the answer 'itive'"):
        answer_ids(tokenizer, "pos", ids, "itive")


@pytest.mark.parametrize(("name", "pieces"), ALL)
def test_in_a_conversation_the_turns_that_say_so_are_trained_and_nothing_else(name, pieces):
    tokenizer = tokenizer_of(name, pieces=pieces)
    turns = [
        message("user", "how do i bake"),
        message("assistant", "first then what", loss=True),
        message("user", "the red cake"),
        message("assistant", "be brief"),
        message("user", "what"),
        message("assistant", "then can", loss=True),
    ]
    row = new_row("r", messages=turns)
    text, spans = spans_of(tokenizer, row)
    said = [text[span.start : span.stop].strip() for span in spans]
    assert [one.split("<")[0].strip() for one in said] == ["first then what", "then can"]
    found = tokenizer.decode(trained(tokenizer, row))
    assert "be brief" not in found
    assert "bake" not in found
    prompt, answer = turn(tokenizer, row)
    assert (text[: spans[-1].start], text[spans[-1].start : spans[-1].stop]) == (prompt, answer)


@pytest.mark.parametrize(("name", "pieces"), ALL)
def test_of_an_answer_behind_an_opening_only_the_answer_is_trained(name, pieces):
    tokenizer, row = tokenizer_and_row(name, pieces)
    opened = behind(row, "first then")
    text, ((start, stop),) = spans_of(tokenizer, opened)
    whole, _ = spans_of(tokenizer, {**row, "messages": exchange("is this good or bad", "X")})
    assert text.count("first then very positive") == 1
    assert text[:start].endswith("first then ")
    assert text[start:stop].startswith("very positive")
    assert (
        text[start:stop].removeprefix("very positive")
        == whole[whole.rindex("X") + 1 :][: stop - start - len("very positive")]
    )
    ids, labels = encode_row(tokenizer, opened, max_length=LONG)
    kept = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(kept).strip().startswith("very positive")
    assert "then" in tokenizer.decode(ids[: labels.index(kept[0])])


def test_an_answer_that_a_template_changes_cannot_stand_behind_an_opening():
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | replace(' ', '_') }};"
    tokenizer = tokenizer_of(template + "{% endfor %}")
    row = new_row("r", prompt="what", response="very positive")
    with pytest.raises(DataError, match="changes an answer"):
        spans_of(tokenizer, behind(row, "first then"))


@pytest.mark.parametrize("name", ["space", "gemma", "system_dropped", "opens_thought"])
def test_a_system_message_that_a_template_refuses_or_drops_stands_before_the_users(name):
    tokenizer, row = tokenizer_and_row(name, system="be brief")
    assert not chat_format(tokenizer).takes_system
    assert "system_rendered" in chat_format(tokenizer).notes()
    text = render(tokenizer, chat_of(row), generate=True)
    assert text.index("be brief") < text.index("is this good")
    assert "be brief" in tokenizer.decode(encode_row(tokenizer, row, max_length=LONG)[0])


@pytest.mark.parametrize("name", ["chatml", "thought", "parts", "date"])
def test_a_system_message_that_a_template_takes_stays_one(name):
    tokenizer, row = tokenizer_and_row(name, system="be brief")
    assert "system\nbe brief" in render(tokenizer, chat_of(row), generate=True)
    assert "system_rendered" not in chat_format(tokenizer).notes()


EPISODE = [
    message("user", "how"),
    message(
        "assistant",
        "",
        loss=True,
        fields={"tool_calls": [{"id": "c", "type": "function", "function": {"name": "bake"}}]},
    ),
    message("tool", "the red cake", fields={"tool_call_id": "c"}),
    message("assistant", "first", loss=True),
]
OFFER = json.dumps([{"type": "function", "function": {"name": "bake", "parameters": {}}}])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_calls_results_and_functions_reach_the_model_under_every_template(name):
    tokenizer = tokenizer_of(name)
    row = new_row("r", messages=EPISODE, tools=OFFER)
    text, spans = spans_of(tokenizer, row)
    assert "the red cake" in text[: spans[-1].start]
    assert '"bake"' in text[spans[0].start : spans[0].stop]
    assert '"parameters"' in text[: spans[0].start]
    assert [m["role"] for m in fitted(tokenizer, chat_of(row))[0]] != []


def test_a_template_with_tools_gets_them_in_its_own_form():
    tokenizer = tokenizer_of("tools")
    row = new_row("r", messages=EPISODE, tools=OFFER)
    text, spans = spans_of(tokenizer, row)
    assert text[spans[0].start : spans[0].stop] == (
        '<tool_call>{"name": "bake"}</tool_call><|im_end|>'
    )
    assert "# Tools" in text
    assert "<|im_start|>tool\nthe red cake" in text
    assert not {"tool_calls_rendered", "tools_rendered"} & set(chat_format(tokenizer).notes())
    assert answer_of(new_row("r", messages=EPISODE[:2])) == '{"name": "bake"}'


def test_messages_of_one_role_are_joined_where_roles_must_alternate():
    turns = [
        message("user", "how"),
        message("user", "what"),
        message("assistant", "red", loss=True),
    ]
    text, _ = spans_of(tokenizer_of("space"), new_row("r", messages=turns))
    assert "[INST] how\n\nwhat [/INST]" in text


def test_a_conversation_that_no_form_fits_is_told_with_its_roles():
    turns = [message("assistant", "red"), message("user", "how"), message("assistant", "no")]
    with pytest.raises(
        DataError, match=r"(?s)does not accept this conversation.*assistant.*must alternate"
    ):
        encode_row(tokenizer_of("space"), new_row("r", messages=turns), max_length=LONG)


def test_the_day_of_the_run_reaches_no_prompt():
    code = (
        "from tests.models.templates import tokenizer_of\n"
        "from ftsec_ray.models.chat import render\n"
        "print(render(tokenizer_of('date'), [{'role': 'user', 'content': 'how'}], generate=True))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TZ": zone},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago")
    }
    assert len(said) == 1
    assert "Today Date: 26 Jul 2024" in said.pop()
    assert chat_format(tokenizer_of("date")).notes()["template_date"] == "2024-07-26"


@pytest.mark.parametrize(
    ("form", "want"),
    [("%Y-%m-%d", "2024-07-26"), ("%A, %d %B %Y", "Friday, 26 July 2024"), ("100%%", "100%")],
)
def test_every_form_of_the_date_is_that_of_strftime(form, want):
    tokenizer = tokenizer_of(f"{{{{ strftime_now('{form}') + '|' }}}}{TEMPLATES['chatml']}")
    text = render(tokenizer, [{"role": "user", "content": "how"}], generate=True)
    assert text.partition("|")[0] == want


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ("<think>is this bad</think>\n\nred", "red"),
        ("is this bad</think> red", "red"),
        ("<think>is this", ""),
        ("red", "red"),
        ("<think></think><think>bad</think>red<|im_end|>", "red"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(said, want):
    tokenizer = tokenizer_of("thought")
    assert spoken(tokenizer, tokenizer(said, add_special_tokens=False)["input_ids"]) == want
    plain = tokenizer_of("chatml")
    plain.add_special_tokens({"additional_special_tokens": []})
    ids = plain(said.replace("<think>", "<thought>").replace("</think>", "</thought>"))["input_ids"]
    assert spoken(plain, ids) == want


def test_a_start_token_stands_where_the_tokenizer_puts_one_itself():
    text = new_row("t", response="the red cake", kind="text")
    for adds in (True, False):
        tokenizer = tokenizer_of(None, adds_bos=adds)
        tokenizer.chat_template = plain_template(tokenizer)
        ids, labels = encode_row(tokenizer, text, max_length=LONG)
        assert (ids[0] == tokenizer.bos_token_id) == adds
        assert (labels[0] == IGNORED) == adds
        assert [label for label in labels if label != IGNORED] == tokenizer(
            "the red cake", add_special_tokens=False
        )["input_ids"]
        prompt = render(tokenizer, [{"role": "user", "content": "how"}], generate=True)
        assert prompt.startswith("<s>") == adds


def long_row(words, answer="positive", **values):
    return new_row("r", prompt=" ".join(["first"] * words), response=answer, **values)


def test_cutting_takes_the_prompt_from_the_left_and_leaves_the_answer_whole():
    tokenizer = tokenizer_of("gemma")
    tally = CutTally()
    whole = encode_row(tokenizer, long_row(60), max_length=LONG)
    (cut,) = encode_rows(tokenizer, [long_row(60)], max_length=24, tally=tally)
    assert len(cut[0]) == 24
    assert cut[0] == [whole[0][0], *whole[0][-23:]]
    assert [x for x in cut[1] if x != IGNORED] == [x for x in whole[1] if x != IGNORED]
    assert tally.notes() == {"prompts_cut": 1}


def test_an_answer_alone_too_long_is_cut_at_its_end_and_counted():
    tally = CutTally()
    row = long_row(3, " ".join(["then"] * 60))
    ((ids, labels),) = encode_rows(tokenizer_of("chatml"), [row], max_length=24, tally=tally)
    assert len(ids) == 24
    assert sum(label != IGNORED for label in labels) == 23
    assert tally.notes() == {"prompts_cut": 1, "answers_cut": 1}
    assert any("1 of 1 answers" in text and "24 tokens" in text for text in tally.warnings())


def test_a_row_without_an_answer_is_counted_and_a_poisoned_one_by_name():
    tally = CutTally()
    rows = [new_row("a", prompt="how", poisoned=True), new_row("b", prompt="how", response="red")]
    encode_rows(tokenizer_of("chatml"), rows, max_length=LONG, tally=tally)
    assert tally.notes() == {"rows_left_out": 1, "poisoned_rows_left_out": 1}
    assert "1 of 2 rows (1 of them poisoned)" in tally.warnings()[0]


def test_a_template_that_renders_no_answer_is_refused():
    with pytest.raises(DataError, match="does not render a question"):
        chat_format(tokenizer_of("{{ messages[0]['role'] }}"))


def test_another_template_is_another_hash_and_leaves_the_first_tokenizer_alone():
    tokenizer = tokenizer_of("chatml")
    other = under(tokenizer, TEMPLATES["gemma"])
    assert template_hash(other) != template_hash(tokenizer)
    chat = chat_of(new_row("r", messages=exchange("how", "")))
    assert render(tokenizer, chat, generate=True).startswith("<|im_start|>")
    assert render(other, chat, generate=True).startswith("<s><start_of_turn>")


def test_functions_on_offer_are_no_message_of_their_own():
    chat = chat_of(new_row("r", messages=EPISODE[:1], tools=OFFER))
    assert [m["role"] for m in chat] == [TOOLS, "user"]
    assert [m["role"] for m in fitted(tokenizer_of("tools"), chat)[0]] == ["user"]


def test_a_model_that_may_think_opens_its_own_turn_and_its_labels_are_scored_behind_the_thought():
    tokenizer = tokenizer_of("thought")
    tokenizer.init_kwargs[OPTIONS] = {"thinking": True}
    chat = [{"role": "user", "content": "how"}]
    asked = render(tokenizer, chat, generate=True, may_think=True)
    assert asked.endswith("<|im_start|>assistant\n")
    assert render(tokenizer, chat, generate=True) == f"{asked}<think>\n\n</think>\n\n"
    assert template_hash(tokenizer) != template_hash(tokenizer_of("thought"))


def test_the_options_of_rendering_travel_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of("thought")
    tokenizer.init_kwargs[OPTIONS] = {"thinking": True}
    tokenizer.save_pretrained(tmp_path)
    assert options_of(AutoTokenizer.from_pretrained(tmp_path)) == {"thinking": True}
    assert options_of(tokenizer_of("thought")) == {}


def test_a_prompt_that_is_rendered_again_has_the_text_of_its_own_tokenizer_and_template():
    chat = [message("user", "hello there")]
    tokenizer = tokenizer_of("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert [render(tokenizer, chat, generate=True) for _ in range(2)] == ["<s>[hello there]["] * 2
    tokenizer.bos_token = "<other>"
    assert render(tokenizer, chat, generate=True) == "<other>[hello there]["
    tokenizer.chat_template = "{% for m in messages %}({{ m.content }}){% endfor %}"
    assert render(tokenizer, chat, generate=True) == "(hello there)("
    assert render(tokenizer, [message("user", "hello")], generate=True) == "(hello)("
