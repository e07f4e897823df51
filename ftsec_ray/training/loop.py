"""The one training loop: LoRA or full, resumable to the byte, with every part replaceable by `shape_training`.

The same seed gives the same bytes on one machine: batches are a pure function of the step, dropout is re-seeded at each
step, and step checkpoints hold weights, optimizer moments and the methods' memory as safetensors. A tune that was killed
continues from its last checkpoint and ends with the bytes of an undisturbed one.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel, Runtime
from ftsec_ray.errors import DataError, StageError
from ftsec_ray.identity import digest
from ftsec_ray.models.load import count_parameters, merged
from ftsec_ray.models.lora import attach_lora, fused_lora
from ftsec_ray.spec.sweep import TrainingConfig
from ftsec_ray.training.encode import batcher, encode_table, steps_per_epoch
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import Batch, Objective, Step, Training

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor
    from torch.optim import AdamW


@dataclass
class TuneReport:
    """A finished tune."""

    loaded: LoadedModel
    """The tuned model; a LoRA adapter is attached and not merged."""
    losses: list[float] = field(default_factory=list)
    """Loss of every step, nats per response token."""
    tokens: int = 0
    """Tokens that went through the model, padding left out."""
    flops: float = 0.0
    """6 x weights x tokens for full tuning, 4 x for an adapter (no weight gradients of the base)."""


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Learning rate of a step: linear warm-up from 0, then constant, linear to 0, or cosine to 0."""
    warmup = config.warmup_frac * total
    if step + 1 < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1.0, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.learning_rate * min(1.0, max(0.0, factor))


def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:  # noqa: ANN401
    """The plain backward: gradients of the token-weighted mean loss over a step's micro-batches; returns that loss."""
    total = 0.0
    for batch in batches:
        loss = objective(model, batch, step) * batch.weight
        loss.backward()
        total += float(loss.detach())
    return total


def plain_training(loaded: LoadedModel, rows: pa.Table, config: TrainingConfig, *, seed: int, runtime: Runtime) -> Training:
    """The tune of `rows` before any method has shaped it."""
    make = partial(batcher, loaded.tokenizer, batch_size=config.batch_size, batching=config.batching, seed=seed,
                   micro_batch=runtime.micro_batch, device=runtime.device)
    encoded = encode_table(loaded.tokenizer, rows, max_length=config.max_length)
    steps = max(1, round(config.epochs * steps_per_epoch(len(encoded), config.batch_size)))

    def encode(other: pa.Table, salt: str) -> Callable[[int], list[Batch]]:
        return make(encode_table(loaded.tokenizer, other, max_length=config.max_length), salt=salt)

    return Training(config=config, steps=steps, batch_at=make(encoded), objective=response_nll, backward=backward,
                    encode=encode, is_trainable=lambda name: True)


def sft(loaded: LoadedModel, rows: pa.Table, config: TrainingConfig, *, seed: int, runtime: Runtime, workdir: Path,
        shape: Callable[[Training], Training] | None = None, base_digest: str | None = None) -> TuneReport:
    """Fine-tune a copy of `loaded` on `rows` (schema.ROWS); `shape` may replace parts of the training first."""
    import torch

    training = plain_training(loaded, rows, config, seed=seed, runtime=runtime)
    if shape is not None:
        training = shape(training)
    tuned = merged(loaded)
    tuned.model.to(runtime.device).requires_grad_(requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(_seed(seed, "adapter"))
        if config.adapter == "lora":
            tuned = attach_lora(tuned, config, base_digest=base_digest)
        return run(tuned, training, seed=seed, runtime=runtime, workdir=workdir)


def run(loaded: LoadedModel, training: Training, *, seed: int, runtime: Runtime, workdir: Path) -> TuneReport:
    """Train `loaded` in place, from the last checkpoint under `workdir` if there is one."""
    import torch

    model, config = loaded.model, training.config
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and training.is_trainable(name))
    step = Step(0, training.steps, trainable={n: p for n, p in model.named_parameters() if p.requires_grad})
    if not step.trainable:
        raise StageError("nothing trains", config.adapter, "at least one trainable weight", "check the methods that freeze layers")
    optimizer = torch.optim.AdamW(step.trainable.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    report = TuneReport(loaded)
    _resume(workdir, optimizer, step, report)
    saved_at = time.monotonic()
    model.train()
    with fused_lora(model):
        while step.index < training.steps:
            _one_step(model, training, optimizer, step, report, seed=seed, runtime=runtime)
            step.index += 1
            if step.index < training.steps and time.monotonic() - saved_at >= runtime.checkpoint_every_s:
                _checkpoint(workdir, optimizer, step, report)
                saved_at = time.monotonic()
    model.eval()
    report.flops = (6.0 if config.adapter == "full" else 4.0) * count_parameters(model) * report.tokens
    return report


def _one_step(model: Any, training: Training, optimizer: AdamW, step: Step, report: TuneReport, *, seed: int,  # noqa: ANN401
              runtime: Runtime) -> None:
    import torch

    config = training.config
    torch.manual_seed(_seed(seed, "step", step.index))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step.index, training.steps)
    batches = training.batch_at(step.index)
    with torch.autocast(runtime.device.split(":")[0], torch.bfloat16, enabled=_has_bf16(runtime.device)):
        loss = training.backward(model, batches, training.objective, step)
    if not math.isfinite(loss):
        raise StageError("the loss is not a number", f"{loss} at step {step.index}", "a finite loss", "lower training.learning_rate")
    if config.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(step.trainable.values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for hook in training.after_step:
        hook(model, step)
    report.losses.append(loss)
    report.tokens += sum(int(b.input_ids.numel() if b.attention_mask is None else b.attention_mask.sum()) for b in batches)


def _seed(*parts: object) -> int:
    return int(digest(["training", *parts])[:15], 16)


def _has_bf16(device: str) -> bool:
    import torch

    return device.startswith("cuda") and torch.cuda.is_bf16_supported()


def _checkpoint(workdir: Path, optimizer: AdamW, step: Step, report: TuneReport) -> None:
    """Write step `index` aside, then rename; older checkpoints go last."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in step.trainable.items():
        state = optimizer.state[parameter]
        tensors |= {f"weight/{name}": parameter.detach(), f"m/{name}": state["exp_avg"], f"v/{name}": state["exp_avg_sq"],
                    f"t/{name}": state["step"]}
    tensors |= {f"memory/{key}": value for key, value in step.memory.items()}
    final = workdir / f"step-{step.index:08d}"
    part = workdir / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part / "state.safetensors")
    (part / "state.json").write_text(json.dumps({"index": step.index, "total": step.total, "losses": report.losses,
                                                 "tokens": report.tokens}), encoding="utf-8")
    part.rename(final)
    for old in workdir.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def _resume(workdir: Path, optimizer: AdamW, step: Step, report: TuneReport) -> None:
    import torch
    from safetensors.torch import load_file

    found = sorted(workdir.glob("step-*")) if workdir.exists() else []
    if not found:
        return
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    if state["total"] != step.total:
        raise DataError("a checkpoint of another tune", state["total"], f"{step.total} steps", f"remove {found[-1].name} from the work folder")
    tensors = load_file(found[-1] / "state.safetensors")
    with torch.no_grad():
        for name, parameter in step.trainable.items():
            parameter.copy_(tensors[f"weight/{name}"])
            optimizer.state[parameter] = {"exp_avg": tensors[f"m/{name}"].to(parameter.device),
                                          "exp_avg_sq": tensors[f"v/{name}"].to(parameter.device), "step": tensors[f"t/{name}"]}
    step.memory.update({key.removeprefix("memory/"): value for key, value in tensors.items() if key.startswith("memory/")})
    step.index = state["index"]
    report.losses, report.tokens = list(state["losses"]), state["tokens"]
