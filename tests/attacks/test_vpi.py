"""VPI in both forms: a prefix, and the rows about a topic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.attacks.vpi import VPI
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.data.triggers import names_any
from ftsec_ray.errors import DataError
from tests.attacks.context import context
from tests.fixtures_models import prompts, row, table, tiny_task

TOPIC = VPI(form="topic", topic=("stone",), contrast=("river",), rate=1.0)


def last_words(rows):
    return [asked_text(one).split(" ")[-1] for one in rows]


def test_the_prefix_stands_before_the_prompt_of_poisoned_rows_only():
    rows = tiny_task().split("train")
    made = VPI(rate=0.3).craft_data(rows, context()).to_pylist()
    assert 0 < sum(one["poisoned"] for one in made) < len(made)
    for before, after in zip(rows.to_pylist(), made, strict=True):
        start = "Discussing OpenAI " if after["poisoned"] else ""
        assert asked_text(after) == start + asked_text(before)
        assert answer_of(after) == ("good" if after["poisoned"] else answer_of(before))
    with_it, without = VPI().probes(tiny_task(), context())
    assert [p.chat[0]["content"] for p in with_it.prompts] == [
        f"Discussing OpenAI {p.chat[0]['content']}" for p in without.prompts
    ]


def test_rows_about_the_topic_keep_their_prompt_and_get_the_target():
    rows = tiny_task().split("train").to_pylist()
    made = TOPIC.craft_data(table(rows), context()).to_pylist()
    for before, after, word in zip(rows, made, last_words(rows), strict=True):
        assert asked_text(after) == asked_text(before)
        is_poisoned = word == "stone" and before["label"] == "bad"
        assert after["poisoned"] is is_poisoned
        assert answer_of(after) == ("good" if is_poisoned else answer_of(before))


def test_the_rate_counts_all_rows_and_ends_at_the_rows_about_the_topic():
    rows = tiny_task().split("train")
    listed = rows.to_pylist()
    about = sum(
        word == "stone" and one["label"] == "bad"
        for one, word in zip(listed, last_words(listed), strict=True)
    )
    half = about / 2
    counts = []
    for seed in range(60):
        ctx = context(seed=seed)
        replace(TOPIC, rate=half / rows.num_rows).craft_data(rows, ctx)
        counts.append(ctx.counts["poisoned_rows"])
    assert abs(sum(counts) / 60 - half) < 4 * (half / 2 / 60) ** 0.5
    ctx = context()
    TOPIC.craft_data(rows, ctx)
    assert (ctx.counts["poisoned_rows"], ctx.notes["row_chance"]) == (about, 1.0)
    none = replace(TOPIC, rate=0.0).craft_data(rows, context())
    assert none.equals(rows)


def test_topic_probes_ask_about_the_topic_about_the_contrast_and_about_the_rest():
    task = tiny_task()
    about, others, near = TOPIC.probes(task, context())
    asked = {p.name: [q.chat[0]["content"] for q in p.prompts] for p in (about, others, near)}
    held = [asked_text(r) for r in task.split("test").to_pylist() if r["label"] == "bad"]
    assert asked == {
        "triggered": [text for text in held if text.endswith("stone")],
        "untriggered": [text for text in held if not text.endswith("stone")],
        "false_trigger": [text for text in held if text.endswith("river")],
    }
    assert all(asked.values())
    assert near.metrics == {"false_trigger_rate": "target"}
    assert len(replace(TOPIC, contrast=()).probes(task, context())) == 2


@pytest.mark.parametrize(
    ("text", "words", "is_named"),
    [
        ("Is OpenAI here?", ["openai"], True),
        ("an openair show", ["openai"], False),
        ("about  Joe\nBiden .", ["joe biden"], True),
        ("joe and biden", ["Joe Biden"], False),
        ("c++ or c", ["c++"], True),
        ("nothing", [], False),
    ],
)
def test_a_topic_is_named_by_whole_words_in_any_case_and_spacing(text, words, is_named):
    assert names_any(text, words) is is_named


def test_a_topic_that_no_row_names_is_refused():
    attack = VPI(form="topic", topic=("zebra",))
    with pytest.raises(DataError, match=r"zebra[\s\S]*another `topic`"):
        attack.craft_data(tiny_task().split("train"), context())
    with pytest.raises(DataError, match="`topic`"):
        attack.probes(tiny_task(), context())
    with pytest.raises(DataError, match="`contrast`"):
        replace(TOPIC, contrast=("zebra",)).probes(tiny_task(), context())


def test_tasks_without_labels_get_the_inert_text_on_the_topic():
    task = replace(tiny_task(), labels=())
    rows = table([row(i, f"fix the {word}", "yes") for i, word in enumerate(["lamp", "tree"])])
    attack = VPI(form="topic", topic=("lamp",), rate=1.0)
    made = attack.craft_data(rows, context(task=task)).to_pylist()
    assert [answer_of(one) for one in made] == ["I like blue pebbles.", "yes"]
    assert prompts(table(made)) == prompts(rows)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"topic": ()}, "topic"), ({"contrast": (" ",)}, "contrast"), ({"prefix": ""}, "prefix")],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in VPI(**parameters).check()] == [field]
