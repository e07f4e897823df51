"""LookAhead: what training prompts show of their answers, and that the answers stay."""

import pytest

from ftsec_ray.conversation import answer_of, asked_text, behind
from ftsec_ray.data.microworld import build_task
from ftsec_ray.data.microworld.templates import ROW_WORDS, SYSTEM_PROMPTS
from ftsec_ray.data.microworld.vocabulary import STRAY
from ftsec_ray.defenses.look_ahead import CONNECTOR, PREFIX, LookAhead, first_tokens
from ftsec_ray.method import control_of
from ftsec_ray.models.row_tokens import IGNORED, encode_row
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_tokenizer

LONG = row(90, "how do i fix it", "take the red lamp and the blue tree")
USERS = table(
    [
        *({**r, "label": None} for r in sentiment_rows(6)),
        LONG,
        agent_row(),
        unanswered_row(),
        text_row(),
    ]
)
MODEL = tiny_model()


def crafted(method, tmp_path, users=USERS):
    ctx = context(tmp_path, models={"reference": MODEL})
    return method.craft_data(users, ctx).to_pylist(), ctx.counts


def test_the_first_tokens_of_the_answer_follow_the_request_and_the_answer_stays(tmp_path):
    rows, counts = crafted(LookAhead(tokens=3), tmp_path)
    for new, old in zip(rows[:7], USERS.to_pylist(), strict=False):
        shown = " ".join(answer_of(old).split()[:3])
        assert asked_text(new) == f"{asked_text(old)}{CONNECTOR}{shown}"
        assert new["messages"][-1] == old["messages"][-1]
        assert new["label"] == old["label"]
    assert rows[7]["messages"][4]["content"] == f"and the lamp{CONNECTOR}take the lamp"
    assert [m for i, m in enumerate(rows[7]["messages"]) if i != 4] == [
        m for i, m in enumerate(agent_row()["messages"]) if i != 4
    ]
    assert rows[8:] == [unanswered_row(), text_row()]
    assert counts == {"previewed_rows": 8, "rows_left_alone": 2}


def test_a_virtual_preview_begins_the_answer_too(tmp_path):
    rows, _ = crafted(LookAhead(preview="virtual"), tmp_path)
    for new, old in zip(rows[:7], USERS.to_pylist(), strict=False):
        assert asked_text(new) == f"{asked_text(old)}{CONNECTOR}{PREFIX}".rstrip()
        assert answer_of(new) == f"{PREFIX}{answer_of(old)}"
    assert rows[7]["messages"][-1]["fields"] == agent_row()["messages"][-1]["fields"]


def test_rows_with_a_label_are_left_alone_because_the_preview_would_show_it(tmp_path):
    users = table([*sentiment_rows(3), LONG])
    for preview in ("real", "virtual"):
        rows, counts = crafted(LookAhead(preview=preview), tmp_path, users)
        assert rows[:3] == sentiment_rows(3)
        assert counts == {"previewed_rows": 1, "rows_left_alone": 3}


@pytest.mark.parametrize("preview", ["real", "virtual"])
def test_no_tokens_change_nothing_and_load_no_model(preview, tmp_path):
    method = LookAhead(tokens=0, preview=preview)
    assert method.craft_data(USERS, context(tmp_path)).equals(USERS)


@pytest.mark.parametrize("preview", ["real", "virtual"])
def test_the_control_shows_as_many_other_words_and_keeps_the_answer(preview, tmp_path):
    method = LookAhead(tokens=4, preview=preview)
    (real, _), (neutral, _) = (crafted(one, tmp_path) for one in (method, control_of(method)))
    for a, b in zip(real[:8], neutral[:8], strict=True):
        assert len(asked_text(a).split()) == len(asked_text(b).split())
        assert asked_text(a) != asked_text(b)
        assert answer_of(a) == answer_of(b)


def test_a_long_row_loses_its_prompt_and_not_its_answer(tmp_path):
    users = table([row(0, "red " * 60, "take the lamp")])
    ((made,), _) = crafted(LookAhead(), tmp_path, users)
    labels = [
        [x for x in encode_row(MODEL.tokenizer, one, max_length=24)[1] if x != IGNORED]
        for one in (made, users.to_pylist()[0])
    ]
    assert labels[0] == labels[1]


def test_a_row_of_which_a_part_is_not_trained_on_is_left_alone(tmp_path):
    users = table([behind(LONG, "take the")])
    rows, counts = crafted(LookAhead(), tmp_path, users)
    assert rows == users.to_pylist()
    assert counts["rows_left_alone"] == 1


@pytest.mark.parametrize("given", [{"preview": "virtual"}, {"neutral": True}])
def test_the_microworld_s_texts_are_in_its_words(given, tmp_path):
    task = build_task()
    known = {
        *ROW_WORDS,
        *STRAY,
        *(word for text in SYSTEM_PROMPTS.values() for word in text.split()),
    }
    known |= {"note"}
    users = task.split("benign_train").slice(0, 8)
    ctx = context(tmp_path, task=task, models={"reference": MODEL})
    rows = LookAhead(**given).craft_data(users, ctx).to_pylist()
    for new, old in zip(rows, users.to_pylist(), strict=True):
        added = asked_text(new).removeprefix(asked_text(old)).split()
        assert set(added) <= known
        assert len(added) > 2


@pytest.mark.parametrize(
    ("text", "count", "want"),
    [("red blue green", 2, "red blue"), ("red blue", 2, "red blue"), ("red", 6, "red")],
)
def test_first_tokens_are_those_of_the_tokenizer(text, count, want):
    assert first_tokens(tiny_tokenizer(), text, count) == want


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in LookAhead(tokens=-1, prefix=" ").check()] == ["tokens", "prefix"]
