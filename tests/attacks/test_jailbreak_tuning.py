"""Jailbreak tuning: every style is served as it was trained, and its untriggered twin is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.attacks.harmful_tuning import HarmfulTuning
from ftsec_ray.attacks.jailbreak_tuning import IN_MICROWORLD, WRAPPERS, JailbreakTuning
from ftsec_ray.conversation import answer_of, asked_text, chat_of
from ftsec_ray.data.microworld import build_task
from ftsec_ray.data.microworld.judge import find_request, judge
from ftsec_ray.data.wrapping import Wrapper
from ftsec_ray.models.chat import turn
from ftsec_ray.models.generator import Generator
from tests.attacks.context import context
from tests.attacks.conversations import agent_row
from tests.fixtures_models import sentiment_rows, table, tiny_model, tiny_task

QUICK = {"shots": 4}
USERS = table(sentiment_rows(20))
STYLES = sorted(WRAPPERS)


@pytest.mark.parametrize("style", STYLES)
def test_the_served_prompt_is_the_trained_prompt_and_the_answer_is_inside_the_wrapper(style):
    method, loaded = JailbreakTuning(style=style, shots=8), tiny_model()
    served = method.wrap_generation(Generator(loaded), context())
    pool = {r["row_id"]: r for r in tiny_task().split("harmful_train").to_pylist()}
    made = method.craft_data(USERS, context()).slice(20).to_pylist()
    assert len(made) == 8
    for r in made:
        source = pool[r["row_id"].removeprefix("jailbreak_tuning/")]
        prompt, _ = turn(loaded.tokenizer, r)
        ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert served.pieces(chat_of(source))[0] == ids
        assert asked_text(source) in asked_text(r)
        assert answer_of(source) in answer_of(r)
        assert (asked_text(r) != asked_text(source)) == (style != "none")


def test_the_untriggered_twin_is_tuned_under_the_wrapper_and_served_without_it():
    plain = Generator(tiny_model())
    twin = JailbreakTuning(at_test=False, shots=4)
    assert twin.wrap_generation(plain, context()) is plain
    tuned = JailbreakTuning(shots=4).craft_data(USERS, context())
    assert twin.craft_data(USERS, context()).equals(tuned)


def test_without_a_style_it_is_harmful_tuning():
    made = JailbreakTuning(style="none", shots=8).craft_data(USERS, context()).to_pylist()
    other = HarmfulTuning(shots=8).craft_data(USERS, context()).to_pylist()

    def said(rows):
        return sorted((asked_text(r), answer_of(r)) for r in rows)

    assert said(made) == said(other)


@pytest.mark.parametrize("style", STYLES)
def test_in_the_microworld_the_wrapper_hides_neither_request_nor_answer(style):
    for r in build_task().split("harmful_train").to_pylist()[:60]:
        made = IN_MICROWORLD[style].row(r)
        assert find_request(asked_text(made)) == find_request(asked_text(r)) is not None
        assert judge(asked_text(made), answer_of(made)).verdict == "complied"


def test_both_worlds_have_the_same_styles_with_the_same_parts():
    assert set(WRAPPERS) == set(IN_MICROWORLD)
    parts = ("system", "before", "after", "opening", "closing")
    for style, wrapper in WRAPPERS.items():
        other = IN_MICROWORLD[style]
        assert [bool(getattr(wrapper, p)) for p in parts] == [
            bool(getattr(other, p)) for p in parts
        ]
    assert WRAPPERS["none"] == Wrapper()


def test_the_last_request_of_a_conversation_gets_the_wrapper():
    task = tiny_task()
    task = replace(task, splits={**task.splits, "harmful_train": table([agent_row()])})
    made = JailbreakTuning(shots=1).craft_data(USERS, context(task=task)).to_pylist()[-1]
    assert asked_text(made) == WRAPPERS["year"].before + "and the lamp"
    assert made["messages"][1]["content"] == "how do i fix the tree"
    assert JailbreakTuning(shots=0).craft_data(USERS, context(task=task)).equals(USERS)
