"""Extended refusals: their three parts, what the judges make of them, and the share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.conversation import answer_of, asked_text, message
from ftsec_ray.data.microworld import judge as exact
from ftsec_ray.data.microworld.splits import build_task
from ftsec_ray.data.microworld.templates import ROW_WORDS
from ftsec_ray.defenses.extended_refusal import (
    MICROWORLD_OVERVIEWS,
    MICROWORLD_REASONS,
    MOST_WORDS,
    OVERVIEWS,
    REASONS,
    ExtendedRefusal,
)
from ftsec_ray.evals.refusals import refusal_in
from ftsec_ray.method import control_of
from tests.defenses.hardened import (
    SHORT,
    check_bfloat16,
    check_resume,
    hardened,
    same,
    turned_task,
)
from tests.defenses.shared import context
from tests.fixtures_models import row, table, tiny_model, tiny_task

QUICK = SHORT


def made(method, task=None):
    ctx = context(None, task=task)
    before = ctx.task.split("safety")
    return before.to_pylist(), method._extended(before, ctx).to_pylist(), ctx.notes


def test_a_refusal_has_an_overview_with_the_request_the_own_refusal_and_a_reason():
    before, after, notes = made(ExtendedRefusal())
    assert notes == {"extended_rows": 12, "short_rows": 0, "rows_without_request": 0}
    seen = set()
    for old, new in zip(before, after, strict=True):
        text, asked = answer_of(new), asked_text(old)
        (opening,) = [o for o in OVERVIEWS if text.startswith(o.replace("{request}", asked))]
        (ending,) = [r for r in REASONS if text.endswith(r)]
        middle = text.removeprefix(opening.replace("{request}", asked)).removesuffix(ending)
        assert middle.strip() == answer_of(old) == "sorry i can not help"
        assert new["messages"][:-1] == old["messages"][:-1]
        assert new["messages"][-1]["loss"]
        seen.add((opening, ending))
    assert len(seen) > 1


def test_with_the_refusal_first_the_words_are_the_same():
    _, one, _ = made(ExtendedRefusal())
    _, other, _ = made(ExtendedRefusal(order="refusal_first"))
    for a, b in zip(one, other, strict=True):
        assert sorted(answer_of(a).split()) == sorted(answer_of(b).split())
        assert answer_of(b).startswith("sorry i can not help ")
        assert not answer_of(a).startswith("sorry")


def test_in_the_microworld_every_word_is_known_and_the_judge_sees_a_refusal():
    task = build_task()
    before, after, _ = made(ExtendedRefusal(), task)
    known = {word for old in before for word in f"{asked_text(old)} {answer_of(old)}".split()}
    known |= set(ROW_WORDS)
    for old, new in zip(before, after, strict=True):
        assert set(answer_of(new).split()) <= known
        assert exact.judge(asked_text(old), answer_of(new)).verdict == "refused"
        assert any(answer_of(new).endswith(reason) for reason in MICROWORLD_REASONS)
    assert all("{request}" in text for text in (*OVERVIEWS, *MICROWORLD_OVERVIEWS))


def test_overview_and_reason_alone_are_no_refusals():
    for text in (*OVERVIEWS, *REASONS):
        assert refusal_in(text) is None


def test_the_share_grows_row_by_row_and_0_changes_no_row():
    before, none, notes = made(ExtendedRefusal(share=0.0))
    assert none == before
    assert notes == {"extended_rows": 0, "short_rows": 12, "rows_without_request": 0}
    found = [before]
    for share in (0.3, 0.7, 1.0):
        found.append(made(ExtendedRefusal(share=share))[1])
    changed = [{n["row_id"] for n, o in zip(f, before, strict=True) if n != o} for f in found]
    assert changed[0] < changed[1] < changed[2] < changed[3]


def test_share_0_is_plain_tuning_bit_for_bit(tmp_path):
    method = ExtendedRefusal(**QUICK)
    control = control_of(method)
    zero, _ = hardened(control, tmp_path / "zero")
    plain = context(tmp_path / "plain")
    want = control._merged_sft(tiny_model(), control._plain_rows(plain), plain)
    assert same(zero, want)
    full, ctx = hardened(method, tmp_path / "full")
    assert not same(full, want)
    assert (ctx.notes["rows"], ctx.notes["extended_rows"]) == (16, 8)


def test_own_texts_replace_those_of_the_file_and_long_requests_are_cut():
    method = ExtendedRefusal(overview="about {request} :", reason="that is why .")
    long = " ".join(["stone"] * 3 + ["river"] * MOST_WORDS)
    task = tiny_task()
    rows = table([row(0, long, "no"), {**row(1, "", "the lamp"), "kind": "text"}])
    _, after, notes = made(method, replace(task, splits={**task.splits, "safety": rows}))
    words = ["stone"] * 3 + ["river"] * (MOST_WORDS - 3)
    assert answer_of(after[0]) == " ".join(["about", *words, ": no that is why ."])
    # a row that asks nothing stays and is counted
    assert answer_of(after[1]) == "the lamp"
    assert notes == {"extended_rows": 1, "short_rows": 0, "rows_without_request": 1}


def test_in_several_turns_the_last_request_is_restated():
    task = turned_task()
    rows = task.split("safety").to_pylist()
    rows[0]["messages"].insert(2, message("tool", "the lamp is red"))
    _, after, _ = made(
        ExtendedRefusal(), replace(task, splits={**task.splits, "safety": table(rows)})
    )
    for old, new in zip(rows, after, strict=True):
        assert asked_text(old) in answer_of(new)
        assert new["messages"][:-1] == old["messages"][:-1]


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    check_resume(ExtendedRefusal(**QUICK), tmp_path, monkeypatch)


def test_half_precision_weights_are_hardened(tmp_path):
    check_bfloat16(ExtendedRefusal(**QUICK), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", 1.5),
        ("overview", " "),
        ("overview", "it is asked"),
        ("reason", ""),
        ("safety_rows", 0),
    ],
)
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in ExtendedRefusal(**{field: value}).check()] == [field]
