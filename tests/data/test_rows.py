from __future__ import annotations

import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray import schema
from ftsec_ray.conversation import answer_of, exchange, message, with_answer, with_asked
from ftsec_ray.data.rows import (
    NULLABLE,
    answers_of,
    asks_as,
    filter_report,
    from_rows,
    map_rows,
    new_row,
    read_table,
    to_rows,
    write_table,
)
from ftsec_ray.errors import DataError

CHANGES = {"prompt": with_asked, "response": with_answer}
ROWS = [
    new_row(f"t/{i:03d}", prompt=f"ask {i}", response=f"say {i}", poisoned=i % 3 == 0)
    for i in range(12)
]


def test_rows_survive_the_way_to_a_table_and_back():
    assert to_rows(from_rows(ROWS)) == ROWS
    assert from_rows(ROWS).schema.equals(schema.ROWS, check_metadata=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda row: row | {"promt": "x"}, "promt"),
        (lambda row: {k: v for k, v in row.items() if k != "kind"}, "kind"),
        (lambda row: row | {"kind": 7}, r"row 2 \('t/001'\) does not have a str in 'kind'"),
        (lambda row: row | {"poisoned": "maybe"}, r"a bool in 'poisoned'(.|\n)*maybe"),
        (lambda row: row | {"messages": []}, r"row 2 \('t/001'\) has no messages"),
        (lambda row: row | {"messages": [{"role": "user"}]}, "invalid message"),
        (lambda row: row | {"messages": [message("bot", "hi")]}, "invalid message(.|\n)*bot"),
        (lambda row: row | {"messages": [message("user", 7)]}, "invalid message(.|\n)*7"),
        (lambda row: row | {"row_id": "t/000"}, "t/000"),
    ],
)
def test_a_row_that_pyarrow_would_bend_is_an_error(change, match):
    with pytest.raises(DataError, match=match):
        from_rows([ROWS[0], change(ROWS[1])])


def test_the_columns_that_may_be_null_are_those_of_the_schema():
    assert {field.name for field in schema.ROWS if field.nullable} == NULLABLE
    assert {field.name for field in schema.ROWS if field.type == pa.bool_()} == {"poisoned"}


def test_a_new_row_knows_its_columns():
    assert new_row("a", prompt="p", kind="tool")["kind"] == "tool"
    with pytest.raises(DataError, match="kin"):
        new_row("a", prompt="p", kin="tool")


def test_map_rows_changes_and_drops_in_order():
    found = map_rows(
        from_rows(ROWS), lambda row: None if row["poisoned"] else with_answer(row, "x")
    )
    assert found["row_id"].to_pylist() == [row["row_id"] for row in ROWS if not row["poisoned"]]
    assert {answer_of(row) for row in to_rows(found)} == {"x"}


def test_the_same_rows_give_the_same_bytes_in_any_order_and_in_any_blocks(tmp_path):
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    blocks = pa.concat_tables([from_rows(shuffled[:5]), from_rows(shuffled[5:])])
    write_table(from_rows(ROWS), tmp_path / "a.parquet")
    write_table(blocks, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert to_rows(read_table(tmp_path / "b.parquet")) == ROWS


def test_a_file_or_table_of_something_else_is_refused(tmp_path):
    other = pa.table({"x": [1]})
    with pytest.raises(DataError, match="'x'"):
        write_table(other, tmp_path / "a.parquet")
    import pyarrow.parquet as pq

    pq.write_table(other, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="'x'"):
        read_table(tmp_path / "x.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataError, match=r"text\.parquet"):
        read_table(tmp_path / "text.parquet")


def test_a_filter_is_counted_by_hand_computed_shares():
    after = [row for row in ROWS if row["row_id"] not in ("t/000", "t/001")]
    after = [with_answer(row, "other") if row["row_id"] == "t/003" else row for row in after]
    after.append(new_row("added", prompt="new"))
    assert filter_report(from_rows(ROWS), from_rows(after)) == {
        "filter_tpr": 2 / 4,
        "filter_fpr": 1 / 8,
        "n_poisoned": 4,
        "n_clean": 8,
    }


def test_a_filter_on_clean_rows_has_no_true_positive_rate():
    clean = from_rows([row | {"poisoned": False} for row in ROWS])
    assert filter_report(clean, clean) == {
        "filter_tpr": None,
        "filter_fpr": 0.0,
        "n_poisoned": 0,
        "n_clean": 12,
    }


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from(["keep", "drop", "prompt", "response"])),
        max_size=20,
    )
)
def test_a_filter_report_agrees_with_counting_what_was_done(plan):
    before = [
        new_row(str(i), prompt="p", response="r", poisoned=bad) for i, (bad, _) in enumerate(plan)
    ]
    after = [
        row if what == "keep" else CHANGES[what](row, "changed")
        for row, (_, what) in zip(before, plan, strict=True)
        if what != "drop"
    ]
    report = filter_report(from_rows(before), from_rows(after))
    for key, bad in (("filter_tpr", True), ("filter_fpr", False)):
        done = [what != "keep" for is_bad, what in plan if is_bad == bad]
        assert report[key] == (sum(done) / len(done) if done else None)


CALL = {"tool_calls": [{"function": {"name": "light", "arguments": {}}}]}
KINDS = (
    lambda: exchange("ask", "say"),
    lambda: exchange("ask", ""),
    lambda: exchange("", "text"),
    lambda: exchange("ask", "say", system="be brief"),
    lambda: [message("user", "a"), message("assistant", "", loss=True, fields=CALL)],
    lambda: [*exchange("a", "b"), message("tool", "c"), message("assistant", "d", loss=True)],
    lambda: [*exchange("a", "b"), message("tool", "c")],
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12), st.integers(0, 3))
def test_columns_are_read_as_rows_are(kinds, skip):
    rows = [new_row(f"{i:02d}", messages=make()) for i, make in enumerate(kinds)]
    table = pa.concat_tables([from_rows(rows[:2]), from_rows(rows[2:])]).slice(skip)
    plain = to_rows(table)
    if not plain:
        return
    assert answers_of(table) == [answer_of(row) for row in plain]
    for role in ("user", "tool"):
        assert asks_as(table, role) == [
            any(m["role"] == role for m in row["messages"]) for row in plain
        ]
