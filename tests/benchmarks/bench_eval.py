"""Prompts per second of an evaluation, batched and one at a time: `python
tests/benchmarks/bench_eval.py`.

Generation: `Generator.complete` (sorted by length, in batches) against `model.generate` in batches
    as the prompts come,
and against one prompt at a time. Labels: one forward pass against generating the answer and reading
the label off it. The ways take turns, so that a change in the machine's mood meets all of them; the
figure is the median of the rounds. The model comes from `--store` where one is given that holds it;
else its weights are random, which never stop before the limit of new tokens, and only the speed
means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from naive_cell import complete, label_in

from ftsec_ray.config.sweep import LADDER_SIZES
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.conversation import chat_of
from ftsec_ray.evals.probes import drawn

if TYPE_CHECKING:
    from ftsec_ray.context import Chat, LoadedModel, TaskData

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
    """Both comparisons."""
    import torch
    from transformers.utils import logging

    from ftsec_ray.data.microworld import build_task
    from ftsec_ray.models.generator import Generator

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found, task = stored_model(args.size, args.store), build_task()
    generator = Generator(found or random_model(args.size))
    kind = "trained" if found else "random weights: the answers mean nothing"
    print(
        f"ladder:{args.size}, {generator.loaded.info.parameters:,} weights, {kind}; "
        f"one thread, load of the machine {os.getloadavg()[0]:.1f}"
    )
    chats = requests(task, args.prompts)
    asked = [chat_of(row) for row in drawn(task.split("test"), args.prompts)]
    limit, batch = args.max_new_tokens, args.batch

    def by_forward() -> list[str]:
        best = generator.label_logprobs(asked, task.labels, batch=batch).argmax(-1).tolist()
        return [task.labels[i] for i in best]

    def by_generating(size: int) -> list[str]:
        return [
            label_in(text, task.labels)
            for text in complete(generator, asked, limit=limit, batch=size)
        ]

    return {
        "generation": compared(
            "generation",
            {
                f"ours: by length, batch {batch}": partial(
                    generator.complete, chats, max_new_tokens=limit, batch=batch
                ),
                f"generate as they come, batch {batch}": partial(
                    complete, generator, chats, limit=limit, batch=batch
                ),
                "generate one at a time": partial(complete, generator, chats, limit=limit, batch=1),
            },
            args.rounds,
            prompts=len(chats),
        ),
        "labels": compared(
            "labels",
            {
                f"ours: one forward pass, batch {batch}": by_forward,
                f"generate and parse, batch {batch}": partial(by_generating, batch),
                "generate and parse one at a time": partial(by_generating, 1),
            },
            args.rounds,
            prompts=len(asked),
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=LADDER_SIZES, default="1m")
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
