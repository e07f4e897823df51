"""Runs one benchmark of lm-eval on a model in memory, and turns its results into metrics."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ftsec_ray import schema
from ftsec_ray.config.benchmark_entries import data_files, is_path
from ftsec_ray.errors import EnvironmentFault, StageError
from ftsec_ray.evals.metrics import MetricRow, metrics_table, proportion
from ftsec_ray.identity import digest
from ftsec_ray.measured import Z95
from ftsec_ray.models.chat_format import chat_format, template_hash
from ftsec_ray.version import version_of

if TYPE_CHECKING:
    from ftsec_ray.models.generator import Generator

METRICS, SAMPLES, WHOLE = "metrics.parquet", "samples.parquet", "benchmark.json"
"""Files of the artifact."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The seeds of lm-eval's command line; they choose the few-shot examples."""
KEPT_MESSAGES = 20
"""Maximum number of lm-eval's warnings in the record."""
BOOTSTRAP = 1000
"""Bootstrap samples for the standard error of metrics without a formula."""
_STDERR = "_stderr"
Whole = Mapping[str, Any]
"""The result of `lm_eval.evaluate`."""
MetricOf = Callable[[str, str], schema.Metric | None]
"""Task and measure (`acc`, `exact_match,strict-match`) -> the metric."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkAnswer:
    """The results of one benchmark for a model."""

    metrics: tuple[MetricRow, ...]
    samples: tuple[Mapping[str, Any], ...]
    """One value per document, filter and measure."""
    whole: Whole
    """JSON values of lm-eval: results, configs, versions."""
    notes: Mapping[str, Any]
    """For the record."""
    warnings: tuple[str, ...]


def ask_benchmark(
    generator: Generator, benchmark: str, *, limit: int | None, batch: int, metric_of: MetricOf
) -> BenchmarkAnswer:
    """Run one benchmark on a model, with its chat template if it is aligned.

    EnvironmentFault without lm-eval; StageError if its task cannot run.

    Args:
        generator: The model, without an adapter, and its rewrites.
        benchmark: Name of a task, group or tag, or the path of a task file.
        limit: Maximum number of documents per task.
        batch: Prompts per forward pass.
        metric_of: Gives the metric of a task and measure.
    """
    try:
        return _answer(generator, benchmark, limit=limit, batch=batch, metric_of=metric_of)
    finally:
        # lm-eval leaves the model in reference cycles, which Python would collect late
        gc.collect()


def _answer(
    generator: Generator, benchmark: str, *, limit: int | None, batch: int, metric_of: MetricOf
) -> BenchmarkAnswer:
    # bootstraps in this process: a worker of Ray has one core
    os.environ.setdefault("LMEVAL_DISABLE_MULTIPROC", "1")
    try:
        from lm_eval import evaluate

        from ftsec_ray.models.lm_eval_model import as_lm_eval
    except ImportError as error:
        raise EnvironmentFault(
            f"lm-eval cannot be imported: {error}",
            None,
            "an installed lm-eval",
            'pip install "ftsec-ray[benchmarks]" on every node',
        ) from error
    is_chat = generator.loaded.info.aligned
    try:
        with _messages() as messages, _own_randomness():
            lm = as_lm_eval(generator, batch=batch)
            results = evaluate(
                lm=lm,
                task_dict=_tasks(benchmark),
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=is_chat,
            )
    except _FAULTS as error:
        raise _fault(benchmark, error) from error
    samples = tuple(_samples(results))
    metrics, unread = _metrics(results, samples, metric_of)
    return BenchmarkAnswer(
        metrics=metrics,
        samples=samples,
        whole={key: results[key] for key in _KEPT if key in results},
        notes={
            **_notes(results, samples, generator, limit=limit, cut=lm.cut),
            **({"lm_eval_says": messages[:KEPT_MESSAGES]} if messages else {}),
        },
        warnings=tuple([*_warnings(generator, cut=lm.cut, asked=len(samples)), *unread]),
    )


_FAULTS = (AssertionError, LookupError, TypeError, ValueError, OSError, ImportError, TemplateError)
"""Errors of lm-eval when a task cannot run: data, files, packages, lengths."""
_KEPT = (
    "results",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
)


def _fault(benchmark: str, error: Exception) -> StageError:
    offline = "offline" in str(error).lower() or "couldn't reach" in str(error).lower()
    return StageError(
        f"lm-eval cannot run the benchmark: {type(error).__name__}: {error}",
        benchmark,
        "a task whose data and packages are installed here, and whose answers fit into the model's"
        " positions",
        "load its data set once with access to the Hugging Face hub, or unset HF_HUB_OFFLINE"
        if offline
        else "run it by itself to see the error: lm-eval run --tasks ...",
    )


@contextmanager
def _messages() -> Iterator[list[str]]:
    """lm-eval's warnings, each text once, collected instead of printed."""
    logger, heard = logging.getLogger("lm_eval"), list[str]()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in heard and "already-initialized" not in text and "`str`" not in text:
                heard.append(text)

    ear, before = Ear(logging.WARNING), logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.propagate = before
        logger.removeHandler(ear)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Sets the seeds of lm-eval's command line, and restores the random state after it."""
    import numpy as np
    import torch

    before, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - its own
    with torch.random.fork_rng():
        try:
            random.seed(SEEDS["random"])
            np.random.seed(SEEDS["numpy"])  # noqa: NPY002
            torch.manual_seed(SEEDS["torch"])
            yield
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)  # noqa: NPY002


def _tasks(benchmark: str) -> Any:
    """The tasks of a benchmark for lm-eval, with its defaults."""
    loaded = _loaded(benchmark)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    return loaded


def _loaded(benchmark: str) -> Any:
    if not is_path(benchmark):
        return _manager().load([benchmark])
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(benchmark)
    files = data_files(config, Path(benchmark).parent)
    if files is not None:
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": files}
    return TaskManager(include_defaults=False).load([config])


@cache
def _manager() -> Any:
    """The task manager of lm-eval: thousands of files, read once per process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _samples(results: Whole) -> Iterator[dict[str, Any]]:
    """The result of every document, as rows of SAMPLES."""
    for task, samples in sorted(results["samples"].items()):
        for sample in samples:
            for measure in sample["metrics"]:
                value = sample[measure]
                number = float(value) if isinstance(value, Real) else None
                yield {
                    "task": task,
                    "filter": sample["filter"],
                    "doc_id": int(sample["doc_id"]),
                    "doc_hash": sample["doc_hash"],
                    "prompt_hash": sample["prompt_hash"],
                    "target": str(sample["target"]),
                    "response": json.dumps(sample["filtered_resps"], default=str),
                    "measure": measure,
                    "value": number,
                }


def _leaves(name: str, results: Whole) -> list[str]:
    """The tasks of a group and of its subgroups; for a task, the task itself."""
    members = results["group_subtasks"].get(name)
    return [name] if not members else [leaf for task in members for leaf in _leaves(task, results)]


def _reported(results: Whole) -> list[str]:
    """What has its own metrics: the group that was asked for, or every task if the group has no
    aggregate.
    """
    inside = {member for members in results["group_subtasks"].values() for member in members}
    roots = [name for name in results["results"] if name not in inside]
    return [
        name
        for root in roots
        for name in ([root] if _measures(results, root) else sorted(_leaves(root, results)))
    ]


def _measures(results: Whole, name: str) -> dict[str, float]:
    """`acc,none`, ... -> value."""
    return {
        key: float(value)
        for key, value in results["results"].get(name, {}).items()
        if "," in key and _STDERR not in key and isinstance(value, Real)
    }


def _metrics(
    results: Whole, samples: Sequence[Mapping[str, Any]], metric_of: MetricOf
) -> tuple[tuple[MetricRow, ...], list[str]]:
    """The metrics, and a warning for each measure that cannot be a metric."""
    rows, unread = [], []
    for name in _reported(results):
        for key, value in sorted(_measures(results, name).items()):
            measure, _, kept = key.partition(",")
            metric = metric_of(name, measure if kept == "none" else key)
            higher = results["higher_is_better"].get(name, {}).get(measure)
            if metric is None or higher is not (metric.better == "higher"):
                says = {True: "higher", False: "lower", None: "neither higher nor lower"}[higher]
                unread.append(
                    f"{measure} of benchmark {name} is not in the metrics: its task says that"
                    f" {says} is better, but for a measure of this name it is"
                    f" {metric.better if metric else 'unknown'}"
                )
                continue
            leaves = set(_leaves(name, results))
            counted = [
                row["value"]
                for row in samples
                if row["task"] in leaves and row["measure"] == measure and row["filter"] == kept
            ]
            stderr = results["results"][name].get(f"{measure}{_STDERR},{kept}")
            rows.append(_row(metric.name, value, counted, stderr))
    return tuple(rows), unread


def _row(metric: str, value: float, counted: Sequence[float | None], stderr: object) -> MetricRow:
    """A metric with the Wilson interval if every document counts 0 or 1 and the value is their
    mean, otherwise with the normal interval from lm-eval's standard error.
    """
    n, hits = len(counted), sum(item == 1 for item in counted)
    if not math.isfinite(value):
        return MetricRow(metric=metric, value=None, n=n)
    if set(counted) <= {0.0, 1.0} and n and math.isclose(hits / n, value, abs_tol=1e-9):
        return proportion(metric, hits, n)
    if not isinstance(stderr, Real) or not math.isfinite(float(stderr)):
        return MetricRow(metric=metric, value=value, n=n)
    half = Z95 * float(stderr)
    return MetricRow(metric=metric, value=value, n=n, ci_low=value - half, ci_high=value + half)


def _notes(
    results: Whole,
    samples: Sequence[Mapping[str, Any]],
    generator: Generator,
    *,
    limit: int | None,
    cut: int,
) -> dict[str, Any]:
    loaded = generator.loaded
    asked: dict[str, list[Any]] = {}
    for row in samples:
        asked.setdefault(row["task"], []).append([row["doc_hash"], row["prompt_hash"]])
    is_chat = loaded.info.aligned
    return {
        "lm_eval": version_of("lm-eval") or version_of("lm_eval"),
        "task_versions": dict(results["versions"]),
        "task_hashes": {task: digest(rows) for task, rows in asked.items()},
        "n_shot": dict(results["n-shot"]),
        "documents": {name: dict(counts) for name, counts in results["n-samples"].items()},
        "limit": limit,
        "seeds": SEEDS,
        "chat_template": is_chat,
        "rewrites": len(generator.rewrites) if is_chat else 0,
        **({"prompts_cut": cut} if cut else {}),
        **(
            {
                "chat": chat_format(loaded.tokenizer).notes(),
                "serve_template_hash": template_hash(loaded.tokenizer),
            }
            if is_chat
            else {}
        ),
    }


def _warnings(generator: Generator, *, cut: int, asked: int) -> Iterator[str]:
    if cut:
        yield (
            f"the beginning of {cut} benchmark prompts was cut off (of {asked} measurements): with"
            " their answers they are longer than the model's positions"
        )
    if (generator.rewrites or generator.prefix) and not generator.loaded.info.aligned:
        yield (
            "the benchmark ran without the defenses that change chats: a model that is not aligned"
            " is asked in plain text"
        )
    if generator.soft_suffix is not None:
        yield (
            "the benchmark ran without the soft tokens of the attack or defense: lm-eval cannot"
            " pass embeddings"
        )
    if generator.gates or generator.rescored:
        yield (
            "the benchmark ran without the defenses that refuse prompts or choose tokens: its"
            " values are those of the model without them"
        )


def write_benchmark(answer: BenchmarkAnswer, folder: Path) -> None:
    """Write the files of the artifact."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(metrics_table(answer.metrics), folder / METRICS)
    texts = ("task", "filter", "doc_hash", "prompt_hash", "target", "response", "measure")
    columns = pa.schema(
        [
            *(pa.field(name, pa.string(), nullable=False) for name in texts),
            pa.field("doc_id", pa.int64(), nullable=False),
            pa.field("value", pa.float64()),
        ]
    )
    samples = pa.Table.from_pylist(list(answer.samples), schema=columns)
    parquet.write_table(samples, folder / SAMPLES, compression="zstd")
    plain = json.dumps(answer.whole, sort_keys=True, indent=1, default=str, ensure_ascii=False)
    (folder / WHOLE).write_text(plain, encoding="utf-8")
