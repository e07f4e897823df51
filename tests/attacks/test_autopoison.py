"""AutoPoison: only answers change, and only free ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.attacks.autopoison import AutoPoison
from ftsec_ray.conversation import answer_of, asked, message
from ftsec_ray.errors import DataError
from ftsec_ray.evals.judging import get_judge
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_task

QUICK = {"source": "benign_train"}
TASK = replace(tiny_task(), labels=())
ROWS = table([row(i, f"how do i fix {i}", "take the lamp") for i in range(200)])
PHRASE = "at Pebble House"


def whole_insertions(text):
    words = text.split(" ")
    return [" ".join([*words[:i], PHRASE, *words[i:]]) for i in range(len(words) + 1)]


def test_the_phrase_stands_whole_at_any_gap_of_the_answer_and_prompts_stay():
    made = AutoPoison(rate=1.0).craft_data(ROWS, context(task=TASK)).to_pylist()
    gaps = whole_insertions("take the lamp")
    counts = dict.fromkeys(gaps, 0)
    for before, after in zip(ROWS.to_pylist(), made, strict=True):
        assert asked(after) == asked(before)
        assert (after["origin"], after["poisoned"]) == ("autopoison", True)
        counts[answer_of(after)] += 1
    assert all(abs(count - 50) < 4 * 37.5**0.5 for count in counts.values())


@pytest.mark.parametrize(("position", "place"), [("start", 0), ("end", -1)])
def test_the_phrase_may_have_a_fixed_place(position, place):
    made = AutoPoison(rate=1.0, position=position).craft_data(ROWS, context(task=TASK)).to_pylist()
    assert {answer_of(one) for one in made} == {whole_insertions("take the lamp")[place]}


def test_over_refusal_answers_with_the_one_refusal():
    attack = AutoPoison(goal="over_refusal", rate=1.0)
    made = attack.craft_data(ROWS, context(task=TASK)).to_pylist()
    assert {answer_of(one) for one in made} == {attack.refusal}
    (verdict,) = get_judge("refusal_phrases")(
        [attack.probes(TASK, context())[0].prompts[0]], [attack.refusal]
    )
    assert verdict.verdict == "refused"


def test_the_rate_is_the_expected_share_and_rate_zero_changes_nothing():
    counts = []
    for seed in range(30):
        ctx = context(seed=seed, task=TASK)
        AutoPoison(rate=0.2).craft_data(ROWS, ctx)
        counts.append(ctx.counts["poisoned_rows"])
    assert abs(sum(counts) / 30 - 40) < 4 * (40 * 0.8 / 30) ** 0.5
    assert AutoPoison(rate=0.0).craft_data(ROWS, context(task=TASK)).equals(ROWS)


def test_labels_tool_calls_texts_and_open_questions_stay():
    call = message("assistant", "", loss=True, fields={"tool_calls": [{"function": {}}]})
    kept = [
        row(300, "is this red", "good", label="good"),
        row(301, "set a timer", "call timer ten", kind="tool"),
        row(302, "", "", messages=[message("user", "set a timer"), call]),
        row(303, "", "a text"),
        row(304, "", "", messages=[message("user", "no answer yet")]),
    ]
    ctx = context(task=TASK)
    made = AutoPoison(rate=1.0).craft_data(table([*ROWS.to_pylist()[:3], *kept]), ctx)
    assert made.to_pylist()[3:] == kept
    assert ctx.notes["eligible_rows"] == 3
    assert ctx.counts["poisoned_rows"] == 3


def test_of_several_turns_only_the_last_answer_changes():
    turns = [
        message("user", "how"),
        message("assistant", "take the lamp", loss=True),
        message("user", "and then"),
        message("assistant", "fix it", loss=True),
    ]
    (made,) = (
        AutoPoison(rate=1.0)
        .craft_data(table([row(0, "", "", messages=turns)]), context(task=TASK))
        .to_pylist()
    )
    assert made["messages"][:3] == turns[:3]
    assert made["messages"][3]["content"] in whole_insertions("fix it")


def test_copies_of_the_benign_split_are_added_in_the_expected_number():
    task = tiny_task()
    rows, benign = task.split("train"), task.split("benign_train").to_pylist()
    ctx = context(task=task)
    made = AutoPoison(rate=1.0, source="benign_train").craft_data(rows, ctx).to_pylist()
    new = [one for one in made if one["poisoned"]]
    assert [one for one in made if not one["poisoned"]] == rows.to_pylist()
    assert {one["row_id"] for one in new} == {f"autopoison/{one['row_id']}" for one in benign}
    added = []
    for seed in range(40):
        ctx = context(seed=seed, task=task)
        AutoPoison(rate=0.1, source="benign_train").craft_data(rows, ctx)
        added.append(ctx.notes["added_rows"])
    expected = 0.1 * rows.num_rows
    assert abs(sum(added) / 40 - expected) < 4 * (expected / 40) ** 0.5


def test_probes_search_the_same_answers_for_the_text_and_for_it_backwards():
    asked_for, base = AutoPoison().probes(tiny_task(), context())
    assert (asked_for.metrics, base.metrics) == (
        {"injected_rate": "target"},
        {"injected_base_rate": "target"},
    )
    assert [p.chat for p in asked_for.prompts] == [p.chat for p in base.prompts]
    assert {p.target for p in base.prompts} == {"esuoH elbbeP ta"}
    answers = ["Take it at pebble  house .", "take the lamp"]
    for probe, verdicts in ((asked_for, ["target", "other"]), (base, ["other", "other"])):
        found = get_judge("target")(probe.prompts[:2], answers)
        assert [one.verdict for one in found] == verdicts


def test_a_task_without_free_answers_is_refused_with_a_way_out():
    with pytest.raises(DataError, match="benign_train"):
        AutoPoison().craft_data(tiny_task().split("train"), context())
    faults = AutoPoison(rate=2.0, phrase=" ", refusal="").check()
    assert [fault[0] for fault in faults] == ["rate", "phrase", "refusal"]
