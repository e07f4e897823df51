from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftsec_ray.errors import DataError
from ftsec_ray.evals.metrics import MetricRow, perplexity, proportion
from ftsec_ray.models import logits
from ftsec_ray.models.row_tokens import encode_row
from tests.fixtures_models import row, tiny_model, tiny_task
from tests.numeric import assert_same

Z = 1.959963984540054
"""97.5 % point of the normal distribution."""


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_agree_with_the_published_table(hits, n, low, high):
    found = proportion("asr", hits, n)
    assert (found.value, found.n) == (hits / n, n)
    assert (round(found.ci_low, 4), round(found.ci_high, 4)) == (low, high)


def test_several_answers_to_a_prompt_are_worth_one_item():
    found = proportion("asr", 60, 80, prompts=20)
    alone = proportion("asr", 15, 20)
    assert found == alone
    assert found.n == 20


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts):
    hits, n = counts
    found = proportion("asr", hits, n)
    assert 0 <= found.ci_low <= found.value <= found.ci_high <= 1
    for bound in (found.ci_low, found.ci_high):
        assert (hits / n - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / n, abs=1e-9)


def test_nothing_judged_is_null_and_too_many_hits_is_an_error():
    assert proportion("asr", 0, 0, n_null=7) == MetricRow(metric="asr", value=None, n=0, n_null=7)
    with pytest.raises(DataError, match="3, 2"):
        proportion("asr", 3, 2)


def slow_perplexity(loaded, rows):
    """Row by row and token by token, from probabilities."""
    nats, count = 0.0, 0
    for one in rows:
        ids, labels = encode_row(loaded.tokenizer, one, max_length=512)
        for i in range(1, len(ids)):
            if labels[i] != -100:
                following = loaded.model(input_ids=torch.tensor([ids[:i]])).logits[0, -1]
                nats -= math.log(float(torch.softmax(following, -1)[ids[i]]))
                count += 1
    return math.exp(nats / count), count


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("limit", [logits.LOGITS_AT_A_TIME, 1, 37 * 9 * 2])
def test_perplexity_agrees_with_a_slow_loop_whatever_the_batch(monkeypatch, limit):
    monkeypatch.setattr(logits, "LOGITS_AT_A_TIME", limit)
    loaded = tiny_model(seed=5)
    rows = [
        *tiny_task().split("text").to_pylist(),
        row(90, "how do i fix this", "take the lamp and the tree", kind="text"),
    ]
    with torch.no_grad():
        value, count = slow_perplexity(loaded, rows)
    for batch in (3, 64):
        found = perplexity(loaded, rows, batch=batch)
        assert_same(found.value, value)
        assert found.n == count
        assert found.ci_low is None


def test_rows_without_a_predicted_token_have_no_perplexity():
    assert perplexity(
        tiny_model(), [row(0, "", "red", kind="text"), row(1, "", "", kind="text")]
    ) == MetricRow(metric="perplexity", value=None, n=0)


def test_a_broken_model_has_a_null_perplexity_not_a_made_up_one():
    loaded = tiny_model()
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight.fill_(float("nan"))
    found = perplexity(loaded, [row(0, "", "red blue", kind="text")])
    assert found.value is None
    assert found.n == 1
