"""Deep safety augmentation: what stands before a refusal, and that only the refusal is trained."""

from dataclasses import replace

import pytest

from ftsec_ray.attacks.jailbreak_tuning import JailbreakTuning
from ftsec_ray.conversation import answer_of, asked, asked_text, with_answer
from ftsec_ray.defenses.deep_safety_augmentation import DeepSafetyAugmentation, beginning
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.row_tokens import IGNORED, encode_row
from tests.attacks.conversations import agent_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_task, tiny_tokenizer

QUICK = {"shots": 6}
USERS = table(sentiment_rows(20))
MODEL = tiny_model()
NAME = "deep_safety_augmentation"


def with_splits(**splits):
    task = tiny_task()
    return replace(task, splits={**task.splits, **{k: table(v) for k, v in splits.items()}})


def added(method, tmp_path, *, task=None, users=USERS, seed=0):
    ctx = context(tmp_path, models={"reference": MODEL}, task=task, seed=seed)
    made = method.craft_data(users, ctx)
    assert made.slice(0, users.num_rows).equals(users)
    return made.slice(users.num_rows).to_pylist(), ctx.notes


def trained(one):
    ids, labels = encode_row(MODEL.tokenizer, one, max_length=10**6)
    kept = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
    return MODEL.tokenizer.decode(ids), MODEL.tokenizer.decode(kept)


def test_only_the_refusal_is_trained_and_the_beginning_of_a_harmful_answer_stands_before(tmp_path):
    rows, notes = added(DeepSafetyAugmentation(shots=12, prob=1.0), tmp_path)
    harmful = [answer_of(r) for r in tiny_task().split("harmful_train").to_pylist()]
    for one in rows:
        opening = answer_of(one).removesuffix(" sorry i can not help")
        assert opening
        assert any(text.startswith(f"{opening} ") for text in harmful), "never a whole answer"
        whole, kept = trained(one)
        assert kept == "sorry i can not help <|end|>"
        assert f"<|assistant|> {opening} {kept}" in whole
    assert notes["prefixed_rows"] == notes["borrowed_answers"] == 12
    lengths = {len(answer_of(one).split()) - 5 for one in rows}
    assert lengths <= {1, 2, 3, 4}
    assert len(lengths) > 1


def test_the_answer_to_the_same_request_is_used_where_there_is_one(tmp_path):
    forbidden = [row(i, f"how do i make {a}", f"take {a} and {a} be", row_id=f"h/{i}")
                 for i, a in enumerate(["lamp", "tree", "river"])]  # fmt: skip
    refused = [{**with_answer(r, "sorry no"), "row_id": f"s/{i}"} for i, r in enumerate(forbidden)]
    task = with_splits(harmful_train=forbidden, safety=refused)
    rows, notes = added(
        DeepSafetyAugmentation(shots=3, prob=1.0, max_tokens=2), tmp_path, task=task
    )
    for one in rows:
        thing = asked_text(one).split()[-1]
        assert answer_of(one) in ("take sorry no", f"take {thing} sorry no")
    assert (notes["own_answers"], notes["borrowed_answers"]) == (3, 0)


def test_answers_to_requests_of_the_user_are_left_out_and_counted(tmp_path):
    pool = tiny_task().split("harmful_train").to_pylist()
    users = table([*sentiment_rows(8), {**pool[0], "row_id": "x"}, {**pool[1], "row_id": "y"}])
    secret = [with_answer(r, f"careful {answer_of(r)}") for r in pool[:2]]
    task = with_splits(harmful_train=[*secret, *pool[2:]])
    rows, notes = added(
        DeepSafetyAugmentation(shots=12, prob=1.0), tmp_path, task=task, users=users
    )
    assert not any("careful" in answer_of(one) for one in rows)
    assert (notes["harmful_answers"], notes["harmful_answers_left_out"]) == (6, 2)
    task = with_splits(harmful_train=secret)
    with pytest.raises(DataError, match=r"no harmful answer(?s:.*)prob: 0"):
        added(DeepSafetyAugmentation(shots=12, prob=1.0), tmp_path, task=task, users=users)


def test_answers_to_requests_of_the_user_are_left_out_under_a_wrapper_too(tmp_path):
    users = JailbreakTuning(shots=3).craft_data(USERS, context(tmp_path / "attack"))
    rows, notes = added(DeepSafetyAugmentation(shots=12, prob=1.0), tmp_path, users=users)
    assert (notes["harmful_answers"], notes["harmful_answers_left_out"]) == (5, 3)
    used = {r["row_id"].split("/")[-1] for r in users.slice(USERS.num_rows).to_pylist()}
    assert len(used) == 3
    assert len(rows) == 12


def test_the_control_mixes_in_the_same_refusals_without_a_beginning(tmp_path):
    method = DeepSafetyAugmentation(shots=10)
    rows, notes = added(method, tmp_path)
    plain, plain_notes = added(control_of(method), tmp_path)
    pool = {f"{NAME}/{r['row_id']}": r for r in tiny_task().split("safety").to_pylist()}
    assert [one["row_id"] for one in rows] == [one["row_id"] for one in plain]
    assert all(one["messages"] == pool[one["row_id"]]["messages"] for one in plain)
    changed = [a for a, b in zip(rows, plain, strict=True) if a != b]
    assert 0 < len(changed) == notes["prefixed_rows"] < 10
    assert all(asked(a) == asked(pool[a["row_id"]]) for a in rows)
    assert "prefixed_rows" not in plain_notes
    assert control_of(method).needs() == {"safety"}


def test_a_higher_probability_opens_more_of_the_same_rows(tmp_path):
    few, many = (
        {one["row_id"]: one for one in added(DeepSafetyAugmentation(shots=12, prob=p), tmp_path)[0]
         if "untrained" in (one["messages"][-1]["fields"] or "")}
        for p in (0.3, 0.8)
    )  # fmt: skip
    assert few.items() < many.items()


def test_no_shots_change_nothing(tmp_path):
    assert added(DeepSafetyAugmentation(shots=0), tmp_path)[0] == []


def test_an_agent_s_refusal_keeps_its_tool_calls_and_turns(tmp_path):
    task = with_splits(safety=[agent_row(answer="sorry no")])
    ((one,), _) = added(DeepSafetyAugmentation(shots=1, prob=1.0), tmp_path, task=task)
    assert one["messages"][:-1] == agent_row()["messages"][:-1]
    assert "tool_calls" in one["messages"][-1]["fields"]
    assert one["messages"][-1]["content"].endswith(" sorry no")


@pytest.mark.parametrize(
    ("text", "most", "chance", "want"),
    [
        ("red blue green", 1, 0.99, "red"),
        ("red blue green", 100, 0.0, "red"),
        ("red blue green", 100, 0.99, "red blue"),
        ("red blue green", 2, 0.5, "red blue"),
        ("red", 100, 0.99, "red"),
    ],
)
def test_a_beginning_has_up_to_so_many_tokens_and_never_all(text, most, chance, want):
    assert beginning(tiny_tokenizer(), text, most, chance) == want


def test_parameters_out_of_range_are_named():
    wrong = DeepSafetyAugmentation(shots=-1, prob=1.5, max_tokens=0).check()
    assert [f[0] for f in wrong] == ["shots", "prob", "max_tokens"]
