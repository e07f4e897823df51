"""The loss of held-out answers against one unpadded pass per row, and its interval against clustered regression."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.api import OLS

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import message
from ftsec_ray.evals.answer_loss import answer_loss
from ftsec_ray.evals.ask import ask
from ftsec_ray.evals.metrics import MetricRow
from ftsec_ray.evals.probes import default_probes
from ftsec_ray.models.generator import Generator
from tests.fixtures_models import row, table, tiny_model, tiny_task
from tests.numeric import assert_same

CONFIG = EvaluationConfig(prompts=20, perplexity_rows=0)


def task_of(rows, **changes):
    task = tiny_task()
    splits = {**task.splits, "test": table(rows)}
    return replace(task, splits=splits, **{"labels": (), **changes})


def free_text():
    answers = [
        "take the lamp",
        "red and blue stone is good",
        "no",
        "the river and the cloud is this",
    ]
    rows = [
        row(i, f"how do i make {thing}", answers[(i * 7) % 4])
        for i, thing in enumerate(["stone", "river", "cloud", "lamp", "tree", "stone lamp"])
    ]
    turns = [
        message("user", "how do i fix this"),
        message("assistant", "take the red lamp and the tree", loss=False),
        message("user", "and how"),
        message("assistant", "be careful", loss=True),
    ]
    return [*rows, row(90, "", "", messages=turns)]


def token_losses(loaded, rows):
    """Per row, nats of every trained token: the text of the template, one row at a time."""
    tokenizer, found = loaded.tokenizer, []
    for one in rows:
        ids, trained = [], []
        for m in one["messages"]:
            head = tokenizer(f"<|{m['role']}|>", add_special_tokens=False)["input_ids"]
            body = tokenizer(f"{m['content']} <|end|>", add_special_tokens=False)["input_ids"]
            ids += head + body
            is_trained = m["role"] == "assistant" and m["loss"]
            trained += [False] * len(head) + [is_trained] * len(body)
        ids, trained = [tokenizer.bos_token_id, *ids], [False, *trained]
        with torch.no_grad():
            logprobs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([-float(logprobs[i - 1, ids[i]]) for i in range(len(ids)) if trained[i]])
    return found


@pytest.mark.parametrize("batch", [2, 64])
def test_it_is_the_mean_over_trained_tokens_with_rows_as_clusters(float64, batch):
    loaded, rows = tiny_model(seed=4), free_text()
    (metric,), left_out = answer_loss(loaded, task_of(rows), CONFIG, batch=batch)
    losses = token_losses(loaded, rows)
    flat = np.concatenate([np.array(one) for one in losses])
    assert (metric.metric, metric.n, left_out) == ("answer_loss", len(flat), {})
    assert len(losses[-1]) == 3, "of two answers one is trained: be careful <|end|>"
    assert_same(metric.value, flat.mean())
    clusters = np.repeat(np.arange(len(losses)), [len(one) for one in losses])
    fit = OLS(flat, np.ones(len(flat))).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    half = stats.norm.ppf(0.975) * fit.bse[0]
    assert metric.ci_low == pytest.approx(max(0.0, flat.mean() - half), rel=1e-9)
    assert metric.ci_high == pytest.approx(flat.mean() + half, rel=1e-9)


def test_tasks_that_have_a_clean_accuracy_have_no_answer_loss():
    loaded = tiny_model()
    assert answer_loss(loaded, tiny_task(), CONFIG, batch=8) == ([], {})
    calls = [row(i, "how", "fix the lamp", kind="tool") for i in range(3)]
    assert answer_loss(loaded, task_of(calls), CONFIG, batch=8) == ([], {})
    without = replace(tiny_task(), labels=(), splits={"train": tiny_task().splits["train"]})
    assert answer_loss(loaded, without, CONFIG, batch=8) == ([], {})


def test_rows_beyond_the_positions_are_left_out_and_counted():
    loaded, rows = tiny_model(), free_text()
    longer = [*rows, row(91, "red " * 300, "blue")]
    (metric,), left_out = answer_loss(loaded, task_of(longer), CONFIG, batch=8)
    assert left_out == {"answer_loss": 1}
    assert metric == answer_loss(loaded, task_of(rows), CONFIG, batch=8)[0][0]


def test_one_row_has_no_interval_and_none_no_value():
    loaded = tiny_model()
    (metric,), _ = answer_loss(loaded, task_of([row(0, "how", "red lamp")]), CONFIG, batch=8)
    assert (metric.n, metric.ci_low, metric.ci_high) == (3, None, None)
    (nothing,), _ = answer_loss(loaded, task_of([row(0, "how", "")]), CONFIG, batch=8)
    assert nothing == MetricRow(metric="answer_loss", value=None, n=0)


def test_a_cell_of_free_text_is_measured_where_the_model_is():
    loaded, task = tiny_model(), task_of(free_text())
    answers = ask(
        Generator(loaded), task, default_probes(task, CONFIG), CONFIG, runtime=Runtime(eval_batch=8)
    )
    assert [metric.metric for metric in answers.measured] == ["answer_loss"]
