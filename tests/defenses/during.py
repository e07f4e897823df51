"""What the tests of defenses that act during the fine-tune share: a fine-tune with and without one,
and the properties that each of them must have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import LoadedModel, Runtime, StageContext, TaskData
from ftsec_ray.conversation import answer_of, exchange
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.method import Method
from ftsec_ray.models.load import merged
from ftsec_ray.training.loop import TuneReport, plain_training, sft
from ftsec_ray.training.setup import Training
from tests.defenses.shared import context as plain_context
from tests.fixtures_models import sentiment_rows, table, tiny_model, tiny_task
from tests.killed_tune import killed_after

USERS = table(sentiment_rows(20))
CONFIG = TrainingConfig(max_length=64, batch_size=4, epochs=2.0, rank=4, learning_rate=1e-2)


def mixed_task() -> TaskData:
    """The tiny task, with a shorter row, a row of two turns, one with a system message, and one
    without an answer in the splits of requests.
    """
    task = tiny_task()

    def more(name: str) -> list[dict[str, Any]]:
        rows = task.split(name).to_pylist()
        first = answer_of(rows[0])
        turns = [*exchange("fix the lamp", "take the tree"), *exchange("make cloud", first)]
        made = [
            exchange("make stone", first),
            [{**m, "loss": m["role"] == "assistant"} for m in turns],
            exchange("do make the red lamp and cloud", first, system="be careful"),
            exchange("how do i", ""),
        ]
        odd = [
            {**rows[0], "row_id": f"{name}/odd{i}", "messages": messages}
            for i, messages in enumerate(made)
        ]
        return [*rows, *odd]

    names = ("safety", "benign_train", "harmful_train")
    return replace(task, splits={**task.splits, **{name: table(more(name)) for name in names}})


def context(start: LoadedModel | None = None, **given: Any) -> StageContext:
    """A context whose start model is `start`; the model before alignment is another one."""
    models = {
        "start": start or tiny_model(),
        "unaligned": given.pop("unaligned", None) or tiny_model(seed=9, aligned=False),
    }
    given.setdefault("task", mixed_task())
    return plain_context(Path("unused"), models=models, training=CONFIG, **given)


def shaped(
    method: Method,
    start: LoadedModel | None = None,
    *,
    rows: pa.Table = USERS,
    runtime: Runtime | None = None,
    config: TrainingConfig = CONFIG,
    ctx: StageContext | None = None,
) -> tuple[Training, Training]:
    """The plain fine-tune, and the one that the method made of it."""
    start, runtime = start or tiny_model(), runtime or Runtime()
    plain = plain_training(start, rows, config, seed=0, runtime=runtime)
    return plain, method.shape_training(plain, ctx or context(start))


def tuned(
    method: Method | None,
    workdir: Path,
    *,
    start: LoadedModel | None = None,
    rows: pa.Table = USERS,
    runtime: Runtime | None = None,
    config: TrainingConfig = CONFIG,
    ctx: StageContext | None = None,
) -> TuneReport:
    """A whole fine-tune with the method, or a plain one."""
    start = start or tiny_model()
    ctx = ctx or context(start)
    return sft(
        start,
        rows,
        config,
        seed=0,
        runtime=runtime or Runtime(),
        workdir=workdir,
        shape=None if method is None else lambda training: method.shape_training(training, ctx),
        base_digest="b" * 32,
    )


def weights(report: TuneReport) -> dict[str, np.ndarray]:
    """All weights after a fine-tune, an adapter folded in, as float32."""
    model = merged(report.loaded).model
    return {n: w.detach().float().numpy().copy() for n, w in model.named_parameters()}


def are_equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether two sets of weights are the same to the bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def assert_plain(method: Method, workdir: Path, *, dropout: float = 0.0) -> None:
    """A fine-tune with the method ends with the bits of a plain one."""
    config = TrainingConfig(**{**CONFIG.__dict__, "dropout": dropout})
    plain, own = (
        weights(tuned(one, workdir / name, config=config))
        for name, one in (("plain", None), ("own", method))
    )
    assert are_equal(own, plain)


def assert_resumes(method: Method, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine-tune that is killed and goes on ends with the bits of an undisturbed one, which are
    not those of a plain one; its notes are the same as well.
    """
    runtime, noted = Runtime(checkpoint_every_s=0.0), []

    def run(name: str) -> TuneReport:
        ctx = context()
        report = tuned(method, workdir / name, runtime=runtime, ctx=ctx)
        noted.append(ctx.notes)
        return report

    want = run("whole")
    killed_after(4, lambda: run("killed"), monkeypatch)
    again = run("killed")
    assert again.losses == want.losses
    assert are_equal(weights(again), weights(want))
    assert noted[0] == noted[-1]
    assert not are_equal(weights(want), weights(tuned(None, workdir / "plain")))


def assert_half_precision(method: Method, workdir: Path) -> None:
    """On a start model in bfloat16 the method trains an adapter in float32, and acts."""
    start = tiny_model()
    start.model.to(torch.bfloat16)
    with_it, without = (
        tuned(one, workdir / name, start=start) for name, one in (("own", method), ("plain", None))
    )
    assert all(np.isfinite(loss) for loss in with_it.losses)
    trained = {n: p for n, p in with_it.loaded.model.named_parameters() if "lora_" in n}
    other = dict(without.loaded.model.named_parameters())
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not all(torch.equal(p, other[n]) for n, p in trained.items())


def assert_micro_batches_add_up(method: Method, *, rel: float = 1e-9) -> None:
    """The gradient of a step does not depend on how the step is split into micro-batches; call it
    in float64.
    """
    found = []
    for size in (None, 3):
        start = tiny_model()
        _, training = shaped(method, start, runtime=Runtime(micro_batch=size))
        model = moved(start).model.train()
        found.append(gradient(training, model))
    assert len(found[0]) == len(found[1]) > 0
    for name, want in found[0].items():
        assert float((found[1][name] - want).abs().max()) <= rel * max(1.0, float(want.abs().max()))


def gradient(training: Training, model: Any, index: int = 0) -> dict[str, torch.Tensor]:
    """What the backward pass of a step leaves on the weights."""
    from ftsec_ray.training.setup import Step

    step = Step(index, training.steps, trainable=dict(model.named_parameters()))
    training.backward(model, training.batch_at(index), training.objective, step)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def moved(start: LoadedModel, *, size: float = 0.05) -> LoadedModel:
    """A copy of the start model some way off, in its dtype."""
    other = merged(start)
    with torch.no_grad():
        for i, weight in enumerate(other.model.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            weight.add_(size * noise.to(weight.dtype))
    return other


def assert_composes_with_lisa(method: Method, workdir: Path) -> None:
    """In a stack with Lisa, before it or behind it, the fine-tune is finite and neither has the
    weights of one of them alone.
    """
    lisa = Lisa(rho=1.0, align_steps=1, user_steps=2)

    class Stack:
        def __init__(self, *members: Method) -> None:
            self.members = members

        def shape_training(self, training: Training, ctx: StageContext) -> Training:
            for member in self.members:
                training = member.shape_training(training, ctx)
            return training

    alone = [weights(tuned(one, workdir / str(i))) for i, one in enumerate((lisa, method))]
    for i, stack in enumerate((Stack(lisa, method), Stack(method, lisa))):
        report = tuned(stack, workdir / f"stack{i}")  # type: ignore[arg-type]
        assert all(np.isfinite(loss) for loss in report.losses)
        assert not any(are_equal(weights(report), one) for one in alone)
