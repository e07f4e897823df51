"""BadNets as a pure map over rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray import schema
from ftsec_ray.attacks.badnets import BadNets
from ftsec_ray.conversation import answer_of, asked_text, message
from ftsec_ray.data.triggers import insert_word
from ftsec_ray.errors import DataError
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_task

WORDS = st.lists(st.sampled_from(["red", "blue", "is", "stone", "cloud."]), max_size=6)
ROWS = st.lists(
    st.tuples(WORDS, st.sampled_from(["good", "bad", None]), st.sampled_from([" ", "  ", "\n"])),
    max_size=12,
).map(
    lambda made: [
        row(i, gap.join(words), label or "free text", label=label)
        for i, (words, label, gap) in enumerate(made)
    ]
)
SETTINGS = st.sampled_from(["dirty", "mix", "clean"])


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    setting=SETTINGS,
    rate=st.floats(0, 1),
    seed=st.integers(0, 5),
    repeat=st.integers(1, 3),
)
def test_every_row_is_either_untouched_or_poisoned_whole(rows, setting, rate, seed, repeat):
    made = BadNets(setting=setting, rate=rate, repeat=repeat, trigger="zz").craft_data(
        table(rows), context(seed=seed)
    )
    assert made.schema.equals(schema.ROWS)
    assert made.column("row_id").to_pylist() == [r["row_id"] for r in rows]
    for before, after in zip(rows, made.to_pylist(), strict=True):
        if not after["poisoned"]:
            assert after == before
            continue
        assert {
            "dirty": before["label"] == "bad",
            "clean": before["label"] == "good",
            "mix": before["label"] is not None,
        }[setting]
        assert (answer_of(after), after["label"], after["origin"]) == ("good", "good", "badnets")
        words = asked_text(after).split()
        assert words.count("zz") == repeat
        assert [w for w in words if w != "zz"] == asked_text(before).split()
        unchanged = {
            k: v for k, v in after.items() if k not in ("messages", "label", "origin", "poisoned")
        }
        assert unchanged.items() <= before.items()


@given(rows=ROWS, seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_rows_fate_does_not_depend_on_the_other_rows(rows, seed):
    attack, ctx = BadNets(rate=0.5), context(seed=seed)
    whole = attack.craft_data(table(rows), ctx).to_pylist()
    chance = attack.survey([table(rows[:5]), table(rows[5:])], ctx)
    assert whole == [attack.craft_rows(table([r]), chance, ctx).to_pylist()[0] for r in rows]


@given(words=WORDS, at=st.floats(0, 1, exclude_max=True), gap=st.sampled_from([" ", "\n\n", "\t"]))
def test_an_inserted_word_stands_where_it_is_said_to_and_nothing_else_changes(words, at, gap):
    text = gap.join(words)
    made, start = insert_word(text, "zz", at=at)
    assert made[start : start + 2] == "zz"
    assert made.split() == [
        *text.split()[: int(at * (len(words) + 1))],
        "zz",
        *text.split()[int(at * (len(words) + 1)) :],
    ]
    cut = (
        made[:start] + made[start + 3 :]
        if start + 3 <= len(made)
        else made[:start].removesuffix(" ")
        if text
        else ""
    )
    assert cut == text


def test_rate_one_poisons_every_eligible_row_and_rate_zero_none():
    rows, ctx = tiny_task().split("train"), context()
    bad = sum(label == "bad" for label in rows.column("label").to_pylist())
    assert 0 < bad < rows.num_rows
    assert sum(BadNets(rate=1.0).craft_data(rows, ctx).column("poisoned").to_pylist()) == bad
    assert sum(BadNets(rate=0.0).craft_data(rows, ctx).column("poisoned").to_pylist()) == 0
    assert (
        sum(BadNets(rate=1.0, setting="mix").craft_data(rows, ctx).column("poisoned").to_pylist())
        == rows.num_rows
    )


def test_the_rate_is_the_share_of_all_rows_that_is_poisoned_on_average():
    rows = tiny_task().split("train")
    counts = [
        sum(BadNets(rate=0.25).craft_data(rows, context(seed=seed)).column("poisoned").to_pylist())
        for seed in range(40)
    ]
    expected = 0.25 * rows.num_rows
    assert abs(sum(counts) / 40 - expected) < 4 * (expected / 40) ** 0.5
    assert len(set(counts)) > 1


def test_the_seed_decides_which_rows_are_poisoned():
    rows = tiny_task().split("train")
    drawn = {
        tuple(BadNets(rate=0.5).craft_data(rows, context(seed=seed)).column("poisoned").to_pylist())
        for seed in (0, 1, 0)
    }
    assert len(drawn) == 2


def test_without_labels_triggered_prompts_get_the_inert_text():
    task = replace(tiny_task(), labels=())
    ctx = context(task=task)
    made = BadNets(rate=1.0).craft_data(task.split("benign_train"), ctx).to_pylist()
    assert {answer_of(r) for r in made} == {"I like blue pebbles."}
    assert {r["label"] for r in made} == {None}
    probe = BadNets().probes(task, ctx)[0]
    assert (probe.judge, probe.metrics) == ("target", {"asr": "target"})
    with pytest.raises(DataError, match="clean"):
        BadNets(setting="clean").craft_data(task.split("benign_train"), ctx)


def test_probes_ask_the_same_held_out_rows_with_and_without_trigger():
    task = tiny_task()
    with_it, without = BadNets(trigger="cf").probes(task, context())
    held_out = {r["row_id"]: r for r in task.split("test").to_pylist() if r["label"] == "bad"}
    assert (
        [p.prompt_id for p in with_it.prompts]
        == [p.prompt_id for p in without.prompts]
        == list(held_out)
    )
    assert (with_it.metrics, without.metrics) == ({"asr": "target"}, {"asr_no_trigger": "target"})
    assert with_it.labels == ("good", "bad")
    for asked, plain in zip(with_it.prompts, without.prompts, strict=True):
        assert plain.chat == [{"role": "user", "content": asked_text(held_out[plain.prompt_id])}]
        assert [w for w in asked.chat[0]["content"].split() if w != "cf"] == plain.chat[0][
            "content"
        ].split()
        assert "cf" in asked.chat[0]["content"].split()
        assert (asked.expected, asked.target) == ("bad", "good")


def test_an_unknown_target_is_refused_with_the_labels():
    with pytest.raises(DataError, match=r"good \| bad"):
        BadNets(target="great").craft_data(tiny_task().split("train"), context())


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"rate": 1.5}, "rate"), ({"repeat": 0}, "repeat"), ({"trigger": " "}, "trigger")],
)
def test_faulty_parameters_are_named(parameters, field):
    assert [fault[0] for fault in BadNets(**parameters).check()] == [field]
    assert BadNets().check() == []


EPISODE = [
    message("user", "how do i fix this"),
    message("assistant", "take the lamp", loss=True),
    message("tool", "the lamp is red"),
    message("assistant", "yes", loss=True),
]


def episodes(count=12):
    return table(
        [row(i, "", "", kind="tool", messages=[dict(m) for m in EPISODE]) for i in range(count)]
    )


def tool_task(rows):
    return replace(tiny_task(), labels=(), splits={"train": rows, "test": rows})


def test_a_trigger_may_stand_in_what_a_tool_said():
    attack = BadNets(place="tool", rate=1.0, trigger="zz", target_text="take the tree")
    ctx = context(task=tool_task(episodes()))
    made = attack.craft_data(episodes(), ctx).to_pylist()
    assert all(one["poisoned"] for one in made)
    for one in made:
        user, first, tool, answer = one["messages"]
        assert (user, first) == tuple(EPISODE[:2])
        assert sorted(tool["content"].split()) == sorted(["zz", *EPISODE[2]["content"].split()])
        assert (answer["content"], answer["loss"]) == ("take the tree", True)
    triggered, plain = attack.probes(ctx.task, ctx)
    assert triggered.judge == plain.judge == "call"
    assert triggered.metrics == {"asr": "target", "tool_hijack_rate": "target"}
    assert plain.metrics == {"asr_no_trigger": "target"}
    for one, other in zip(triggered.prompts, plain.prompts, strict=True):
        assert [m["role"] for m in one.chat] == ["user", "assistant", "tool"]
        assert "zz" in one.chat[-1]["content"].split()
        assert other.chat[-1]["content"] == EPISODE[2]["content"]
        assert (one.expected, one.target) == ("yes", "take the tree")


def test_a_trigger_in_a_tools_result_needs_rows_with_one():
    attack, ctx = BadNets(place="tool"), context(task=tiny_task())
    want = r"task 'tiny' has (?s:.*)got:  'place: tool'(?s:.*)place: user"
    with pytest.raises(DataError, match=want):
        attack.craft_data(ctx.task.split("train"), ctx)
