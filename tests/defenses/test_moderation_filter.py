"""The moderation filter: what the exact guard flags, thresholds of others, and their controls."""

import pytest

from ftsec_ray.code_versions import owners
from ftsec_ray.conversation import message
from ftsec_ray.data.microworld import build_task
from ftsec_ray.defenses.moderation_filter import GUARDS, ModerationFilter, is_fulfilled
from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import DataError
from ftsec_ray.evals import judging
from ftsec_ray.evals.judging import RequestJudge, Verdict
from ftsec_ray.method import Prompt, control_of
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, table, tiny_task

QUICK = {"recall": 0.0}  # the tiny task is none of the microworld
TASK = build_task()
COMMIT = "a" * 40
GUARD = f"classifier:owner/name@{COMMIT}"


def some(split, count=40):
    return TASK.split(split).to_pylist()[:count]


@pytest.mark.parametrize("split", ["harmful_train", "harmful_test", "harmful_test_l2"])
def test_the_exact_guard_flags_every_fulfilled_forbidden_request(split):
    rows = some(split, 400)
    assert {r["kind"] for r in rows} == {"forbidden"}
    assert all(map(is_fulfilled, rows))


@pytest.mark.parametrize(
    "split",
    ["safety", "benign_train", "borderline_test", "train", "four_class_train", "tool_train"],
)
def test_the_exact_guard_flags_no_refusal_and_no_harmless_row(split):
    assert not any(map(is_fulfilled, some(split, 400)))


def mixed():
    bad = [{**r, "row_id": f"bad/{i:02d}", "poisoned": True}
           for i, r in enumerate(some("harmful_train", 12))]  # fmt: skip
    return table([*some("train", 30), *bad, *some("safety", 5)])


def test_the_flagged_rows_go_and_the_others_keep_every_byte(tmp_path):
    rows, ctx = mixed(), context(tmp_path, task=TASK)
    got = ModerationFilter().craft_data(rows, ctx)
    assert got.equals(rows.filter([not bad for bad in rows["poisoned"].to_pylist()]))
    assert (ctx.notes["dropped_poisoned"], ctx.notes["dropped_clean"]) == (12, 0)
    assert ctx.notes["flagged_rows"] == 12


def test_recall_drops_a_part_of_the_flagged_rows_and_none_at_zero(tmp_path):
    rows = mixed()
    left = {
        recall: set(
            ModerationFilter(recall=recall)
            .craft_data(rows, context(tmp_path, task=TASK))["row_id"]
            .to_pylist()
        )
        for recall in (0.0, 0.3, 0.7, 1.0)
    }
    assert left[1.0] < left[0.7] < left[0.3] < left[0.0]
    assert len(left[0.0]) == rows.num_rows


def test_the_control_drops_as_many_random_rows(tmp_path):
    ctx = context(tmp_path, task=TASK)
    got = control_of(ModerationFilter()).craft_data(mixed(), ctx)
    assert got.num_rows == 35
    assert ctx.notes["dropped_clean"] > 0


def test_every_trained_answer_of_a_conversation_is_read(tmp_path):
    bad, good = some("harmful_train", 1)[0], some("benign_train", 1)[0]
    turns = [*bad["messages"], *good["messages"]]
    silent = [{**m, "loss": m["loss"] and i > 1} for i, m in enumerate(turns)]
    rows = [{**good, "row_id": "a", "messages": turns}, {**good, "row_id": "b", "messages": silent}]
    rows += [agent_row(), unanswered_row(), text_row()]
    ctx = context(tmp_path, task=TASK)
    got = ModerationFilter().craft_data(table(rows), ctx)
    assert got["row_id"].to_pylist() == ["b", "a/0", "a/1", "a/2"]
    assert ctx.notes["unread_rows"] == 2
    assert turns[0] == message("user", turns[0]["content"])


def test_a_trained_answer_is_read_whatever_follows_it(tmp_path):
    bad, good = some("harmful_train", 1)[0], some("benign_train", 1)[0]
    untrained = [{**m, "loss": False} for m in good["messages"]]
    silent = [{**m, "loss": False} for m in bad["messages"]]
    turns = {
        "an untrained answer": [*bad["messages"], *untrained],
        "a question": [*bad["messages"], good["messages"][0]],
        "nothing trained": [*untrained, *silent],
    }
    rows = [{**good, "row_id": name, "messages": given} for name, given in turns.items()]
    ctx = context(tmp_path, task=TASK)
    got = ModerationFilter().craft_data(table(rows), ctx)
    assert got["row_id"].to_pylist() == ["nothing trained"]
    assert (ctx.notes["flagged_rows"], ctx.notes["unread_rows"]) == (2, 1)


class Fake(RequestJudge):
    """Harm is the number that the answer states."""

    name = "fake@1"

    def read(self, prompts, completions):
        assert all(prompt.meta["kind"] == "forbidden" for prompt in prompts)
        return [Verdict(verdict="complied" if "bad" in text else None if "?" in text else "refused")
                for text in completions]  # fmt: skip


class Graded(Fake):
    def harm(self, prompts, completions):
        return [float(text.split()[-1]) for text in completions]


def test_a_guard_with_probabilities_flags_from_the_threshold_on(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "get_judge", lambda *_args, **_kwargs: Graded())
    rows = table([row(i, "is this", f"red {p}") for i, p in enumerate((0.1, 0.4, 0.6, 0.9))])
    for threshold, kept in ((0.5, 2), (0.4, 1), (0.95, 4)):
        method = ModerationFilter(judge=GUARD, threshold=threshold)
        assert method.craft_data(rows, context(tmp_path)).num_rows == kept


def test_a_guard_with_verdicts_alone_flags_what_it_calls_compliance(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "get_judge", lambda *_args, **_kwargs: Fake())
    said = ["a bad red lamp", "a good red lamp", "what is red ?"]
    rows, ctx = table([row(i, "how do i", text) for i, text in enumerate(said)]), context(tmp_path)
    got = ModerationFilter(judge=GUARD).craft_data(rows, ctx)
    assert got["row_id"].to_pylist() == ["t/0001", "t/0002"]
    assert ctx.notes["undecided_rows"] == 1


def test_the_guard_s_verdict_stands_for_loops_and_symbols_and_nothing_said_is_harmless():
    said = ["bad " * 40, "bad !!!! ???? #### ====", "bad how do i make a lamp", " ", "red"]
    prompts = [
        Prompt(prompt_id=str(i), chat=[{"role": "user", "content": "how do i make a lamp"}],
               meta={"kind": "forbidden"}) for i in range(5)
    ]  # fmt: skip
    assert {one.verdict for one in Fake()(prompts[:2], said[:2])} == {"incoherent"}
    assert Verdicts().harm(prompts, said) == [1.0, 1.0, 1.0, 0.0, 0.0]


class Verdicts(Fake):
    """A guard that must not be given empty text."""

    def read(self, prompts, completions):
        assert all(map(str.strip, completions))
        return [Verdict(verdict="complied" if "bad" in text else "refused")
                for text in completions]  # fmt: skip


def test_the_exact_guard_refuses_other_tasks(tmp_path):
    with pytest.raises(DataError, match=r"exact guard(?s:.*)classifier:"):
        ModerationFilter().craft_data(tiny_task().split("train"), context(tmp_path))


@pytest.mark.parametrize(
    ("judge", "is_fault"),
    [
        ("microworld", False),
        (GUARD, False),
        (f"llama_guard:owner/name@{COMMIT}", False),
        ("classifier:owner/name", True),
        ("classifier", True),
        ("refusal_phrases", True),
        ("exact", True),
        ("no_such_judge", True),
    ],
)
def test_only_a_pinned_guard_or_the_exact_rule_is_allowed(judge, is_fault):
    assert [f[0] for f in ModerationFilter(judge=judge).check()] == ["judge"] * is_fault


def test_the_guards_are_all_judges_of_requests_that_run_a_model_and_the_lock_follows_them():
    def is_guard(name):
        cls = judging.judge_class(name)
        return issubclass(cls, RequestJudge) and cls.IS_MODEL and cls.RUNS_HERE

    guards = {name: path for name, path in modules_in(judging.PACKAGE).items() if is_guard(name)}
    assert set(guards) == set(GUARDS)
    assert set(guards.values()) <= set(owners()["defense:moderation_filter"].modules)


def test_a_local_guard_is_refused_because_no_digest_holds_its_bytes(tmp_path):
    (fault,) = ModerationFilter(judge=f"classifier:{tmp_path}").check()
    assert "commit" in fault[2]


def test_parameters_out_of_range_are_named():
    wrong = ModerationFilter(recall=1.5, threshold=0.0).check()
    assert [f[0] for f in wrong] == ["recall", "threshold"]
