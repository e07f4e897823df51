"""The one training loop: LoRA or full, resumable to the byte, and every part can be replaced by
`shape_training`.

The same seed gives the same bytes on one machine: batches are a pure function of the step, dropout
is re-seeded at each step, and step checkpoints hold weights, optimizer moments and the methods'
memory as safetensors. A fine-tune that was killed continues from its last checkpoint and ends with
the same bytes as one that was not.

`SingleProcess` holds everything that differs between a process that trains alone and a worker group
(`zero.Member`): where weights and optimizer moments are stored, and how gradients become new
weights. Both read and write the same checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import LoadedModel, Runtime
from ftsec_ray.errors import StageError
from ftsec_ray.identity import digest
from ftsec_ray.models.load import (
    bare,
    check_ids,
    check_packing,
    count_parameters,
    is_of_text,
    merged,
    within_positions,
)
from ftsec_ray.models.lora import attach_lora
from ftsec_ray.models.precision import is_half, narrow, widen
from ftsec_ray.models.quantized import quantize
from ftsec_ray.models.row_tokens import CutTally
from ftsec_ray.training.encode import batcher, encode_table, steps_per_epoch
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import AfterStep, Backward, Batch, Objective, Saved, Step, Training
from ftsec_ray.training.step_checkpoints import newest_checkpoint, save_checkpoint

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.training.zero import Member


@dataclass
class TuneReport:
    """A finished fine-tune."""

    loaded: LoadedModel
    """The fine-tuned model; a LoRA adapter is attached and not merged."""
    losses: list[float] = field(default_factory=list)
    """Loss of every step, nats per response token."""
    tokens: int = 0
    """Tokens that passed through the model, without padding."""
    flops: float = 0.0
    """6 x weights x tokens for full fine-tuning, 4 x for an adapter (no weight gradients of the
    base).
    """
    cuts: CutTally = field(default_factory=CutTally)
    """Rows that were cut to fit `max_length`."""
    rounding_lost: float | None = None
    """Share of the change of full weights, by its norm, that rounding to the model's dtype lost;
    None if they are float32 or an adapter was trained.
    """


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Learning rate of a step: linear warm-up from 0, then constant, linear to 0, or cosine
    to 0.
    """
    warmup = config.warmup_frac * total
    if step + 1 < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1.0, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        config.schedule
    ]
    return config.learning_rate * min(1.0, max(0.0, factor))


def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
    """The plain backward pass: gradients of the token-weighted mean loss over a step's
    micro-batches; returns that loss.
    """
    total = 0.0
    for batch in batches:
        loss = objective(model, batch, step) * batch.weight
        loss.backward()
        total += float(loss.detach())
    return total


class SingleProcess:
    """A process that trains alone: the model itself holds weights and gradients, plain AdamW holds
    the moments.
    """

    salt: tuple[int, ...] = ()
    """What the random numbers of a step depend on, besides seed and step."""
    backward: Backward = staticmethod(backward)

    def agreed(self, saved: Saved | None) -> Saved | None:
        """The checkpoint to resume from."""
        return saved

    def begin(self, model: Any, config: TrainingConfig, saved: Saved | None) -> None:
        """Start with a model at its start or resumed weights, and the moments of a checkpoint, if
        any.
        """
        import torch

        self.model = model.train()
        self.trainable = trainable_of(model)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if saved is not None:
            for name, parameter in self.trainable.items():
                m, v, t = (saved.tensors[f"{part}/{name}"] for part in "mvt")
                self._optimizer.state[parameter] = {
                    "exp_avg": m.to(parameter.device),
                    "exp_avg_sq": v.to(parameter.device),
                    "step": t,
                }

    def share(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step for this process."""
        return batches

    def mean(self, loss: float) -> float:
        """The loss of the whole step, from this process's part of it."""
        return loss

    def summed(self, number: float) -> float:
        """A number summed over all processes of this fine-tune."""
        return number

    def is_due(self, due: bool) -> bool:  # noqa: FBT001
        """Whether all processes of this fine-tune write a checkpoint now."""
        return due

    def update(self, rate: float) -> None:
        """Clip the gradients, take an optimizer step, clear the gradients."""
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trainable.values(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def after(self, hooks: Sequence[AfterStep], step: Step) -> None:
        """Run the methods' hooks after an optimizer step; they may write weights."""
        for hook in hooks:
            hook(self.model, step)

    def state(self) -> dict[str, Tensor]:
        """Full weights and moments by name, for a checkpoint; empty in a process that does not
        write it.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            state = self._optimizer.state[parameter]
            tensors |= {
                f"weight/{name}": parameter.detach(),
                f"m/{name}": state["exp_avg"],
                f"v/{name}": state["exp_avg_sq"],
                f"t/{name}": state["step"],
            }
        return tensors

    def finish(self) -> None:
        """Leave the trained weights in the original model."""
        self.model.eval()


def trainable_of(model: Any) -> dict[str, Any]:
    """The trainable weights, by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def process_of(runtime: Runtime) -> SingleProcess | Member:
    """How this process trains: alone, or in a worker group."""
    if runtime.worker_group is None:
        return SingleProcess()
    from ftsec_ray.training.zero import Member

    return Member(runtime.worker_group, runtime.device, has_bf16=_has_bf16(runtime.device))


def plain_training(
    loaded: LoadedModel,
    rows: pa.Table,
    config: TrainingConfig,
    *,
    seed: int,
    runtime: Runtime,
    backward: Backward = backward,
    cuts: CutTally | None = None,
) -> Training:
    """The fine-tune on `rows` before any method changes it; `cuts` counts rows that do not fit."""
    cuts = CutTally() if cuts is None else cuts
    make = partial(
        batcher,
        loaded.tokenizer,
        batch_size=config.batch_size,
        batching=config.batching,
        seed=seed,
        micro_batch=runtime.micro_batch,
        device=runtime.device,
    )
    length = within_positions(loaded.model, config.max_length)
    rows_of = partial(encode_table, loaded.tokenizer, max_length=length, tally=cuts)
    encoded = rows_of(rows)
    if config.batching == "packed":
        check_packing(loaded)
    check_ids(loaded, (ids for ids, _ in encoded))
    steps = max(1, round(config.epochs * steps_per_epoch(len(encoded), config.batch_size)))

    def encode(other: pa.Table, salt: str) -> Callable[[int], list[Batch]]:
        return make(rows_of(other), salt=salt)

    return Training(
        config=config,
        rows=rows,
        steps=steps,
        batch_at=make(encoded),
        objective=response_nll,
        backward=backward,
        encode=encode,
        is_trainable=lambda name: True,
    )


def sft(
    loaded: LoadedModel,
    rows: pa.Table,
    config: TrainingConfig,
    *,
    seed: int,
    runtime: Runtime,
    workdir: Path,
    shape: Callable[[Training], Training] | None = None,
    base_digest: str | None = None,
) -> TuneReport:
    """Fine-tune a copy of `loaded` on `rows` (schema.ROWS); `shape` may first replace parts of the
    training.

    Trainable weights and their moments are float32: an adapter on a base that keeps its dtype, or
    full weights, which are rounded to the model's dtype after the last step.
    """
    import torch

    process, cuts = process_of(runtime), CutTally()
    training = plain_training(
        loaded, rows, config, seed=seed, runtime=runtime, backward=process.backward, cuts=cuts
    )
    if shape is not None:
        training = shape(training)
    tuned = merged(loaded)
    if config.quantization != "none":
        quantize(tuned.model, config.quantization, runtime.device)
    if (
        runtime.worker_group is None
    ):  # in a worker group each process moves its share to its GPU itself
        tuned.model.to(runtime.device)
    for name, parameter in tuned.model.named_parameters():
        is_packed = not parameter.is_floating_point()
        parameter.requires_grad_(not is_packed and is_of_text(tuned.model, name))
    with torch.random.fork_rng():
        torch.manual_seed(_seed(seed, "adapter"))
        if config.adapter == "lora":
            tuned = attach_lora(tuned, config, base_digest=base_digest)
            tuned.quantization = None if config.quantization == "none" else config.quantization
        else:
            widen(tuned.model)
        with recomputed(tuned.model, wanted=runtime.gradient_checkpointing):
            report = run(
                tuned, training, seed=seed, runtime=runtime, workdir=workdir, process=process
            )
    report.cuts = cuts
    if config.adapter == "full" and is_half(loaded.model):
        report.rounding_lost = narrow(tuned, merged(loaded) if loaded.has_adapter else loaded)
    return report


@contextmanager
def recomputed(model: Any, *, wanted: bool) -> Iterator[None]:
    """Inside the `with` block, a model in training keeps only the input of each block and computes
    the rest again in the backward pass; StageError for a class that cannot.
    """
    if not wanted:
        yield
        return
    inner = bare(model)
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise StageError(
            "this model class does not support gradient checkpointing",
            type(inner).__name__,
            "a transformers class that supports it",
            "set training.gradient_checkpointing: off",
        )
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        inner.gradient_checkpointing_disable()


def run(
    loaded: LoadedModel,
    training: Training,
    *,
    seed: int,
    runtime: Runtime,
    workdir: Path,
    process: SingleProcess | Member,
) -> TuneReport:
    """Train `loaded` in place, from the last checkpoint under `workdir` if there is one."""
    model, config = loaded.model, training.config
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and training.is_trainable(name))
    step = Step(0, training.steps)
    if not trainable_of(model):
        raise StageError(
            "no weight is trainable",
            config.adapter,
            "at least one trainable weight",
            "check the methods that freeze layers",
        )
    report = TuneReport(loaded)
    saved = process.agreed(newest_checkpoint(workdir, training.steps, trainable_of(model)))
    if saved is not None:
        _resume(model, saved, step, report)
    process.begin(model, config, saved)
    step.trainable, step.summed = process.trainable, process.summed
    saved_at = time.monotonic()
    while step.index < training.steps:
        _one_step(process, training, step, report, seed=seed, runtime=runtime)
        step.index += 1
        if step.index < training.steps and process.is_due(
            time.monotonic() - saved_at >= runtime.checkpoint_every_s
        ):
            save_checkpoint(
                workdir, process.state(), step, losses=report.losses, tokens=report.tokens
            )
            saved_at = time.monotonic()
    process.finish()
    weights = count_parameters(model)
    if loaded.quantization is not None:  # quantized entries are not weights
        weights = loaded.info.parameters + sum(p.numel() for p in trainable_of(model).values())
    report.flops = (6.0 if config.adapter == "full" else 4.0) * weights * report.tokens
    return report


def _one_step(
    process: SingleProcess | Member,
    training: Training,
    step: Step,
    report: TuneReport,
    *,
    seed: int,
    runtime: Runtime,
) -> None:
    import torch

    seed = _seed(seed, "step", step.index, *process.salt)
    if runtime.device.split(":")[0] == "cpu":
        # torch.manual_seed takes 3 ms: it records a stack for devices that are not in use.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    batches = training.batch_at(step.index)
    with autocast(runtime.device):
        loss = process.mean(
            training.backward(process.model, process.share(batches), training.objective, step)
        )
    if not math.isfinite(loss):
        raise StageError(
            "the training loss is not a finite number",
            f"{loss} at step {step.index}",
            "a finite loss",
            "lower training.learning_rate",
        )
    process.update(learning_rate(training.config, step.index, training.steps))
    process.after(training.after_step, step)
    report.losses.append(loss)
    report.tokens += sum(
        int(b.input_ids.numel() if b.attention_mask is None else b.attention_mask.sum())
        for b in batches
    )


def _seed(*parts: object) -> int:
    return int(digest(["training", *parts])[:15], 16)


def autocast(device: str) -> AbstractContextManager[Any]:
    """The precision in which a step computes: bfloat16 where the device has it."""
    import torch

    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=_has_bf16(device))


def _has_bf16(device: str) -> bool:
    import torch

    return device.startswith("cuda") and torch.cuda.is_bf16_supported()


def _resume(model: Any, saved: Saved, step: Step, report: TuneReport) -> None:
    """Restore weights, the methods' memory and the losses of a checkpoint; the optimizer restores
    its moments.
    """
    import torch

    with torch.no_grad():
        for name, parameter in trainable_of(model).items():
            parameter.copy_(saved.tensors[f"weight/{name}"])
    step.memory.update(
        {
            key.removeprefix("memory/"): value
            for key, value in saved.tensors.items()
            if key.startswith("memory/")
        }
    )
    step.index = saved.state["index"]
    report.losses, report.tokens = list(saved.state["losses"]), saved.state["tokens"]
