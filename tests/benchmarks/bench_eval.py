"""Prompts per second of an evaluation, batched and one at a time: `python
tests/benchmarks/bench_eval.py`.

Generation: `Generator.complete` by each back end (`generate` over padded batches, continuous
    batching) against `model.generate` in batches as the prompts come, and against one prompt at a
    time.
Labels: one pass over the prompts with the labels behind its cache, against a whole pass for every
    prompt and label, and against generating the answer and reading the label off it. Once with the
    labels of the task, once with labels of two words and more.
The ways take turns, so that a change in the machine's mood meets all of them; the figure is the
median of the rounds, and so is the ratio of CPU time to that of one pass over the prompts with
logits at their last positions, which is the least that scores can cost. The model comes from
`--model` (a folder or a .gguf file) or from `--store` where one is given that holds it; else its
weights are random, which never stop before the limit of new tokens, and only the speed means
anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from naive_cell import complete, label_in

from ftsec_ray.config.sweep import LADDER_SIZES
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.conversation import chat_of
from ftsec_ray.evals.probes import drawn
from ftsec_ray.models.chat_format import chat_format

if TYPE_CHECKING:
    from ftsec_ray.context import Chat, LoadedModel, TaskData
    from ftsec_ray.models.generator import Generator

SPLITS = ("harmful_test", "borderline_test", "benign_test")
Way = Callable[[], list[str]]


def random_model(size: str) -> LoadedModel:
    """An untrained model of the ladder with the ladder's tokenizer."""
    from ftsec_ray.context import LoadedModel, ModelInfo
    from ftsec_ray.data.microworld import pretraining_chats
    from ftsec_ray.models import ladder

    tokenizer = ladder.build_tokenizer(
        message["content"] for chat in pretraining_chats() for message in chat
    )
    info = ModelInfo(
        name=f"ladder:{size}",
        family=ladder.FAMILY,
        parameters=ladder.parameters(size),
        aligned=False,
    )
    return LoadedModel(ladder.build_model(size, seed=0).eval(), tokenizer, info)


def stored_model(size: str, place: str | None) -> LoadedModel | None:
    """The aligned model of a store; None when there is no store or it lacks the model."""
    from ftsec_ray.models.load import load_model
    from ftsec_ray.plan import build_plan
    from ftsec_ray.store import Store

    if place is None:
        return None
    plan = build_plan(
        load_sweep(
            {
                "name": "one",
                "models": [f"ladder:{size}"],
                "task": "microworld",
                "attacks": ["none"],
                "defenses": ["none"],
            }
        )
    )
    digest = next(stage.digest for stage in plan.stages.values() if stage.kind == "align")
    store = Store.open(place)
    return load_model(store.fetch(digest)) if store.has(digest) else None


def published_model(place: str) -> LoadedModel:
    """The model in a folder or a .gguf file."""
    from ftsec_ray.models.convert import load_source

    return load_source(place, name=Path(place).name, family="published", aligned=False)


def scored_one_by_one(
    generator: Generator, chats: Sequence[Chat], labels: Sequence[str]
) -> list[str]:
    """The best label of every prompt, by a whole pass with all logits for each prompt and label."""
    import torch

    from ftsec_ray.models.chat import answer_ids, render

    tokenizer, model = generator.loaded.tokenizer, generator.loaded.model.eval()
    end = tokenizer(chat_format(tokenizer).end, add_special_tokens=False)["input_ids"]
    best = []
    for chat in chats:
        text = render(tokenizer, chat, generate=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        words = [answer_ids(tokenizer, text, prompt, label) for label in labels]
        if len({len(ids) for ids in words}) > 1:
            words = [ids + end for ids in words]
        scores = []
        for ids in words:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0]
            logprobs = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
            scores.append(float(logprobs.gather(-1, torch.tensor(ids)[:, None]).sum()))
        best.append(labels[max(range(len(labels)), key=scores.__getitem__)])
    return best


def one_pass(generator: Generator, chats: Sequence[Chat], batch: int) -> None:
    """One pass over the prompts, in batches, with logits at the last positions."""
    import torch

    from ftsec_ray.models.batches import Prompts, in_batches, left_padded
    from ftsec_ray.models.load import placed

    prompts, model = Prompts(generator.pieces_of(chats)), generator.loaded.model.eval()

    def read(indices: list[int]) -> None:
        given = left_padded(generator.loaded, prompts.at(indices))
        positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            model(**given, **placed(model, positions), logits_to_keep=1, use_cache=False)

    in_batches(prompts.lengths(), batch, read, Counter())


def over_one_pass(
    generator: Generator, chats: Sequence[Chat], labels: Sequence[str], batch: int, rounds: int
) -> float:
    """CPU time of the scores of labels by that of one pass over the prompts; printed and
    returned.
    """
    ratios = []
    for count in range(rounds + 1):
        started = time.process_time()
        one_pass(generator, chats, batch)
        between = time.process_time()
        generator.label_logprobs(chats, labels, batch=batch)
        ended = time.process_time()
        if count:
            ratios.append((ended - between) / (between - started))
    ratio = statistics.median(ratios)
    print(
        f"  CPU time of {len(labels)} labels: {ratio:.2f} times one pass over the prompts"
        f" ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return ratio


def timed(ways: dict[str, Way], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Seconds of every way in every round, the ways in turn after one that warms up; and what each
    gave.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, list[str]] = {}
    for count in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            given[name] = way()
            if count:
                seconds[name].append(time.perf_counter() - started)
    return seconds, given


def compared(title: str, ways: dict[str, Way], rounds: int, *, prompts: int) -> dict[str, Any]:
    """Prompts per second of every way, and its ratio to the last one, which is the naive one;
    printed and returned.
    """
    seconds, given = timed(ways, rounds)
    naive = list(ways)[-1]
    print(f"\n{title}: {prompts} prompts, median of {rounds} rounds in turn")
    out: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = [slow / own for slow, own in zip(seconds[naive], values, strict=True)]
        equal = sum(a == b for a, b in zip(given[name], given[naive], strict=True)) / prompts
        out[name] = {
            "prompts_per_s": prompts / statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "equal_frac": equal,
        }
        print(
            f"  {name:36} {out[name]['prompts_per_s']:9.1f} prompts/s  {out[name]['ratio']:6.1f}x "
            f"({min(ratios):.1f} to {max(ratios):.1f})  same answer as the naive way {equal:.2f}"
        )
    return out


def requests(task: TaskData, count: int) -> list[Chat]:
    """Forbidden, borderline and benign requests, taken in turn as a file would mix them."""
    columns = [drawn(task.split(split), count) for split in SPLITS]
    return [chat_of(row) for rows in zip(*columns, strict=False) for row in rows][:count]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All comparisons."""
    import torch
    from transformers.utils import logging

    from ftsec_ray.data.microworld import build_task
    from ftsec_ray.models.generator import Generator

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    task = build_task()
    found = published_model(args.model) if args.model else stored_model(args.size, args.store)
    generator = Generator(found or random_model(args.size))
    kind = "trained" if found else "random weights: the answers mean nothing"
    print(
        f"{generator.loaded.info.name}, {generator.loaded.info.parameters:,} weights, {kind}; "
        f"one thread, load of the machine {os.getloadavg()[0]:.1f}"
    )
    asked = [chat_of(row) for row in drawn(task.split("test"), args.prompts)]
    longer = [f"{label} and {label}" for label in task.labels]
    longer += [f"{label} or not" for label in task.labels]
    return {
        "generation": of_generation(generator, requests(task, args.prompts), args),
        "labels": of_labels(generator, asked, list(task.labels), args),
        "longer_labels": of_labels(generator, asked, longer, args),
    }


def of_generation(
    generator: Generator, chats: Sequence[Chat], args: argparse.Namespace
) -> dict[str, Any]:
    """The back ends against `generate`."""
    from ftsec_ray.models.backends import ContinuousBatching

    limit, batch = args.max_new_tokens, args.batch
    continuous = replace(generator, backend=ContinuousBatching())
    asked = {"max_new_tokens": limit, "batch": batch}
    return compared(
        "generation",
        {
            f"padded: by length, batch {batch}": partial(generator.complete, chats, **asked),
            f"continuous batching, {batch} at once": partial(continuous.complete, chats, **asked),
            f"generate as they come, batch {batch}": partial(
                complete, generator, chats, limit=limit, batch=batch
            ),
            "generate one at a time": partial(complete, generator, chats, limit=limit, batch=1),
        },
        args.rounds,
        prompts=len(chats),
    )


def of_labels(
    generator: Generator, asked: Sequence[Chat], labels: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Scores of labels against a pass for each, and against generating."""
    limit, batch = args.max_new_tokens, args.batch

    def by_scores() -> list[str]:
        best = generator.label_logprobs(asked, labels, batch=batch).argmax(-1).tolist()
        return [labels[i] for i in best]

    def by_generating() -> list[str]:
        texts = complete(generator, asked, limit=limit, batch=batch)
        return [label_in(text, labels) for text in texts]

    ways = {
        f"scores, batch {batch}": by_scores,
        f"generate and parse, batch {batch}": by_generating,
        "a whole pass for every prompt and label": partial(
            scored_one_by_one, generator, asked, labels
        ),
    }
    figures = compared(f"{len(labels)} labels", ways, args.rounds, prompts=len(asked))
    return {**figures, "over_one_pass": over_one_pass(generator, asked, labels, batch, args.rounds)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=LADDER_SIZES, default="1m")
    parser.add_argument("--model", help="a published model: its folder or .gguf file")
    parser.add_argument("--store", help="take the trained model from here where it is there")
    parser.add_argument(
        "--prompts", type=int, default=192, help="as many as a cell of the quickstart asks"
    )
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here too")
    args = parser.parse_args(argv)
    found = measure(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
