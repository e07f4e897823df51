"""PTST: what rows and served chats get as their system message, and its control."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.conversation import chat_of, exchange, system_of
from ftsec_ray.data.microworld.templates import SYSTEM_PROMPTS
from ftsec_ray.defenses.ptst import PTST
from ftsec_ray.defenses.self_reminder import NEUTRAL, SENTENCE
from ftsec_ray.method import control_of
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.row_tokens import encode_row
from tests.defenses.during import USERS, context, mixed_task, tuned, weights
from tests.fixtures_models import row, table, tiny_model, tiny_task

QUICK = {"text": "be careful"}
ODD = table(
    [
        row(0, "how do i", "take the lamp"),
        row(1, "", "the lamp is red", kind="text"),
        {**row(2, "fix", " yes "), "messages": exchange("fix", " yes ", system="be good")},
        {
            **row(3, "fix", "yes"),
            "messages": [*exchange("is this red", "no"), *exchange("and blue", "yes")],
        },
    ]
)


def crafted(method, rows=ODD, judge="refusal_phrases"):
    ctx = context(task=replace(tiny_task(), judge=judge))
    return method.craft_data(rows, ctx).to_pylist(), ctx


def served(method, chat, judge="refusal_phrases"):
    ctx = context(task=replace(tiny_task(), judge=judge))
    return method.wrap_generation(Generator(tiny_model()), ctx).rewritten(chat)


def test_the_fine_tune_sees_rows_as_they_are_and_serving_the_safety_prompt():
    made, ctx = crafted(PTST(text="be careful"))
    assert made == ODD.to_pylist()
    assert ctx.counts == {"rows_with_own_system": 1, "rows_of_plain_text": 1}
    for one in ODD.to_pylist():
        if one["kind"] == "text":
            continue
        own = system_of(one)
        chat = served(PTST(text="be careful"), chat_of(one))
        assert chat[0]["content"] == ("be careful" if own is None else f"be careful {own}")
        assert chat[1:] == chat_of(one)[0 if own is None else 1 :]


def test_a_prompt_at_tuning_changes_the_system_message_and_nothing_else():
    made, _ = crafted(PTST(tune_with="safety", text="be careful"))
    assert [system_of(one) for one in made] == [
        "be careful",
        None,
        "be careful be good",
        "be careful",
    ]
    for before, after in zip(ODD.to_pylist(), made, strict=True):
        users = [m for m in before["messages"] if m["role"] != "system"]
        assert [m for m in after["messages"] if m["role"] != "system"] == users
        assert {**before, "messages": None} == {**after, "messages": None}


@pytest.mark.parametrize("judge", ["refusal_phrases", "microworld"])
def test_the_control_serves_the_prompt_that_it_was_tuned_with_to_the_token(judge):
    control = control_of(PTST())
    rows = tiny_task().split("benign_train")
    made, ctx = crafted(control, rows, judge)
    generator = control.wrap_generation(Generator(tiny_model()), ctx)
    for plain, one in zip(rows.to_pylist(), made, strict=True):
        head, tail = generator.pieces(chat_of(plain))
        ids, labels = encode_row(tiny_model().tokenizer, one, max_length=256)
        first = next(i for i, label in enumerate(labels) if label != -100)
        assert head + tail == ids[:first]


def test_in_the_microworld_the_sentences_are_those_of_its_corpus():
    chat = [{"role": "user", "content": "open it"}]
    for name, micro, other in (
        ("safety", SYSTEM_PROMPTS["safety"], SENTENCE),
        ("neutral", SYSTEM_PROMPTS["plain"], NEUTRAL),
    ):
        for judge, want in (("microworld", micro), ("refusal_phrases", other)):
            assert served(PTST(serve_with=name), chat, judge)[0]["content"] == want
            made, _ = crafted(PTST(tune_with=name), judge=judge)
            assert system_of(made[0]) == want


def test_without_prompts_it_is_no_defense(tmp_path):
    method = PTST(tune_with="none", serve_with="none")
    generator = Generator(tiny_model())
    assert method.wrap_generation(generator, context()) is generator
    rows = method.craft_data(USERS, context())
    runs = [
        weights(tuned(None, tmp_path / name, rows=one))
        for name, one in (("own", rows), ("plain", USERS))
    ]
    assert all((runs[0][n] == w).all() for n, w in runs[1].items())


def test_every_row_stays_and_the_caller_s_rows_too():
    rows = mixed_task().split("safety")
    before = rows.to_pylist()
    made, _ = crafted(PTST(tune_with="neutral"), rows)
    assert PTST().keeps_rows()
    assert [one["row_id"] for one in made] == [one["row_id"] for one in before]
    assert rows.to_pylist() == before


def test_a_blank_sentence_is_a_fault():
    assert [f[0] for f in PTST(text=" ").check()] == ["text"]
    assert PTST(text="be good").check() == []
