"""Asks a model all probes of a cell and stores the answers for the judges; nothing is judged here.

Probes with the same chat share its completion: the chats of all probes form one list without
duplicates, and label probes need one forward pass. The same holds for wrapped generators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.config.sweep import EvaluationConfig
from ftsec_ray.context import Chat, Runtime, TaskData
from ftsec_ray.errors import DataError, StageError
from ftsec_ray.evals.answer_loss import answer_loss
from ftsec_ray.evals.completed import Ends, Said, said_by
from ftsec_ray.evals.metrics import MetricRow, perplexity
from ftsec_ray.evals.probes import capped, drawn
from ftsec_ray.identity import canonical, digest
from ftsec_ray.method import Probe, Prompt

if TYPE_CHECKING:
    from ftsec_ray.models.generator import Generator

COMPLETIONS, PROBES = "completions.parquet", "probes.json"
"""Files of the artifact: one row per answer, and the probes."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to one prompt of a probe."""

    probe: str
    """Name of the probe."""
    prompt: Prompt
    completion: str
    """Text of the answer; for a label probe the most likely label, or empty if a defense lets no
    label be the answer."""
    scores: tuple[float, ...] = ()
    """For a label probe: log-probability of each label, in nats; -inf for all if none is the
    answer."""
    sample: int = 0
    """Number of the answer among those to the same prompt."""
    ends: Ends = ()
    """(tokens, characters): where the first `tokens` generated tokens, thoughts included, end in
    `completion`; the end of the text if the answer is shorter."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers of a model, and the metrics that need the model itself."""

    probes: tuple[Probe, ...]
    """The probes, without their prompts."""
    answers: tuple[Answer, ...]
    """In the order of the probes."""
    measured: tuple[MetricRow, ...]
    """Metrics that need the model and no judge, such as perplexity."""
    template_hash: str
    """Digest of the chat template."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Probe -> number of prompts that were not asked, because prompt and answer are longer than the
    model's positions.
    """


def ask(
    generator: Generator,
    task: TaskData,
    probes: Sequence[Probe],
    config: EvaluationConfig,
    *,
    runtime: Runtime,
    seed: int = 0,
) -> Answers:
    """Ask a model the first `config.prompts` prompts of every probe, in an order decided by the
    prompt ids; `seed` is that of sampled answers.
    """
    from ftsec_ray.models.chat_format import template_hash

    asked = [capped(probe, config.prompts) for probe in probes]
    _check(asked)
    asked, left_out = _within_positions(generator, asked, config)
    answers = [
        *_read_labels(generator, asked, runtime),
        *_complete(generator, asked, config, runtime, seed),
    ]
    with generator.steering():
        losses, too_long = answer_loss(
            generator.loaded, task, config, batch=runtime.eval_batch, tally=generator.tally
        )
        measured = (*_perplexity(generator, task, config, runtime), *losses)
    place = {probe.name: i for i, probe in enumerate(asked)}
    answers.sort(key=lambda answer: place[answer.probe])
    return Answers(
        probes=tuple(asked),
        answers=tuple(answers),
        measured=measured,
        template_hash=template_hash(generator.loaded.tokenizer),
        left_out={**left_out, **too_long},
    )


def _within_positions(
    generator: Generator, probes: Sequence[Probe], config: EvaluationConfig
) -> tuple[list[Probe], dict[str, int]]:
    """The probes without the prompts that are too long for the model's positions together with
    their answer, and how many those are.
    """
    from ftsec_ray.models.load import position_limit

    limit = position_limit(generator.loaded.model)
    if limit is None:
        return list(probes), {}
    chats = _unique(prompt.chat for probe in probes for prompt in probe.prompts)
    lengths = dict(zip(chats, generator.lengths(list(chats.values())), strict=True))
    kept, left_out = [], {}
    for probe in probes:
        most = limit - _answer_tokens(generator, probe, config)
        prompts = tuple(p for p in probe.prompts if lengths[canonical(p.chat)] <= most)
        kept.append(replace(probe, prompts=prompts))
        if len(prompts) < len(probe.prompts):
            left_out[probe.name] = len(probe.prompts) - len(prompts)
    return kept, left_out


def _answer_tokens(generator: Generator, probe: Probe, config: EvaluationConfig) -> int:
    """Maximum number of tokens of an answer to a probe."""
    if probe.judge != "label":
        return _limit(probe, config)
    from ftsec_ray.models.chat_format import chat_format

    tokenizer, end = generator.loaded.tokenizer, chat_format(generator.loaded.tokenizer).end
    encoded = [
        tokenizer(f"{label}{end}", add_special_tokens=False)["input_ids"] for label in probe.labels
    ]
    return max(map(len, encoded), default=0)


def _limit(probe: Probe, config: EvaluationConfig) -> int:
    """Maximum number of new tokens of an answer to a generating probe."""
    return min(probe.max_new_tokens or config.new_tokens, config.new_tokens)


def _check(probes: Sequence[Probe]) -> None:
    for what, names in (
        ("probes", [p.name for p in probes]),
        ("probes with a metric", [m for p in probes for m in p.metrics]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StageError(
                f"two {what} have the same name",
                twice[0],
                "each name once",
                "put the prompts into one probe, or rename one",
            )
    unknown = [name for probe in probes for name in probe.metrics if name not in schema.METRICS]
    if unknown:
        raise StageError(
            "a probe has an unknown metric",
            unknown[0],
            " | ".join(schema.METRICS),
            "add it to schema.METRICS, or to METRICS of a file in ftsec_ray/attacks or"
            " ftsec_ray/judges",
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
                "a label probe has no labels", group[0].name, "the label words of the task"
            )
        chats = _unique(prompt.chat for probe in group for prompt in probe.prompts)
        rows = (
            generator.label_logprobs(
                list(chats.values()), labels, batch=runtime.eval_batch
            ).tolist()
            if chats
            else []
        )
        scores_of = dict(zip(chats, rows, strict=True))
        for probe in group:
            for prompt in probe.prompts:
                scores = scores_of[canonical(prompt.chat)]
                best = max(range(len(scores)), key=scores.__getitem__)
                is_label = scores[best] > -math.inf
                yield Answer(
                    probe=probe.name,
                    prompt=prompt,
                    completion=labels[best] if is_label else "",
                    scores=tuple(scores),
                )


def _complete(
    generator: Generator,
    probes: Sequence[Probe],
    config: EvaluationConfig,
    runtime: Runtime,
    seed: int,
) -> Iterator[Answer]:
    """Answers of the generating probes, one call per limit of new tokens; answers to the same
    prompt follow each other.
    """
    mine = [probe for probe in probes if probe.judge != "label"]
    limits = {probe.name: _limit(probe, config) for probe in mine}
    said: dict[tuple[int, str], list[Said]] = {}
    for limit in sorted(set(limits.values())):
        chats = _unique(
            prompt.chat for probe in mine if limits[probe.name] == limit for prompt in probe.prompts
        )
        if chats:
            answers = _sampled(generator, chats, limit, config, runtime, seed)
            said.update({(limit, key): all_of for key, all_of in answers.items()})
    for probe in mine:
        for prompt in probe.prompts:
            answered = said[limits[probe.name], canonical(prompt.chat)]
            for sample, answer in enumerate(answered):
                is_own = probe.without_opening
                yield Answer(
                    probe=probe.name,
                    prompt=prompt,
                    completion=answer.own if is_own else answer.text,
                    sample=sample,
                    ends=() if is_own else answer.ends,
                )


def _sampled(
    generator: Generator,
    chats: Mapping[str, Chat],
    limit: int,
    config: EvaluationConfig,
    runtime: Runtime,
    seed: int,
) -> dict[str, list[Said]]:
    """The answers to every chat. A sample depends on the seed, the chat before any rewrite (so that
    cells are compared under the same random numbers) and its number.
    """
    asked = [(key, sample) for key in chats for sample in range(config.samples)]
    given: dict[str, Any] = {"max_new_tokens": limit, "batch": runtime.eval_batch}
    if config.temperature:
        given["temperature"] = config.temperature
        given["seeds"] = [int(digest(["sample", seed, key, n])[:15], 16) for key, n in asked]
    lengths = [length for length in config.answer_lengths or () if length < limit]
    completed = said_by(generator, [chats[key] for key, _ in asked], lengths, given)
    answers: dict[str, list[Said]] = {key: [] for key in chats}
    for (key, _), answer in zip(asked, completed, strict=True):
        answers[key].append(answer)
    return answers


def _perplexity(
    generator: Generator, task: TaskData, config: EvaluationConfig, runtime: Runtime
) -> Iterator[MetricRow]:
    if not config.perplexity_rows:
        return
    text = task.splits.get("text")
    if text is None or text.num_rows == 0:
        yield MetricRow(metric="perplexity", value=None, n=0)
    else:
        rows = drawn(text, config.perplexity_rows)
        yield perplexity(generator.loaded, rows, batch=runtime.eval_batch, tally=generator.tally)


def write_answers(answers: Answers, folder: Path) -> None:
    """Write the answers as `completions.parquet` and `probes.json`."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {
            "probe": answer.probe,
            "prompt_id": answer.prompt.prompt_id,
            "chat": json.dumps(answer.prompt.chat, ensure_ascii=False),
            "expected": answer.prompt.expected,
            "target": answer.prompt.target,
            "meta": json.dumps(dict(answer.prompt.meta), ensure_ascii=False, sort_keys=True),
            "completion": answer.completion,
            "scores": list(answer.scores),
            "sample": answer.sample,
            "ends": [{"tokens": tokens, "chars": chars} for tokens, chars in answer.ends],
        }
        for answer in answers.answers
    ]
    has_ends = any(answer.ends for answer in answers.answers)
    parquet.write_table(
        pa.Table.from_pylist(rows, schema=_completions(has_ends=has_ends)),
        folder / COMPLETIONS,
        compression="zstd",
    )
    plain = {
        "probes": [
            {
                **{k: v for k, v in asdict(probe).items() if k != "without_opening" or v},
                "prompts": [],
                "metrics": dict(probe.metrics),
            }
            for probe in answers.probes
        ],
        "measured": [asdict(measured) for measured in answers.measured],
        "template_hash": answers.template_hash,
        **({"left_out": dict(answers.left_out)} if answers.left_out else {}),
    }
    (folder / PROBES).write_text(json.dumps(plain, sort_keys=True), encoding="utf-8")


def read_answers(folder: Path) -> Answers:
    """The answers in a folder; DataError if its files are not those of `write_answers`."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        plain = json.loads((folder / PROBES).read_text(encoding="utf-8"))
        rows = parquet.ParquetFile(folder / COMPLETIONS).read(use_threads=False)
        listed = rows.cast(_completions(has_ends="ends" in rows.schema.names)).to_pylist()
        probes = tuple(
            Probe(**{**probe, "prompts": (), "labels": tuple(probe["labels"])})
            for probe in plain["probes"]
        )
        measured = tuple(MetricRow(**row) for row in plain["measured"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"the answers of a model cannot be read: {error}", str(folder), COMPLETIONS
        ) from error
    return Answers(
        probes=probes,
        answers=tuple(_answer(row) for row in listed),
        measured=measured,
        template_hash=str(plain["template_hash"]),
        left_out=plain.get("left_out", {}),
    )


def _answer(row: dict[str, object]) -> Answer:
    prompt = Prompt(
        prompt_id=str(row["prompt_id"]),
        chat=json.loads(str(row["chat"])),
        expected=row["expected"],  # type: ignore[arg-type]
        target=row["target"],  # type: ignore[arg-type]
        meta=json.loads(str(row["meta"])),
    )
    return Answer(
        probe=str(row["probe"]),
        prompt=prompt,
        completion=str(row["completion"]),
        scores=tuple(row["scores"]),  # type: ignore[arg-type]
        sample=int(row["sample"]),  # type: ignore[call-overload]
        ends=tuple((end["tokens"], end["chars"]) for end in row.get("ends") or ()),  # type: ignore[attr-defined]
    )


def _completions(*, has_ends: bool) -> object:
    """Schema of the completions; with `ends` only if answer lengths were asked for, so that other
    artifacts keep their bytes.
    """
    import pyarrow as pa

    text = pa.string()
    ends = pa.list_(pa.struct([("tokens", pa.int32()), ("chars", pa.int32())]))
    required = [pa.field(name, text, nullable=False) for name in ("probe", "prompt_id", "chat")]
    return pa.schema(
        [
            *required,
            pa.field("expected", text),
            pa.field("target", text),
            pa.field("meta", text, nullable=False),
            pa.field("completion", text, nullable=False),
            pa.field("scores", pa.list_(pa.float64()), nullable=False),
            pa.field("sample", pa.int64(), nullable=False),
            *([pa.field("ends", ends, nullable=False)] if has_ends else []),
        ]
    )
