"""ONION: perplexities against a slow loop, which words go, and that untouched rows keep every byte."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftsec_ray import schema
from ftsec_ray.context import TaskData
from ftsec_ray.conversation import asked_text
from ftsec_ray.data.rows import filter_report
from ftsec_ray.defenses.onion import Onion, without_words
from ftsec_ray.errors import DataError
from ftsec_ray.measured import threshold_of
from ftsec_ray.method import control_of
from ftsec_ray.models import text_perplexity
from ftsec_ray.models.chat import render
from ftsec_ray.models.text_perplexity import instruction_of, perplexities
from tests.defenses.shared import context
from tests.fixtures_models import prompts, row, sentiment_rows, table, tiny_model, tiny_task
from tests.numeric import SAME, assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
MODEL = in_float64(tiny_model())
TEXTS = [asked_text(r) for r in sentiment_rows(12)] + [
    "red",
    "cf mn",
    "red blue green stone river cloud lamp tree good bad no yes",
]


def slow_perplexity(ids, first):
    """One text at a time, one token at a time."""
    total, count = 0.0, 0
    for end in range(first, len(ids)):
        with torch.no_grad():
            logits = MODEL.model(torch.tensor([ids[:end]])).logits[0, -1]
        total, count = total - float(logits.log_softmax(-1)[ids[end]]), count + 1
    return math.exp(total / count)


def test_perplexities_equal_a_slow_loop_over_tokens():
    got = perplexities(MODEL, TEXTS)
    for text, value in zip(TEXTS, got, strict=True):
        ids = [
            MODEL.tokenizer.bos_token_id,
            *MODEL.tokenizer(text, add_special_tokens=False)["input_ids"],
        ]
        assert_same(value, slow_perplexity(ids, 1))


def test_perplexities_in_a_chat_count_the_words_of_the_user_alone():
    for text, value in zip(TEXTS[:4], perplexities(MODEL, TEXTS[:4], chat=True), strict=True):
        ids = MODEL.tokenizer(
            render(MODEL.tokenizer, [{"role": "user", "content": text}], generate=False)
        )["input_ids"]
        assert ids[1] == MODEL.tokenizer.convert_tokens_to_ids("<|user|>")
        assert_same(value, slow_perplexity(ids[:-1], 2))


def test_a_perplexity_does_not_depend_on_its_neighbours(monkeypatch):
    together = perplexities(MODEL, TEXTS)
    monkeypatch.setattr(text_perplexity, "BATCH_TOKENS", 1)
    assert_same(perplexities(MODEL, TEXTS), together)


def test_a_score_is_the_drop_in_perplexity_without_the_word():
    prompt = "is this red cf stone"
    (scores,) = Onion().scores(MODEL, [prompt])
    base, *rest = perplexities(
        MODEL,
        [
            prompt,
            "this red cf stone",
            "is red cf stone",
            "is this cf stone",
            "is this red stone",
            "is this red cf",
        ],
    )
    assert_same(np.array(list(scores.values())), np.array([base - other for other in rest]))


def test_the_words_of_the_instruction_are_counted_and_only_scored_where_it_is_broken():
    told, broken = "is this red cf stone", "is cf this red stone"
    with_instruction, whole = (
        Onion().scores(MODEL, [told, broken], "is this "),
        Onion().scores(MODEL, [told, broken]),
    )
    assert list(with_instruction[0]) == [2, 3, 4]
    assert_same(with_instruction[0], {i: whole[0][i] for i in (2, 3, 4)})
    assert list(with_instruction[1]) == [0, 1, 2, 3, 4]
    assert_same(with_instruction[1], whole[1])


@pytest.mark.parametrize(
    ("prompts", "want"),
    [
        (["a b c", "a b d"], "a b "),
        (["a b", "a b c"], "a "),
        (["a bc", "a bd"], "a "),
        (["a:\n\nx", "a:\n\ny z"], "a:\n\n"),
        (["a b", "a b"], ""),
        (["a b"], ""),
        ([], ""),
        (["a b", "c d"], ""),
    ],
)
def test_the_instruction_is_what_all_prompts_begin_with(prompts, want):
    assert instruction_of(prompts) == want


def test_words_at_or_above_the_threshold_go_and_all_else_stays(tmp_path):
    rows = table([row(i, p, "good") for i, p in enumerate(TEXTS)])
    scores = Onion().scores(MODEL, TEXTS)
    threshold = sorted(s for group in scores for s in group.values())[-5]
    got = Onion(threshold=threshold).craft_data(
        rows, context(tmp_path, models={"reference": MODEL})
    )
    assert got.schema.equals(schema.ROWS)
    for text, group, cleaned in zip(TEXTS, scores, prompts(got), strict=True):
        kept = [w for i, w in enumerate(text.split()) if group.get(i, -math.inf) < threshold]
        assert cleaned == " ".join(kept)
    assert got.drop_columns(["messages", "origin"]).equals(
        rows.drop_columns(["messages", "origin"])
    )
    changed = [a != b for a, b in zip(prompts(got), TEXTS, strict=True)]
    assert 0 < sum(changed) <= 5
    assert got["origin"].to_pylist() == ["onion" if hit else "task" for hit in changed]


def test_dropping_keeps_exactly_the_rows_that_stripping_leaves_alone(tmp_path):
    rows = table([row(i, p, "good") for i, p in enumerate(TEXTS)])
    threshold = sorted(s for group in Onion().scores(MODEL, TEXTS) for s in group.values())[-5]
    stripped, dropped = (
        Onion(threshold=threshold, action=action).craft_data(
            rows, context(tmp_path, models={"reference": MODEL})
        )
        for action in ("strip", "drop")
    )
    same = [a == b for a, b in zip(prompts(stripped), TEXTS, strict=True)]
    assert dropped.equals(rows.filter(same))
    assert 0 < dropped.num_rows < rows.num_rows


def test_the_control_takes_as_many_words_out_of_each_prompt_by_chance(tmp_path):
    rows = table([row(i, p, "good") for i, p in enumerate(TEXTS)])
    scores = Onion().scores(MODEL, TEXTS)
    threshold = sorted(s for group in scores for s in group.values())[-9]
    stripped, control = (
        prompts(method.craft_data(rows, context(tmp_path, models={"reference": MODEL})))
        for method in (Onion(threshold=threshold), control_of(Onion(threshold=threshold)))
    )
    words = [[len(text.split()) for text in found] for found in (stripped, control)]
    assert words[0] == words[1]
    assert stripped != control
    for text, left in zip(TEXTS, control, strict=True):
        rest = iter(text.split())
        assert all(word in rest for word in left.split()), "what stays keeps its order"


def test_the_engine_counts_altered_rows_as_caught(tmp_path):
    rows = table(
        [row(0, "is this red cf stone", "good", poisoned=True), row(1, "is this red stone", "good")]
    )
    first, _ = Onion().scores(MODEL, prompts(rows))
    got = Onion(threshold=max(first.values())).craft_data(
        rows, context(tmp_path, models={"reference": MODEL})
    )
    caught = [a != b for a, b in zip(prompts(got), prompts(rows), strict=True)]
    report = filter_report(rows, got)
    assert caught[0]
    assert report["filter_tpr"] == 1.0
    assert report["filter_fpr"] == float(caught[1])


@given(
    st.lists(st.floats(-50, 50).map(lambda x: round(x, 1)), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_the_calibrated_threshold_is_the_smallest_that_few_enough_reach(scores, frac):
    threshold = threshold_of(scores, frac)
    assert sum(s >= threshold for s in scores) <= frac * len(scores) + 1e-6
    lower = [s for s in scores if s < threshold]
    assert not lower or sum(s >= max(lower) for s in scores) > frac * len(scores) - 1e-6


@pytest.mark.parametrize("frac", [0.0, 0.13, 0.5])
def test_calibration_alters_at_most_the_given_share_of_trusted_prompts(frac, tmp_path):
    trusted = tiny_task().split("trusted")
    asked, ctx = prompts(trusted), context(tmp_path, models={"reference": MODEL})
    method = Onion(altered_frac=frac, trusted_rows=32)
    got = method.craft_rows(trusted, method.survey([], ctx), ctx)
    changed = [a != b for a, b in zip(prompts(got), asked, strict=True)]
    # The prompt whose score the threshold was read off lies one digit below it, and the same score
    # in another batch may round to the threshold.
    threshold = ctx.notes["threshold"]
    near = {
        prompt
        for prompt, scores in zip(asked, Onion().scores(MODEL, asked), strict=True)
        if abs(max(scores.values()) - threshold) <= SAME * abs(threshold)
    }
    surely = [hit for hit, prompt in zip(changed, asked, strict=True) if prompt not in near]
    assert len(surely) >= 32 - 4
    assert math.floor(frac * 32) - 4 <= sum(surely) <= frac * 32
    assert sum(changed) <= frac * 32 + 32 - len(surely)
    assert frac == 0.0 or any(changed)


def held_out(splits):
    return TaskData("t", splits, (), "refusal_phrases")


def test_prompts_that_are_tuned_on_or_asked_do_not_calibrate_and_are_counted(tmp_path):
    texts = [f"{prompt} and so" for prompt in TEXTS]
    trusted = table([row(i, text, "good") for i, text in enumerate(texts)])
    splits = {
        "trusted": trusted,
        "harmful_test": table([row(0, f" {texts[1]}  ", "good")]),
        "safety": table([row(0, texts[2], "good")]),
    }
    ctx = context(tmp_path, models={"reference": MODEL}, task=held_out(splits))
    tuned = [
        table([row(0, "red blue", "bad")]),
        table([row(1, texts[0].upper(), "good")]),
    ]
    instruction, threshold = Onion(altered_frac=0.0).survey(iter(tuned), ctx)
    scores = Onion().scores(MODEL, texts[2:], instruction)
    assert_same(threshold, max(max(group.values()) for group in scores))
    assert ctx.notes["trusted_rows"] == len(texts) - 2
    assert ctx.notes["trusted_left_out"] == 2
    (warning,) = ctx.warnings
    assert f"2 of {len(texts)} prompts of split 'trusted'" in warning


def test_a_task_whose_trusted_prompts_are_all_in_use_is_refused(tmp_path):
    rows = tiny_task().split("train")
    ctx = context(tmp_path, models={"reference": MODEL}, task=held_out({"trusted": rows}))
    with pytest.raises(DataError, match=r"split 'trusted' (?s:.*)48(?s:.*)threshold"):
        Onion().survey([rows], ctx)


def test_a_threshold_that_is_given_needs_no_trusted_rows():
    assert "trusted" in Onion().needs()
    assert Onion(trusted_split="mine").needs() == {"reference", "mine"}
    assert Onion(threshold=1.0).needs() == {"reference"}
    assert [f[0] for f in Onion(trusted_split="test").check()] == ["trusted_split"]


@pytest.mark.parametrize(
    ("prompt", "dropped", "want"),
    [
        ("a b c", {1}, "a c"),
        ("a b c", {0}, "b c"),
        ("a b c", {2}, "a b"),
        ("a b c", {1, 2}, "a"),
        ("a b c", {0, 1, 2}, "a b c"),
        ("  a\n\tb  c\n", set(), "  a\n\tb  c\n"),
        ("  a\n\tb  c\n", {1}, "  a\n\tc\n"),
        ("x", {0}, "x"),
        ("", {0}, ""),
        ("a b", {1}, "a"),
    ],
)
def test_removing_words_keeps_the_bytes_of_the_others(prompt, dropped, want):
    assert without_words(prompt, dropped) == want


@given(st.text(alphabet="ab \n\t", max_size=30), st.sets(st.integers(0, 10), max_size=5))
def test_the_words_left_are_those_that_were_not_dropped(prompt, dropped):
    words = prompt.split()
    dropped = {i for i in dropped if i < len(words)}
    left = [w for i, w in enumerate(words) if i not in dropped]
    assert without_words(prompt, dropped).split() == (left or words)


def test_words_behind_the_limit_are_kept(tmp_path):
    prompt = " ".join(["red", "blue"] * 4)
    got = Onion(threshold=-1e9, max_words=3).craft_data(
        table([row(0, prompt, "good")]), context(tmp_path, models={"reference": MODEL})
    )
    assert prompts(got) == [" ".join(prompt.split()[3:])]


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in Onion(altered_frac=2.0, trusted_rows=0, max_words=1).check()] == [
        "altered_frac",
        "trusted_rows",
        "max_words",
    ]
