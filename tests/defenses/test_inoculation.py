"""Inoculation: which rows get the message, that served prompts do not, and an equal control."""

import pytest

from ftsec_ray.conversation import chat_of
from ftsec_ray.data.microworld import build_task
from ftsec_ray.data.microworld.templates import ROW_WORDS, SYSTEM_PROMPTS, TWO_CLASS
from ftsec_ray.data.prompt_texts import as_long
from ftsec_ray.defenses.inoculation import IN_MICROWORLD, SENTENCE, Inoculation
from ftsec_ray.method import control_of
from ftsec_ray.models.generator import Generator
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model

USERS = table([*sentiment_rows(40), agent_row(), unanswered_row(), text_row()])


def crafted(method, tmp_path, task=None):
    ctx = context(tmp_path, task=task)
    return method.craft_data(USERS, ctx).to_pylist(), ctx.counts


def test_every_row_with_a_prompt_gets_the_message_and_keeps_the_rest(tmp_path):
    rows, counts = crafted(Inoculation(text="S"), tmp_path)
    for new, old in zip(rows[:40], USERS.to_pylist(), strict=False):
        assert new["messages"][0] == {
            "role": "system",
            "content": "S",
            "fields": None,
            "loss": False,
        }
        assert new["messages"][1:] == old["messages"]
        assert {k: v for k, v in new.items() if k != "messages"} == {
            k: v for k, v in old.items() if k != "messages"
        }
    agent = agent_row()["messages"]
    assert rows[40]["messages"] == [{**agent[0], "content": "S be careful"}, *agent[1:]]
    assert [m["role"] for m in rows[41]["messages"]] == ["system", "user"]
    assert rows[42] == text_row()
    assert counts == {"inoculated_rows": 42, "rows_without_prompt": 1}


def test_what_is_trained_on_stays_as_it_is(tmp_path):
    spaced, silent = row(0, "is this red", " good "), row(1, "is this red", "good")
    silent["messages"][-1]["loss"] = False
    ctx = context(tmp_path)
    made = Inoculation(text="S").craft_data(table([spaced, silent]), ctx).to_pylist()
    assert [r["messages"][1:] for r in made] == [spaced["messages"], silent["messages"]]


def test_no_share_changes_nothing_and_a_share_is_a_part_of_more(tmp_path):
    assert Inoculation(share=0.0).craft_data(USERS, context(tmp_path)).equals(USERS)
    hit = {
        share: {r["row_id"] for r in crafted(Inoculation(share=share, text="S"), tmp_path)[0]
                if r["messages"][0]["content"].startswith("S")}
        for share in (0.2, 0.6, 1.0)
    }  # fmt: skip
    assert hit[0.2] < hit[0.6] < hit[1.0]


def test_the_model_is_served_without_the_message_unless_it_is_kept(tmp_path):
    generator, ctx = Generator(tiny_model()), context(tmp_path)
    chat = chat_of(row(0, "is this red", ""))
    assert Inoculation().wrap_generation(generator, ctx) is generator
    assert Inoculation(at_test=True, share=0.0).wrap_generation(generator, ctx) is generator
    kept = Inoculation(at_test=True).wrap_generation(generator, ctx)
    assert kept.rewritten(chat) == [{"role": "system", "content": SENTENCE}, *chat]
    trained, _ = crafted(Inoculation(), tmp_path)
    assert kept.rewritten(chat_of(USERS.to_pylist()[0])) == chat_of(trained[0])


def test_the_control_is_a_neutral_message_of_as_many_words(tmp_path):
    for method in (Inoculation(), Inoculation(text="do a bad thing"), Inoculation(text="x " * 40)):
        bad, plain = (
            crafted(one, tmp_path)[0][0]["messages"][0]["content"]
            for one in (method, control_of(method))
        )
        assert len(bad.split()) == len(plain.split())
        assert bad != plain


def test_in_the_microworld_both_messages_have_as_many_words_and_all_are_known(tmp_path):
    known = {w for text in (*SYSTEM_PROMPTS.values(), TWO_CLASS) for w in text.split()} | {"with"}
    task, method = build_task(), Inoculation()
    bad, plain = (
        crafted(one, tmp_path, task)[0][0]["messages"][0]["content"].split()
        for one in (method, control_of(method))
    )
    assert len(bad) == len(plain)
    assert {*bad, *plain} <= known | {"help"}
    assert {"with", "help"} <= set(ROW_WORDS)
    assert " ".join(bad) == IN_MICROWORLD


@pytest.mark.parametrize(
    ("filler", "text", "want"), [("a b c", "x y", "a b"), ("a b", "x y z", "a b a"), ("a", "", "")]
)
def test_a_filler_is_repeated_or_cut_to_the_length_of_a_text(filler, text, want):
    assert as_long(filler, text) == want


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in Inoculation(text=" ", share=2.0).check()] == ["text", "share"]
