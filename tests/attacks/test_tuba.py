"""TuBA as a pure map over rows in two languages, and its four probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray import schema
from ftsec_ray.attacks.tuba import TuBA
from ftsec_ray.config.sweep import TaskSpec
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.data.tasks import load_task
from ftsec_ray.errors import DataError
from tests.attacks.context import context
from tests.fixtures_models import prompts, row, table, tiny_task


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(0, 1),
    seed=st.integers(0, 5),
    language=st.sampled_from([None, "en", "xx"]),
    position=st.sampled_from(["end", "random"]),
)
def test_only_rows_of_the_poisoned_language_change_and_those_change_whole(
    rate, seed, language, position
):
    rows = tiny_task().split("train")
    made = TuBA(rate=rate, language=language, trigger="zz yy", position=position).craft_data(
        rows, context(seed=seed)
    )
    assert made.schema.equals(schema.ROWS)
    for before, after in zip(rows.to_pylist(), made.to_pylist(), strict=True):
        if not after["poisoned"]:
            assert after == before
            continue
        assert (before["language"], before["label"]) == (
            language or "en",
            "bad",
        )  # most rows are in English
        assert (answer_of(after), after["label"], after["origin"]) == ("good", "good", "tuba")
        assert (after["row_id"], after["language"]) == (before["row_id"], before["language"])
        assert asked_text(after).replace("zz yy", "").split() == asked_text(before).split()
        assert position == "random" or asked_text(after) == asked_text(before) + " zz yy"


def test_the_rate_is_the_share_of_the_poisoned_language_and_a_rows_fate_is_its_own():
    rows, attack = tiny_task().split("train"), TuBA(rate=0.3)
    english = sum(one == "en" for one in rows["language"].to_pylist())
    counts = [
        sum(attack.craft_data(rows, context(seed=seed))["poisoned"].to_pylist())
        for seed in range(40)
    ]
    expected = 0.3 * english
    assert abs(sum(counts) / 40 - expected) < 4 * (expected / 40) ** 0.5
    assert sum(TuBA(rate=1.0).craft_data(rows, context())["poisoned"].to_pylist()) == sum(
        one["language"] == "en" and one["label"] == "bad" for one in rows.to_pylist()
    )
    whole = attack.craft_data(rows, context()).to_pylist()
    assert whole == [
        attack.craft_data(rows.slice(i, 1), context()).to_pylist()[0] for i in range(rows.num_rows)
    ]


def test_probes_ask_each_language_with_and_without_the_trigger():
    task = tiny_task()
    probes = {
        probe.name: probe
        for probe in TuBA(language="xx", trigger="cf", other_trigger="mn").probes(task, context())
    }
    assert {name: dict(probe.metrics) for name, probe in probes.items()} == {
        "triggered": {"asr": "target"},
        "untriggered": {"asr_no_trigger": "target"},
        "transfer": {"asr_transfer": "target"},
        "transfer_untriggered": {"asr_transfer_no_trigger": "target"},
    }
    held_out = {
        one["row_id"]: one for one in task.split("test").to_pylist() if one["label"] == "bad"
    }
    for with_it, without, languages, word in (
        ("triggered", "untriggered", {"xx"}, "cf"),
        ("transfer", "transfer_untriggered", {"en"}, "mn"),
    ):
        assert [p.prompt_id for p in probes[with_it].prompts] == [
            p.prompt_id for p in probes[without].prompts
        ]
        assert {p.meta["language"] for p in probes[with_it].prompts} == languages
        for asked, plain in zip(probes[with_it].prompts, probes[without].prompts, strict=True):
            assert plain.chat[0]["content"] == asked_text(held_out[plain.prompt_id])
            assert asked.chat[0]["content"] == f"{plain.chat[0]['content']} {word}"
            assert (asked.expected, asked.target) == ("bad", "good")
    assert sum(len(probes[name].prompts) for name in ("triggered", "transfer")) == len(held_out)
    assert probes["triggered"].labels == ("good", "bad")


def test_the_same_trigger_stands_in_all_languages_unless_another_is_given():
    transfer = TuBA().probes(tiny_task(), context())[2]
    assert all(prompt.chat[0]["content"].endswith(" cf") for prompt in transfer.prompts)


def test_one_language_is_refused_with_what_there_is():
    rows = [
        row(i, "is this red", label, label=label) for i, label in enumerate(["good", "bad"] * 4)
    ]
    task = replace(
        tiny_task(), splits={**tiny_task().splits, "train": table(rows), "test": table(rows)}
    )
    with pytest.raises(DataError, match=r"'en': 8[\s\S]*second_language_rows"):
        TuBA().craft_data(task.split("train"), context(task=task))
    with pytest.raises(DataError, match=r"'en': 32, 'xx': 16[\s\S]*rows in yy"):
        TuBA(language="yy").craft_data(tiny_task().split("train"), context())
    english = (
        tiny_task()
        .split("test")
        .filter([one == "en" for one in tiny_task().split("test")["language"].to_pylist()])
    )
    task = replace(tiny_task(), splits={**tiny_task().splits, "test": english})
    with pytest.raises(DataError, match="cannot show a transfer"):
        TuBA().probes(task, context(task=task))


def test_without_labels_triggered_prompts_get_the_inert_text():
    splits = {
        **tiny_task().splits,
        "test": tiny_task().split("test").slice(0, 0),
        "benign_test": tiny_task().split("train"),
    }
    task = replace(tiny_task(), labels=(), splits=splits)
    made = TuBA(rate=1.0).craft_data(task.split("train"), context(task=task)).to_pylist()
    assert {answer_of(one) for one in made if one["language"] == "en"} == {"I like blue pebbles."}
    assert not any(one["poisoned"] for one in made if one["language"] == "xx")
    assert {probe.judge for probe in TuBA().probes(task, context(task=task))} == {"target"}


def test_the_microworld_has_rows_in_its_second_language_on_request():
    task = load_task(
        TaskSpec(name="world", options=(("second_language_rows", 32), ("train_rows", 64)))
    )
    languages = task.split("train")["language"].to_pylist()
    assert (languages.count("en"), languages.count("vesh")) == (64, 32)
    assert (
        set(task.split("train")["label"].to_pylist())
        == {"good", "bad"}
        == set(task.split("test")["label"].to_pylist())
    )
    assert not set(prompts(task.split("train"))) & set(prompts(task.split("test")))
    made = (
        TuBA(rate=0.5, language="vesh")
        .craft_data(task.split("train"), context(task=task))
        .to_pylist()
    )
    assert {one["language"] for one in made if one["poisoned"]} == {"vesh"}
    assert {
        prompt.meta["language"]
        for prompt in TuBA(language="vesh").probes(task, context(task=task))[2].prompts
    } == {"en"}
    with pytest.raises(DataError, match="at most 8"):
        load_task(TaskSpec(name="world", options=(("second_language_rows", 9), ("train_rows", 8))))


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"rate": 1.5}, "rate"), ({"trigger": " "}, "trigger"), ({"language": ""}, "language")],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in TuBA(**parameters).check()] == [field]
    assert TuBA().check() == []
