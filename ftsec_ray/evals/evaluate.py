"""Ask a finished model all probes of a cell, judge the answers, and count.

Probes that ask the same chat share its completion: all of them together make one list of unique
chats, and label probes are read off one forward pass. Wrapped generators go the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Chat, Runtime, TaskData
from ftsec_ray.errors import StageError
from ftsec_ray.evals.judges import Label, Verdict, get_judge
from ftsec_ray.evals.metrics import Measured, perplexity, proportion
from ftsec_ray.evals.probes import REQUEST_PROBES, capped, drawn
from ftsec_ray.identity import canonical
from ftsec_ray.method import Probe, Prompt
from ftsec_ray.models.chat import template_hash

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.models.generator import Generator

LOGPROB_DIGITS = 4


@dataclass(frozen=True)
class Evaluation:
    """What was measured: `metrics` and `generations` as in schema, without the column `cell`."""

    metrics: pa.Table
    generations: pa.Table


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to one prompt of a probe, judged."""

    probe: Probe
    prompt: Prompt
    completion: str
    judge: str
    verdict: Verdict


def evaluate(
    generator: Generator,
    task: TaskData,
    probes: Sequence[Probe],
    config: EvaluationConfig,
    *,
    runtime: Runtime,
) -> Evaluation:
    """Ask, judge and count all probes, each on its first `config.prompts` prompts in the stable
    draw.
    """
    asked = [capped(probe, config.prompts) for probe in probes]
    _check(asked)
    answers = [
        *_read_labels(generator, asked, runtime),
        *_complete(generator, asked, task, config, runtime),
    ]
    place = {probe.name: i for i, probe in enumerate(asked)}
    answers.sort(key=lambda answer: place[answer.probe.name])
    measured = [*_shares(asked, answers), *_perplexity(generator, task, config, runtime)]
    return Evaluation(
        _table(schema.metrics(), (asdict(m) for m in measured)),
        _table(schema.generations(), _generation_rows(generator, answers, config)),
    )


def _check(probes: Sequence[Probe]) -> None:
    for what, names in (
        ("probes", [p.name for p in probes]),
        ("probes with a metric", [m for p in probes for m in p.metrics]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StageError(
                f"two {what} of one name",
                twice[0],
                "each name once",
                "put the prompts into one probe, or rename it",
            )
    unknown = [name for probe in probes for name in probe.metrics if name not in schema.METRICS]
    if unknown:
        raise StageError(
            "a probe with an unknown metric",
            unknown[0],
            " | ".join(schema.METRICS),
            "add it to schema.METRICS",
        )


def _unique(chats: Iterable[Chat]) -> dict[str, Chat]:
    return {canonical(chat): chat for chat in chats}


def _read_labels(
    generator: Generator, probes: Sequence[Probe], runtime: Runtime
) -> Iterator[Answer]:
    """Answers of the label probes, one forward pass per set of label words."""
    mine = [probe for probe in probes if probe.judge == "label"]
    for labels in dict.fromkeys(probe.labels for probe in mine):
        group = [probe for probe in mine if probe.labels == labels]
        if not labels:
            raise StageError(
                "a label probe without labels", group[0].name, "the label words of the task"
            )
        chats = _unique(prompt.chat for probe in group for prompt in probe.prompts)
        scores = (
            generator.label_logprobs(
                list(chats.values()), labels, batch=runtime.eval_batch
            ).tolist()
            if chats
            else []
        )
        found = dict(zip(chats, scores, strict=True))
        for probe in group:
            yield from _label_answers(
                probe, [found[canonical(prompt.chat)] for prompt in probe.prompts]
            )


def _label_answers(probe: Probe, scores: list[list[float]]) -> Iterator[Answer]:
    judge = Label(prefers_target="target" in probe.metrics.values())
    words = [probe.labels[max(range(len(row)), key=row.__getitem__)] for row in scores]
    for prompt, word, row, verdict in zip(
        probe.prompts, words, scores, judge(probe.prompts, words), strict=True
    ):
        raw = json.dumps(
            {
                label: round(value, LOGPROB_DIGITS)
                for label, value in zip(probe.labels, row, strict=True)
            }
        )
        yield Answer(
            probe=probe,
            prompt=prompt,
            completion=word,
            judge=judge.name,
            verdict=Verdict(verdict=verdict.verdict, raw=raw),
        )


def _complete(
    generator: Generator,
    probes: Sequence[Probe],
    task: TaskData,
    config: EvaluationConfig,
    runtime: Runtime,
) -> Iterator[Answer]:
    """Answers of the probes that generate, one call per limit of new tokens."""
    mine = [probe for probe in probes if probe.judge != "label"]
    names = {
        probe.judge: (config.judge or task.judge) if probe.judge == "request" else probe.judge
        for probe in mine
    }
    judges = {asked: get_judge(name, device=runtime.device) for asked, name in names.items()}
    limits = {probe.name: min(probe.max_new_tokens, config.max_new_tokens) for probe in mine}
    said: dict[tuple[int, str], str] = {}
    for limit in sorted(set(limits.values())):
        chats = _unique(
            prompt.chat for probe in mine if limits[probe.name] == limit for prompt in probe.prompts
        )
        texts = (
            generator.complete(list(chats.values()), max_new_tokens=limit, batch=runtime.eval_batch)
            if chats
            else []
        )
        said.update({(limit, key): text for key, text in zip(chats, texts, strict=True)})
    for probe in mine:
        texts = [said[limits[probe.name], canonical(prompt.chat)] for prompt in probe.prompts]
        judge = judges[probe.judge]
        for prompt, text, verdict in zip(
            probe.prompts, texts, judge(probe.prompts, texts), strict=True
        ):
            yield Answer(
                probe=probe, prompt=prompt, completion=text, judge=judge.name, verdict=verdict
            )


def _shares(probes: Sequence[Probe], answers: Sequence[Answer]) -> Iterator[Measured]:
    """The metrics of the probes, then how many answers are coherent and how many were judged at
    all.
    """

    def share(metric: str, names: Iterable[str], verdict: str, *, unlike: bool = False) -> Measured:
        wanted = set(names)
        told = [a.verdict.verdict for a in answers if a.probe.name in wanted]
        judged = [one for one in told if one is not None]
        hits = sum((one == verdict) != unlike for one in judged)
        return proportion(metric, hits, len(judged), n_null=len(told) - len(judged))

    for probe in probes:
        yield from (
            share(metric, [probe.name], verdict) for metric, verdict in probe.metrics.items()
        )
    yield share("coherent_rate", REQUEST_PROBES, "incoherent", unlike=True)
    yield proportion(
        "judged_rate", sum(a.verdict.verdict is not None for a in answers), len(answers)
    )


def _perplexity(
    generator: Generator, task: TaskData, config: EvaluationConfig, runtime: Runtime
) -> Iterator[Measured]:
    if not config.perplexity_rows:
        return
    text = task.splits.get("text")
    if text is None or text.num_rows == 0:
        yield Measured(metric="perplexity", value=None, n=0)
    else:
        yield perplexity(
            generator.loaded, drawn(text, config.perplexity_rows), batch=runtime.eval_batch
        )


def _generation_rows(
    generator: Generator, answers: Sequence[Answer], config: EvaluationConfig
) -> Iterator[dict[str, Any]]:
    template, keeps = template_hash(generator.loaded.tokenizer), config.keep_generations
    for answer in answers:
        yield {
            "probe": answer.probe.name,
            "prompt_id": answer.prompt.prompt_id,
            "judge": answer.judge,
            "prompt": _shown(answer.prompt.chat) if keeps else None,
            "completion": answer.completion if keeps else None,
            **asdict(answer.verdict),
            "template_hash": template,
        }


def _shown(chat: Chat) -> str:
    """A lone user message as it is, any other conversation as JSON."""
    return chat[0]["content"] if len(chat) == 1 else json.dumps(chat, ensure_ascii=False)


def _table(whole: pa.Schema, rows: Iterable[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=whole.remove(whole.get_field_index("cell")))
