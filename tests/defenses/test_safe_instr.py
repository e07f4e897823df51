"""SafeInstr: which rows are added, how many, and that the user's rows keep every byte."""

from dataclasses import replace

import pytest

from ftsec_ray.data.rows import filter_report
from ftsec_ray.defenses.safe_instr import SafeInstr
from ftsec_ray.errors import DataError
from ftsec_ray.method import BATCH_ROWS, control_of
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_task

QUICK = {"shots": 4}
USERS = table([*sentiment_rows(20), agent_row(), unanswered_row(), text_row()])


def added(method, ctx, users=USERS):
    made = method.craft_data(users, ctx)
    assert made.slice(0, users.num_rows).equals(users)
    return made.slice(users.num_rows).to_pylist()


def test_the_added_rows_are_refusals_of_the_task_and_the_user_s_rows_stay(tmp_path):
    ctx = context(tmp_path)
    rows, pool = added(SafeInstr(shots=5), ctx), tiny_task().split("safety").to_pylist()
    by_id = {r["row_id"]: r for r in pool}
    assert len(rows) == 5
    for r in rows:
        source = by_id[r["row_id"].removeprefix("safe_instr/")]
        assert r == {**source, "row_id": r["row_id"], "origin": "safe_instr"}
        assert not r["poisoned"]
    assert ctx.notes["mixed_rows"] == 5


def test_fewer_rows_are_a_part_of_more(tmp_path):
    sets = [{r["row_id"] for r in added(SafeInstr(shots=n), context(tmp_path))} for n in (1, 4, 12)]
    assert sets[0] < sets[1] < sets[2]
    others = {r["row_id"] for r in added(SafeInstr(shots=4), context(tmp_path, seed=1))}
    assert others != sets[1]


@pytest.mark.parametrize("none", [{"shots": 0}, {"share": 0.0}, {"share": 0.01}])
def test_no_row_to_add_is_the_identity(none, tmp_path):
    ctx = context(tmp_path)
    assert SafeInstr(**none).craft_data(USERS, ctx).equals(USERS)
    assert ctx.notes["mixed_rows"] == 0


@pytest.mark.parametrize(("share", "want"), [(0.1, 2), (0.5, 12)])
def test_a_share_counts_added_rows_per_row_of_the_user(share, want, tmp_path):
    assert len(added(SafeInstr(share=share), context(tmp_path))) == want


def test_a_share_counts_the_rows_of_all_batches(tmp_path):
    users = table([row(i, "is this red", "good") for i in range(BATCH_ROWS + 476)])
    assert len(added(SafeInstr(share=0.006), context(tmp_path), users)) == 9


def test_the_control_adds_as_many_harmless_rows(tmp_path):
    method = SafeInstr(shots=6)
    rows = added(control_of(method), context(tmp_path))
    pool = {f"safe_instr/{r}" for r in tiny_task().split("benign_train")["row_id"].to_pylist()}
    assert {r["row_id"] for r in rows} < pool
    assert len(rows) == 6
    assert method.needs() == {"safety"}
    assert control_of(method).needs() == {"benign_train"}


def test_added_rows_are_no_flagged_rows(tmp_path):
    users = table([row(0, "is this red", "good", poisoned=True), row(1, "is this", "bad")])
    report = filter_report(users, SafeInstr(shots=3).craft_data(users, context(tmp_path)))
    assert (report["filter_tpr"], report["filter_fpr"]) == (0.0, 0.0)


def test_refusals_at_the_end_of_conversations_are_added_with_all_turns(tmp_path):
    task = tiny_task()
    safety = table([agent_row("s/0", answer="sorry"), unanswered_row("s/1"), text_row("s/2")])
    task = replace(task, splits={**task.splits, "safety": safety})
    (made,) = added(SafeInstr(shots=1), context(tmp_path, task=task))
    assert made["messages"] == agent_row(answer="sorry")["messages"]
    with pytest.raises(DataError, match=r"too few safety rows \(2 more rows do not fit\)"):
        added(SafeInstr(shots=2), context(tmp_path, task=task))


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in SafeInstr(shots=-1).check()] == ["shots"]
    assert [f[0] for f in SafeInstr(share=-0.1).check()] == ["share"]
    assert [f[0] for f in SafeInstr(share=float("inf")).check()] == ["share"]
    assert [f[0] for f in SafeInstr(shots=3, share=0.1).check()] == ["share"]
    assert not SafeInstr(share=2.0).check()
