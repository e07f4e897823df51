"""Runs one benchmark of lm-eval on the finished model, to measure its utility beyond the task.

An aligned model is prompted under its chat template and with the wrappers of the defenses, a base
model with plain text. Wrappers of the attack are not used, since benchmarks represent honest users.
Defenses that refuse prompts or choose tokens do not act on lm-eval's requests; a warning says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind
from ftsec_ray.schema import Metric

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

PREFIX = "benchmark"
"""Prefix of the names of its metrics: `benchmark:<task>:<metric>`, followed by a comma and the
answer filter if lm-eval has several.
"""
_SHARES = frozenset(
    {
        "acc",
        "acc_bytes",
        "acc_mutual_info",
        "acc_norm",
        "exact_match",
        "inst_level_loose_acc",
        "inst_level_strict_acc",
        "prompt_level_loose_acc",
        "prompt_level_strict_acc",
    }
)
"""Metrics of lm-eval that are fractions of documents or instructions."""
_LOWER = frozenset(
    {"bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity"}
)
"""Metrics of lm-eval for which lower is better."""
_DOCUMENTS = {"mmlu": (57, 14_042, 1.0), "gsm8k": (1, 1_319, 8.0), "ifeval": (1, 541, 8.0)}
"""Benchmark -> its published number of tasks and documents, and the cost of a document relative to
one with answer choices (generation costs more). `_OTHER` is for all other benchmarks."""
_OTHER = (1, 1_000, 1.0)
_HUNDRED = 100


def _hundreds(params: Mapping[str, Any]) -> float:
    """Documents of a stage in hundreds, weighted by their cost."""
    tasks, documents, cost = _DOCUMENTS.get(str(params.get("benchmark")), _OTHER)
    limit = params.get("limit")
    asked = documents if limit is None else min(documents, tasks * int(limit))
    return cost * asked / _HUNDRED


KIND = StageKind(
    name="benchmark",
    position=110,
    shares_hooks=("wrap_generation",),
    acts="all",
    by="defenses",
    takes=("model",),
    answers="all",
    measures=True,
    roles=("reference", "unaligned", "start", "clean_bank"),
    settings=("benchmarks", "training"),
    prior_s={"": (5.0, 1.0)},
    amount_of=_hundreds,
)


def metric_of(name: str) -> Metric | None:
    """The metric of this kind with this name; None for other names."""
    prefix, _, rest = name.partition(":")
    task, _, metric = rest.partition(":")
    if prefix != PREFIX or not task or not metric:
        return None
    measure, _, answers = metric.partition(",")
    return Metric(
        name,
        "fraction 0..1" if measure in _SHARES else "as lm-eval has it",
        "lower" if measure in _LOWER else "higher",
        f"{measure} on the benchmark {task} of lm-eval"
        + (f", answers read by {answers}" if answers else ""),
        proportion=measure in _SHARES,
    )


def run(job: Job) -> Extra:
    """Write `metrics.parquet` (schema.metrics without `cell`), `samples.parquet` with the result of
    every document, and `benchmark.json` with the full output of lm-eval.
    """
    from ftsec_ray.evals.benchmarks import ask_benchmark, write_benchmark
    from ftsec_ray.models.chat_format import served
    from ftsec_ray.models.generator import Generator

    context, params = job.context(), job.stage.params
    loaded = served(job.session.asked(job.inputs["model"]), params.get("serve_template"))
    generator = Generator(loaded)
    for method in job.methods():
        generator = method.wrap_generation(generator, context)  # type: ignore[attr-defined]
    answer = ask_benchmark(
        generator,
        str(job.stage.where.get("benchmark_path") or params["benchmark"]),
        limit=params["limit"],
        batch=context.runtime.eval_batch,
        metric_of=lambda task, measure: metric_of(f"{PREFIX}:{task}:{measure}"),
    )
    write_benchmark(answer, job.out)
    for text in answer.warnings:
        job.warn(text)
    return {"notes": {**answer.notes, **context.notes, **context.counts}}
