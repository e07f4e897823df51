"""Asks the finished model one benchmark of lm-eval: what it is still good for beyond the task.

It is asked in memory, under its own chat template and through the wrappers of the defenses where it
is an aligned model, and as plain text where it is not. What an attack puts around its own prompts
plays no part: benchmarks are what honest users ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind
from ftsec_ray.schema import Metric

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

PREFIX = "benchmark"
"""What the names of its metrics begin with: `benchmark:<task>:<metric>`, and behind a comma the
filter of the answers, where lm-eval knows several.
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
"""Metrics of lm-eval that are shares of documents, or of instructions."""
_LOWER = frozenset(
    {"bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity"}
)
"""Metrics of lm-eval of which less is better."""
_DOCUMENTS = {"mmlu": (57, 14_042, 1.0), "gsm8k": (1, 1_319, 8.0), "ifeval": (1, 541, 8.0)}
"""Tasks and documents of the usual benchmarks, as published, and what a document costs, in units of
one that is a choice: others generate. A benchmark that is not listed is taken for OTHER."""
_OTHER = (1, 1_000, 1.0)
_HUNDRED = 100


def _hundreds(params: Mapping[str, Any]) -> float:
    """Hundreds of documents that a stage asks, each by what it costs."""
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
    """What is known of a metric of this kind by its name; None for other names."""
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
    """Write `metrics.parquet` (schema.metrics without `cell`), `samples.parquet` with what became
    of every document, and `benchmark.json`, all that lm-eval says.
    """
    from ftsec_ray.evals.benchmarks import ask_benchmark, write_benchmark
    from ftsec_ray.models.chat_format import served
    from ftsec_ray.models.generator import Generator
    from ftsec_ray.models.precision import as_asked

    context, params = job.context(), job.stage.params
    loaded = served(job.session.model(job.inputs["model"]), params.get("serve_template"))
    generator = Generator(as_asked(loaded))
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
    return {"notes": {**answer.notes, **context.notes}}
