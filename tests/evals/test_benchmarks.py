"""Benchmarks of lm-eval on a model in memory: every document's outcome against a forward pass of our own."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from dataclasses import replace

import pytest
import torch
from scipy import stats

from ftsec_ray.context import LoadedModel, ModelInfo, Runtime, StageContext
from ftsec_ray.defenses.self_reminder import SelfReminder
from ftsec_ray.errors import StageError
from ftsec_ray.measured import wilson
from ftsec_ray.models.chat import render
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.ladder import build_model, build_tokenizer
from ftsec_ray.schema import METRICS
from ftsec_ray.stages.benchmark import metric_of
from tests.fixtures_models import tiny_task

pytest.importorskip("lm_eval", reason="needs the extra `benchmarks`")

from ftsec_ray.evals import benchmarks
from ftsec_ray.evals.benchmarks import ask_benchmark, write_benchmark

LABELS = ["good", "bad", "neither good"]
QUESTIONS = [
    f"is this review {word} ? the {thing} was {how} ."
    for word in ("good", "bad")
    for thing in ("story", "lamp", "river", "stone")
    for how in ("cold", "red", "bright")
]
CHOOSE = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
"""
SAY = """
task: sayings
dataset_path: json
dataset_kwargs: {data_files: sayings.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def loaded():
    tokenizer = build_tokenizer([*QUESTIONS, *LABELS])
    with torch.random.fork_rng():
        model = build_model("0.2m", seed=3, vocab_size=len(tokenizer)).eval()
        torch.manual_seed(1)
        for weight in model.parameters():  # so that answers differ between questions
            weight.data *= 3 if weight.ndim > 1 else 1
    count = sum(weight.numel() for weight in model.parameters())
    return LoadedModel(
        model, tokenizer, ModelInfo(name="l", family="l", parameters=count, aligned=True)
    )


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    """Writes a task and its documents into a folder that is not the working one."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(text, name, rows):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / f"{name}.yaml")

    return write


def documents():
    return [
        {"question": text, "choices": LABELS, "answer": i % 3} for i, text in enumerate(QUESTIONS)
    ]


def asked(generator, file, *, limit=None, batch=5):
    return ask_benchmark(
        generator,
        file,
        limit=limit,
        batch=batch,
        metric_of=lambda task, measure: metric_of(f"benchmark:{task}:{measure}"),
    )


def reference(loaded, prompts, *, delimiter):
    """Log-probability of every label behind every prompt: one unpadded float64 pass for each."""
    model, tokenizer = loaded.model.double(), loaded.tokenizer
    try:
        rows = []
        for prompt in prompts:
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            rows.append([])
            for label in LABELS:
                ids = tokenizer(prompt + delimiter + label, add_special_tokens=False)["input_ids"]
                assert ids[: len(head)] == head
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                tail = range(len(head), len(ids))
                rows[-1].append(sum(float(logprobs[i - 1, ids[i]]) for i in tail))
        return torch.tensor(rows, dtype=torch.float64)
    finally:
        model.float()


def outcomes(answer, measure):
    return [row["value"] for row in answer.samples if row["measure"] == measure]


def expected(scores, documents):
    """0 or 1 per document, for which no two labels are as good as equal."""
    best = scores.topk(2, dim=-1).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-4
    return [
        float(choice == one["answer"])
        for choice, one in zip(scores.argmax(-1).tolist(), documents, strict=True)
    ]


@pytest.mark.parametrize("text", [CHOOSE, SAY])
def test_a_model_that_was_asked_is_let_go(task_file, text):
    path = task_file(text, "words" if text == CHOOSE else "sayings", documents())
    tokenizer = build_tokenizer([*QUESTIONS, *LABELS])
    model = build_model("0.2m", seed=3, vocab_size=len(tokenizer)).eval()
    info = ModelInfo(name="l", family="l", parameters=1, aligned=True)
    kept = weakref.ref(model)
    generator = Generator(LoadedModel(model, tokenizer, info))
    gc.collect()
    gc.disable()  # as in a large process, where the collector seldom looks at all objects
    try:
        asked(generator, path, limit=2)
        del generator, model
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("aligned", [True, False])
def test_multiple_choice_counts_what_a_forward_pass_of_each_label_says(loaded, task_file, aligned):
    loaded = replace(loaded, info=replace(loaded.info, aligned=aligned))
    rows = documents()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    side = loaded.tokenizer.padding_side
    answer = asked(Generator(loaded), task_file(CHOOSE, "words", rows))
    assert all(torch.equal(before[name], one) for name, one in loaded.model.state_dict().items())
    assert loaded.tokenizer.padding_side == side
    chats = [[{"role": "user", "content": one["question"]}] for one in rows]
    prompts = (
        [render(loaded.tokenizer, chat, generate=True) for chat in chats] if aligned else QUESTIONS
    )
    scores = reference(loaded, prompts, delimiter="" if aligned else " ")
    assert outcomes(answer, "acc") == expected(scores, rows)
    lengths = torch.tensor([float(len(label)) for label in LABELS], dtype=torch.float64)
    assert outcomes(answer, "acc_norm") == expected(scores / lengths, rows)
    hits = sum(expected(scores, rows))
    assert 0 < hits < len(rows)
    acc, acc_norm = answer.metrics
    assert (acc.metric, acc_norm.metric) == ("benchmark:words:acc", "benchmark:words:acc_norm")
    assert (acc.value, acc.n, acc.n_null) == (hits / len(rows), len(rows), None)
    assert (acc.ci_low, acc.ci_high) == pytest.approx(wilson(hits / len(rows), len(rows)))
    assert answer.notes["chat_template"] is aligned
    assert answer.notes["task_versions"] == {"words": 1.5}
    assert answer.warnings == ()


def test_generated_answers_are_those_of_our_own_generator(loaded, task_file):
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    said = Generator(loaded).complete(chats, max_new_tokens=8)
    assert len(set(said)) > 3
    rows = [
        {"question": text, "answer": answer if i % 2 else "something else"}
        for i, (text, answer) in enumerate(zip(QUESTIONS, said, strict=True))
    ]
    answer = asked(Generator(loaded), task_file(SAY, "sayings", rows))
    responses = [json.loads(row["response"])[0] for row in answer.samples]
    assert [text.strip() for text in responses] == said
    # lm-eval leaves spaces around an answer, and then it is not the one that was wanted
    wanted = [float(i % 2 and text == said[i]) for i, text in enumerate(responses)]
    assert outcomes(answer, "exact_match") == wanted
    (metric,) = answer.metrics
    assert 6 <= sum(wanted) <= 12
    assert (metric.metric, metric.value) == ("benchmark:sayings:exact_match", sum(wanted) / 24)


def test_answers_stand_behind_the_prefix_of_a_defense(loaded, task_file):
    rows, prefix = documents(), "the river was good ."
    served = replace(Generator(loaded), prefix=prefix)
    chats = [[{"role": "user", "content": one["question"]}] for one in rows]
    prompts = [render(loaded.tokenizer, chat, generate=True) + prefix for chat in chats]
    scores = reference(loaded, prompts, delimiter=" ")
    chosen = asked(served, task_file(CHOOSE, "words", rows))
    assert outcomes(chosen, "acc") == expected(scores, rows)
    plain = asked(Generator(loaded), task_file(CHOOSE, "words", rows))
    assert outcomes(chosen, "acc") != outcomes(plain, "acc")
    said = served.complete(chats, max_new_tokens=8)
    answers = [{"question": text, "answer": "x"} for text in QUESTIONS]
    answer = asked(served, task_file(SAY, "sayings", answers))
    assert [json.loads(row["response"])[0].strip() for row in answer.samples] == said
    raw = replace(served, loaded=replace(loaded, info=replace(loaded.info, aligned=False)))
    assert len(asked(raw, task_file(CHOOSE, "words", rows), limit=2).warnings) == 1


def test_limit_takes_the_first_documents_and_the_files_hold_what_results_take(
    loaded, task_file, tmp_path
):
    from pyarrow import parquet

    rows = documents()
    answer = asked(Generator(loaded), task_file(CHOOSE, "words", rows), limit=7)
    assert [metric.n for metric in answer.metrics] == [7, 7]
    assert answer.notes["documents"] == {"words": {"original": 24, "effective": 7}}
    out = tmp_path / "out"
    out.mkdir()
    write_benchmark(answer, out)
    kept = parquet.read_table(out / "metrics.parquet")
    assert [row["metric"] for row in kept.to_pylist()] == [m.metric for m in answer.metrics]
    assert kept.schema.names == ["metric", "value", "n", "n_null", "ci_low", "ci_high"]
    assert parquet.read_table(out / "samples.parquet").num_rows == 14
    assert json.loads((out / "benchmark.json").read_text())["versions"] == {"words": 1.5}


def test_a_batch_holds_no_more_logits_than_fit_into_memory(loaded, task_file, monkeypatch):
    """With a vocabulary of 262,144 words, a batch of 64 prompts of 80 tokens takes 5 GiB, three
    times over.
    """
    most, seen = 60 * loaded.model.config.vocab_size, []
    hook = loaded.model.register_forward_pre_hook(
        lambda _, given, named: seen.append((given or (named["input_ids"],))[0].shape),
        with_kwargs=True,
    )
    file = task_file(CHOOSE, "words", documents())
    whole = asked(Generator(loaded), file, batch=24)
    widest = max(rows * width for rows, width in seen)
    assert widest > 60
    monkeypatch.setattr("ftsec_ray.models.lm_eval_model.LOGITS_OF_A_BATCH", most)
    seen.clear()
    parts = asked(Generator(loaded), file, batch=24)
    hook.remove()
    assert max(rows * width for rows, width in seen) <= 60
    assert outcomes(parts, "acc") == outcomes(whole, "acc")


def hashes(answer):
    return [row["prompt_hash"] for row in answer.samples if row["measure"] == "acc"]


def test_rewriting_wrappers_act_on_chats_and_are_missed_where_there_is_none(
    loaded, task_file, tmp_path
):
    file = task_file(CHOOSE, "words", documents())
    context = StageContext(
        seed=0, task=tiny_task(), runtime=Runtime(), workdir=tmp_path, load=lambda role: loaded
    )
    reminder = SelfReminder(where="user", text="be careful")
    wrapped = reminder.wrap_generation(Generator(loaded), context)
    answer = asked(wrapped, file, limit=4)
    reminded = [[{"role": "user", "content": f"{text} be careful"}] for text in QUESTIONS[:4]]
    prompts = [render(loaded.tokenizer, chat, generate=True) for chat in reminded]
    assert hashes(answer) == [hashlib.sha256(text.encode()).hexdigest() for text in prompts]
    assert (answer.notes["rewrites"], answer.warnings) == (1, ())
    plain = replace(loaded, info=replace(loaded.info, aligned=False))
    alone = asked(replace(wrapped, loaded=plain), file, limit=4)
    assert hashes(alone) == [hashlib.sha256(text.encode()).hexdigest() for text in QUESTIONS[:4]]
    assert alone.notes["rewrites"] == 0
    assert ["without the defenses that change chats" in text for text in alone.warnings] == [True]


def test_defenses_that_choose_answers_are_missed_with_a_word(loaded, task_file):
    file = task_file(CHOOSE, "words", documents())
    gated = replace(Generator(loaded), gates=(lambda chats: ["no"] * len(chats),))
    guided = replace(Generator(loaded), rescored=(lambda prompts, answers, own, batch: 0 * own,))
    plain = asked(Generator(loaded), file, limit=2)
    assert plain.warnings == ()
    for generator in (gated, guided):
        answer = asked(generator, file, limit=2)
        assert answer.metrics == plain.metrics
        assert ["values are those of the model without" in t for t in answer.warnings] == [True]


def test_prompts_that_lose_their_beginning_are_counted(loaded, task_file):
    rows = [{**documents()[0], "question": "the lamp was cold . " * 300}, documents()[1]]
    answer = asked(Generator(loaded), task_file(CHOOSE, "words", rows))
    assert answer.notes["prompts_cut"] == len(LABELS)
    assert "prompts was cut off" in answer.warnings[0]


def test_a_measure_whose_direction_its_name_does_not_tell_is_left_out_with_a_word(
    loaded, task_file
):
    text = CHOOSE.replace(
        "{metric: acc_norm, aggregation: mean, higher_is_better: true}",
        "{metric: acc_norm, aggregation: mean, higher_is_better: false}",
    )
    answer = asked(Generator(loaded), task_file(text, "words", documents()))
    assert [metric.metric for metric in answer.metrics] == ["benchmark:words:acc"]
    assert "acc_norm of benchmark words is not in the metrics" in answer.warnings[0]


def sample(doc, task, measure, value):
    hashes = {"doc_hash": f"{task}{doc}", "prompt_hash": "p", "target": "0", "filter": "none"}
    return {"doc_id": doc, "filtered_resps": [], "metrics": [measure], measure: value, **hashes}


def said(group, values, *, measure="acc", aggregated=None, stderr="N/A", higher=True):
    """What lm-eval says of a group of two tasks with these values per document."""
    results = {task: {f"{measure},none": 0.0, f"{measure}_stderr,none": "N/A"} for task in values}
    if aggregated is not None:
        results[group] = {f"{measure},none": aggregated, f"{measure}_stderr,none": stderr}
    return {
        "results": results,
        "group_subtasks": {group: list(values)} if group else {},
        "higher_is_better": {name: {measure: higher} for name in (*values, group)},
        "samples": {
            task: [sample(doc, task, measure, value) for doc, value in enumerate(own)]
            for task, own in values.items()
        },
    }


def read(whole):
    samples = tuple(benchmarks._samples(whole))
    return benchmarks._metrics(
        whole, samples, lambda task, measure: metric_of(f"benchmark:{task}:{measure}")
    )


def test_a_group_pools_the_documents_of_its_tasks_where_its_value_is_their_mean():
    values = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 0.0]}
    (row,), _ = read(said("g", values, aggregated=0.5, stderr=0.2))
    assert (row.metric, row.value, row.n) == ("benchmark:g:acc", 0.5, 6)
    assert (row.ci_low, row.ci_high) == pytest.approx(wilson(0.5, 6))


def test_a_group_that_weighs_its_tasks_alike_has_the_standard_error_of_lm_eval():
    values = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 0.0]}
    (row,), _ = read(said("g", values, aggregated=0.375, stderr=0.1))
    assert (row.value, row.n) == (0.375, 6)
    half = stats.norm.ppf(0.975) * 0.1
    assert (row.ci_low, row.ci_high) == pytest.approx((0.375 - half, 0.375 + half))


def test_tasks_that_nothing_puts_together_are_told_apart():
    rows, _ = read(said("", {"a": [1.0, 1.0], "b": [0.0]}))
    assert [(row.metric, row.n) for row in rows] == [
        ("benchmark:a:acc", 2),
        ("benchmark:b:acc", 1),
    ]


def test_what_is_no_count_of_documents_has_no_interval_of_its_own():
    values = {"a": [[True, False], [True]], "b": [[False]]}
    measure = "inst_level_strict_acc"
    (row,), _ = read(said("g", values, measure=measure, aggregated=0.5))
    assert (row.metric, row.value, row.n) == (f"benchmark:g:{measure}", 0.5, 3)
    assert (row.ci_low, row.ci_high) == (None, None)


def test_a_data_set_that_is_not_here_is_a_fault_of_the_stage_that_says_so(loaded):
    with pytest.raises(StageError, match="load its data set once"):
        asked(Generator(loaded), "gsm8k", limit=1)


def test_what_lm_eval_cannot_ask_is_a_fault_of_the_stage(loaded, task_file):
    text = SAY.replace("max_gen_toks: 8", "max_gen_toks: 100000")
    file = task_file(text, "sayings", [{"question": "a", "answer": "b"}])
    with pytest.raises(StageError, match="positions"):
        asked(Generator(loaded), file)


def test_randomness_of_the_process_is_left_as_it_was(loaded, task_file):
    import random

    import numpy as np

    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    file = task_file(CHOOSE, "words", documents()[:2])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = drawn()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    asked(Generator(loaded), file)
    assert drawn() == before


def test_metrics_of_benchmarks_have_unit_direction_and_meaning_by_their_names():
    acc = METRICS["benchmark:mmlu:acc"]
    assert (acc.better, acc.proportion, acc.unit) == ("higher", True, "fraction 0..1")
    assert METRICS["benchmark:wikitext:word_perplexity"].better == "lower"
    assert "strict-match" in METRICS["benchmark:gsm8k:exact_match,strict-match"].meaning
    assert "benchmark:mmlu" not in METRICS
    assert METRICS.get("benchmark:") is None
    with pytest.raises(KeyError):
        METRICS["nothing"]
