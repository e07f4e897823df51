"""STRIP: entropies against a loop over single prompts, which words are replaced, which rows go."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.conversation import asked_text, chat_of
from ftsec_ray.defenses import strip
from ftsec_ray.defenses.strip import Strip, important_words, mean_entropies, with_words_at
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.chat import render
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

QUICK = {"warmup_epochs": 1.0, "frr": 0.2, "copies": 2}


def slow_entropy(loaded, chat, labels):
    """One prompt alone, without padding; the label words are single tokens."""
    text = render(loaded.tokenizer, chat, generate=True)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits[0, -1].double().tolist()
    if labels:
        logits = [logits[loaded.tokenizer.convert_tokens_to_ids(word)] for word in labels]
    weights = [math.exp(x - max(logits)) for x in logits]
    shares = [w / sum(weights) for w in weights]
    return -sum(p * math.log(p) for p in shares if p > 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("labels", [(), ("good", "bad")])
def test_a_row_s_entropy_is_the_mean_over_its_own_copies(labels, monkeypatch):
    loaded = in_float64(tiny_model())
    rows = sentiment_rows(12)
    chats = {str(i): [chat_of(r) for r in rows[3 * i : 3 * i + 3]] for i in range(4)}
    wanted = {n: np.mean([slow_entropy(loaded, c, labels) for c in cs]) for n, cs in chats.items()}
    assert_same(mean_entropies(loaded, chats, labels), wanted)
    monkeypatch.setattr(strip, "BATCH", 1)
    assert_same(mean_entropies(loaded, chats, labels), wanted)


def test_a_probability_of_zero_adds_nothing():
    loaded = tiny_model()
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1e6)
    (value,) = mean_entropies(loaded, {"a": [chat_of(row(0, "is this red", "good"))]}, ()).values()
    assert value == 0.0


def test_rare_and_repeated_words_of_a_prompt_come_first():
    found = important_words(["the red red lamp", "the blue tree", "the lamp", " ", "the lamp"])
    assert found["the red red lamp"] == ["red", "lamp", "the"]
    assert found["the lamp"] == ["lamp", "the"]
    assert set(found) == {"the red red lamp", "the blue tree", "the lamp"}
    n, have = 3, {"blue": 1, "tree": 1, "the": 3}
    weights = {w: math.log((1 + n) / (1 + k)) + 1 for w, k in have.items()}
    assert found["the blue tree"] == sorted(weights, key=lambda w: -weights[w])


def test_replacing_words_keeps_all_other_bytes():
    assert with_words_at("  a\n\tb  c\n", {1: "X", 2: "Y Z"}) == "  a\n\tX  Y Z\n"
    assert with_words_at("  a\n", {}) == "  a\n"


def copies(method, one, tmp_path, instruction="", words=None):
    words = words or {"p q": ["p", "q"], "s": ["s"]}
    made = method._copies(one, instruction, words, context(tmp_path))
    return [chat[-1]["content"].split() for chat in made]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.5, 4), (1.0, 8)])
def test_so_many_words_are_replaced_and_never_those_of_the_instruction(share, count, tmp_path):
    one = row(0, "is this a b c d e f g h", "good")
    made = copies(Strip(replaced=share, copies=80), one, tmp_path, "is this ")
    places = Counter()
    for words in made:
        assert words[:2] == ["is", "this"]
        changed = [i for i, (a, b) in enumerate(zip(words[2:], "abcdefgh", strict=True)) if a != b]
        assert len(changed) == count
        assert {words[2 + i] for i in changed} <= {"p", "q", "s"}
        assert {words[2 + i] for i in changed} in ({"p", "q"}, {"s"}, {"p"}, set())
        places.update(changed)
    assert len(places) == (8 if count else 0)


def test_a_row_takes_no_words_of_its_own_prompt(tmp_path):
    made = copies(Strip(replaced=1.0, copies=20), row(0, "p q", "good"), tmp_path)
    assert made == [["s", "s"]] * 20


@pytest.mark.usefixtures("float64")
def test_rows_below_the_quantile_of_the_trusted_rows_go(tmp_path):
    loaded, given = in_float64(tiny_model()), sentiment_rows(30)
    method = Strip(frr=0.25, copies=3, warmup_epochs=0.0, trusted_rows=16)
    ctx = context(tmp_path, models={"reference": loaded})
    got = method.craft_data(table(given), ctx)
    trusted = ctx.shuffled("trusted", "strip")[:16]
    assert ctx.notes["instruction"] == "is this "
    words = important_words([asked_text(r).removeprefix("is this ") for r in trusted])

    def slow(one):
        chats = method._copies(one, "is this ", words, ctx)
        return np.mean([slow_entropy(loaded, chat, ("good", "bad")) for chat in chats])

    limit = sorted(slow(r) for r in trusted)[4]
    assert_same(ctx.notes["label_threshold_nats"], limit)
    wanted = [r["row_id"] for r in given if slow(r) >= limit * (1 - 1e-9)]
    assert got["row_id"].to_pylist() == wanted
    assert 0 < ctx.notes["dropped_rows"] == 30 - len(wanted)


def test_the_control_drops_as_many_rows_at_random(tmp_path):
    method = Strip(frr=0.4, copies=2, warmup_epochs=0.0)
    left = [
        one.craft_data(
            table(sentiment_rows(30)), context(tmp_path, models={"reference": tiny_model()})
        )
        for one in (method, control_of(method))
    ]
    assert left[0].num_rows == left[1].num_rows < 30
    assert not left[0].equals(left[1])


def test_no_false_rejection_drops_nothing_and_loads_no_model(tmp_path):
    rows = table(sentiment_rows(20))
    assert Strip(frr=0.0).craft_data(rows, context(tmp_path)).equals(rows)
    assert Strip(frr=0.0).keeps_rows()


def test_rows_that_cannot_be_read_stay_and_conversations_and_free_answers_are_read(tmp_path):
    odd = [agent_row(), unanswered_row(), text_row(), row(99, "is this " + "red " * 300, "good")]
    rows = table([*sentiment_rows(8), *odd])
    ctx = context(tmp_path, models={"reference": tiny_model()})
    got = Strip(frr=1.0, copies=2, warmup_epochs=0.0).craft_data(rows, ctx)
    assert ctx.notes["unread_rows"] == 2
    assert {"a/2", "t/0099"} <= set(got["row_id"].to_pylist())


def test_trusted_rows_in_use_are_left_out_and_too_few_are_refused(tmp_path):
    task = tiny_task()
    trusted = task.split("trusted").to_pylist()
    users = table([{**r, "row_id": f"u/{i}"} for i, r in enumerate(trusted[:30])])
    ctx = context(tmp_path, models={"reference": tiny_model()})
    Strip(warmup_epochs=0.0, copies=1).craft_data(users, ctx)
    assert (ctx.notes["trusted_rows"], ctx.notes["trusted_left_out"]) == (2, 30)
    task = replace(task, splits={**task.splits, "trusted": table(trusted[:31])})
    ctx = context(tmp_path, models={"reference": tiny_model()}, task=task)
    with pytest.raises(DataError, match="too few trusted rows"):
        Strip(warmup_epochs=0.0).craft_data(users, ctx)


def free(count, start=0):
    """Rows without a label, whose entropies lie over the whole vocabulary."""
    return [
        {**row(start + i, asked_text(r), "take the lamp"), "row_id": f"f/{start + i}"}
        for i, r in enumerate(sentiment_rows(start + count)[start:])
    ]


def with_trusted(rows):
    return replace(tiny_task(), splits={**tiny_task().splits, "trusted": table(rows)})


def test_rows_with_and_without_a_label_have_thresholds_of_their_own(tmp_path):
    trusted = tiny_task().split("trusted").to_pylist()[:16]
    # without labels the entropy is near ln 37, with two labels it is at most ln 2
    others = [{**r, "row_id": f"g/{i}", "label": None} for i, r in enumerate(trusted[:12])]
    task = with_trusted([*others, *trusted[12:]])
    users = table([*sentiment_rows(12), *free(12)])
    ctx = context(tmp_path, models={"reference": tiny_model()}, task=task)
    got = Strip(frr=0.3, copies=2, warmup_epochs=0.0).craft_data(users, ctx)
    assert ctx.notes["label_threshold_nats"] <= math.log(2) < ctx.notes["text_threshold_nats"]
    left = Counter(name[0] for name in got["row_id"].to_pylist())
    assert left["t"] > 0, "no row with a label is compared with rows without one"
    assert left["f"] > 0
    assert ctx.notes["uncalibrated_rows"] == 0


def test_a_kind_of_row_without_trusted_rows_is_kept_and_counted(tmp_path):
    ctx = context(tmp_path, models={"reference": tiny_model()})
    users = table([*sentiment_rows(12), *free(5)])
    got = Strip(frr=1.0, copies=2, warmup_epochs=0.0).craft_data(users, ctx)
    assert {r["row_id"] for r in free(5)} <= set(got["row_id"].to_pylist())
    assert ctx.notes["uncalibrated_rows"] == 5
    assert "text_threshold_nats" not in ctx.notes
    assert any("5 rows are kept" in text for text in ctx.warnings)


def test_trusted_rows_that_all_ask_the_same_are_refused(tmp_path):
    same = [{**r, "row_id": f"s/{i}"} for i, r in
            enumerate([tiny_task().split("trusted").to_pylist()[0]] * 4)]  # fmt: skip
    ctx = context(tmp_path, models={"reference": tiny_model()}, task=with_trusted(same))
    with pytest.raises(DataError, match="ask the same"):
        Strip(warmup_epochs=0.0).craft_data(table(sentiment_rows(8)), ctx)


def test_the_model_that_scores_has_learned_the_rows(tmp_path):
    loaded = tiny_model()
    ctx = context(tmp_path, models={"reference": loaded})
    ctx.training = replace(ctx.training, learning_rate=0.02)
    rows = table([{**r, **row(i, asked_text(r), "good", label="good")}
                  for i, r in enumerate(sentiment_rows(32))])  # fmt: skip
    Strip(warmup_epochs=2.0, copies=1).craft_data(rows, ctx)
    plain = context(tmp_path / "plain", models={"reference": loaded})
    Strip(warmup_epochs=0.0, copies=1).craft_data(rows, plain)
    assert ctx.notes["label_trusted_mean_nats"] < plain.notes["label_trusted_mean_nats"]
    assert ctx.notes["warm_up_steps"] == 16


def test_parameters_out_of_range_are_named():
    wrong = Strip(frr=2.0, replaced=-1.0, copies=0, trusted_rows=1, warmup_epochs=-1.0).check()
    assert [f[0] for f in wrong] == ["frr", "replaced", "copies", "trusted_rows", "warmup_epochs"]
