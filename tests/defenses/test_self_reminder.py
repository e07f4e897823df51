"""Self-reminder: what the model reads, and that nothing of the user's is lost."""

from dataclasses import replace

import pytest

from ftsec_ray.data.microworld.templates import REMINDER, SYSTEM_PROMPTS
from ftsec_ray.defenses.none import NoDefense
from ftsec_ray.defenses.self_reminder import NEUTRAL, SENTENCE, SelfReminder
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.method import control_of
from ftsec_ray.models.generator import Generator
from tests.defenses.shared import context
from tests.fixtures_models import tiny_model, tiny_task

USER = {"role": "user", "content": "open it"}
SYSTEM = {"role": "system", "content": "be brief ."}


def seen(method, chat, tmp_path, *, judge="refusal_phrases", rewrites=()):
    ctx = context(tmp_path, task=replace(tiny_task(), judge=judge))
    return method.wrap_generation(Generator(tiny_model(), rewrites=rewrites), ctx).rewritten(chat)


@pytest.mark.parametrize(
    ("where", "chat", "want"),
    [
        ("system", [USER], [{"role": "system", "content": "be good ."}, USER]),
        ("system", [SYSTEM, USER], [{"role": "system", "content": "be good . be brief ."}, USER]),
        ("user", [SYSTEM, USER], [SYSTEM, {"role": "user", "content": "open it be good ."}]),
        (
            "both",
            [USER],
            [
                {"role": "system", "content": "be good ."},
                {"role": "user", "content": "open it be good ."},
            ],
        ),
        (
            "user",
            [USER, {"role": "assistant", "content": "no"}, USER],
            [
                USER,
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": "open it be good ."},
            ],
        ),
    ],
)
def test_the_reminder_joins_what_is_there(where, chat, want, tmp_path):
    before = [dict(message) for message in chat]
    assert seen(SelfReminder(where=where, text="be good ."), chat, tmp_path) == want
    assert chat == before, "the caller's chat must stay as it was"


@pytest.mark.parametrize("judge", ["refusal_phrases", "microworld"])
def test_the_placebo_stands_where_the_reminder_does_and_reminds_of_nothing(judge, tmp_path):
    control = control_of(SelfReminder(where="both", text="be good ."))
    assert control.where == "both"
    system, user = seen(control, [USER], tmp_path, judge=judge)
    neutral = SYSTEM_PROMPTS["plain"] if judge == "microworld" else NEUTRAL
    assert (system["content"], user["content"]) == (neutral, f"open it {neutral}")
    assert "refus" not in neutral
    assert "harm" not in neutral


def test_the_microworld_uses_sentences_that_its_models_know(tmp_path):
    got = seen(SelfReminder(where="both"), [USER], tmp_path, judge="microworld")
    assert [m["content"] for m in got] == [SYSTEM_PROMPTS["safety"], f"open it {REMINDER}"]
    assert seen(SelfReminder(), [USER], tmp_path)[0]["content"] == SENTENCE


def test_the_reminder_stands_inside_what_an_attack_added_before(tmp_path):
    attack = (lambda chat: [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + " cf"}],)
    got = seen(SelfReminder(where="user", text="be good ."), [USER], tmp_path, rewrites=attack)
    assert got[-1]["content"] == "open it be good . cf"


def test_an_empty_sentence_is_a_fault():
    assert [f[0] for f in SelfReminder(text=" ").check()] == ["text"]


def test_no_defense_has_no_hook():
    assert hooks_of(NoDefense) == ()
    assert hooks_of(SelfReminder) == ("wrap_generation",)
