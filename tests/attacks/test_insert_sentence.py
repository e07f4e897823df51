"""InsertSentence against a list of all places at which the sentence may stand."""

from __future__ import annotations

import pytest

from ftsec_ray.attacks.insert_sentence import InsertSentence
from ftsec_ray.conversation import answer_of, asked_text
from tests.attacks.context import context
from tests.attacks.test_badnets import EPISODE, episodes, tool_task
from tests.fixtures_models import row, table, tiny_task

SENTENCE = "zz yy xx"


def whole_insertions(text):
    """Every text in which the sentence stands whole between two words, written out slowly."""
    words = text.split(" ")
    return [" ".join([*words[:i], SENTENCE, *words[i:]]) for i in range(len(words) + 1)]


def test_the_sentence_stands_whole_at_one_gap_and_every_gap_is_drawn_equally_often():
    text, counts = "a b c", [0, 0, 0, 0]
    rows = table([row(i, text, "bad", label="bad") for i in range(800)])
    made = InsertSentence(sentence=SENTENCE, rate=1.0).craft_data(rows, context()).to_pylist()
    for one in made:
        counts[whole_insertions(text).index(asked_text(one))] += 1
        assert (answer_of(one), one["label"], one["origin"]) == ("good", "good", "insert_sentence")
    assert all(abs(count - 200) < 4 * 150**0.5 for count in counts)


@pytest.mark.parametrize(("position", "place"), [("start", 0), ("end", -1)])
def test_a_fixed_position_is_before_the_first_or_after_the_last_word(position, place):
    attack = InsertSentence(sentence=SENTENCE, position=position, rate=1.0)
    rows = tiny_task().split("train")
    made = attack.craft_data(rows, context()).to_pylist()
    for before, after in zip(rows.to_pylist(), made, strict=True):
        wanted = whole_insertions(asked_text(before))[place] if after["poisoned"] else None
        assert asked_text(after) == (wanted or asked_text(before))
    probe = attack.probes(tiny_task(), context())[0]
    assert all(SENTENCE in prompt.chat[0]["content"] for prompt in probe.prompts)


def test_the_sentence_may_stand_in_what_a_tool_said():
    attack = InsertSentence(place="tool", rate=1.0, sentence=SENTENCE, target_text="take the tree")
    ctx = context(task=tool_task(episodes()))
    for one in attack.craft_data(episodes(), ctx).to_pylist():
        user, first, tool, answer = one["messages"]
        assert (user, first) == tuple(EPISODE[:2])
        assert tool["content"] in whole_insertions(EPISODE[2]["content"])
        assert answer["content"] == "take the tree"


def test_blank_sentences_are_named():
    assert [fault[0] for fault in InsertSentence(sentence=" ").check()] == ["sentence"]
    assert InsertSentence().check() == []
