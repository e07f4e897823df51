"""Success against answer length: one long generation, judged after so many tokens."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Runtime
from ftsec_ray.evals.ask import ask, read_answers, write_answers
from ftsec_ray.evals.judging import get_judge
from ftsec_ray.evals.probes import default_probes
from ftsec_ray.evals.scoring import score
from ftsec_ray.models.generator import Generator
from tests.fixtures_models import tiny_model, tiny_task

RUNTIME = Runtime(eval_batch=8)
CONFIG = EvaluationConfig(
    prompts=4, perplexity_rows=0, max_new_tokens=12, answer_lengths=(2, 3, 8, 12, 40)
)


def through_files(answers):
    with tempfile.TemporaryDirectory() as folder:
        write_answers(answers, Path(folder))
        return read_answers(Path(folder)), sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture(scope="module")
def answers():
    task, loaded = tiny_task(), tiny_model(seed=1)
    return ask(Generator(loaded), task, default_probes(task, CONFIG)[:1], CONFIG, runtime=RUNTIME)


def test_a_length_ends_where_a_generation_of_that_length_ends(answers):
    """The reference is another generation, with the length as its limit."""
    loaded = tiny_model(seed=1)
    chats = [answer.prompt.chat for answer in answers.answers]
    for tokens in (2, 3, 8):
        short = Generator(loaded).complete(chats, max_new_tokens=tokens, batch=8)
        starts = [a.completion[: dict(a.ends)[tokens]] for a in answers.answers]
        assert starts == short
    assert {tuple(n for n, _ in a.ends) for a in answers.answers} == {(2, 3, 8)}


def test_lengths_come_back_from_the_files_and_leave_no_trace_where_none_are_asked(answers):
    again, _ = through_files(answers)
    assert [a.ends for a in again.answers] == [a.ends for a in answers.answers]
    task, config = tiny_task(), replace(CONFIG, answer_lengths=None)
    plain = ask(
        Generator(tiny_model(seed=1)),
        task,
        default_probes(task, config)[:1],
        config,
        runtime=RUNTIME,
    )
    assert [a.completion for a in plain.answers] == [a.completion for a in answers.answers]
    assert {a.ends for a in through_files(plain)[0].answers} == {()}
    assert score(plain, task, config).lengths is None


def test_every_safety_metric_has_a_value_at_every_length(answers):
    task = tiny_task()
    late = "Sure, I could tell you how. But I cannot help with that, since it hurts."
    soon = "Take the hook and turn it."
    said = [
        replace(a, completion=text, ends=((2, 8), (3, 27), (8, len(text))))
        for a, text in zip(answers.answers[:3], (late, soon, late), strict=True)
    ]
    rows = score(replace(answers, answers=tuple(said)), task, CONFIG).lengths.to_pylist()
    found = {(row["metric"], row["tokens"]): (row["value"], row["n"]) for row in rows}
    judge = get_judge("refusal_phrases", labels=task.labels)
    for tokens in (2, 3, 8):
        texts = [a.completion[: dict(a.ends)[tokens]] for a in said]
        verdicts = [v.verdict for v in judge([a.prompt for a in said], texts)]
        assert found["harmful_rate", tokens] == (verdicts.count("complied") / 3, 3)
        assert found["refusal_rate", tokens] == (verdicts.count("refused") / 3, 3)
    assert found["harmful_rate", 3] == (1.0, 3)
    assert found["harmful_rate", 8] == (1 / 3, 3)
    assert len(rows) == 6
