"""What the tests of defenses share: random adapters, a context, and whole weights as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import LoadedModel, Runtime, StageContext, TaskData
from ftsec_ray.models.load import copy_model, merged
from ftsec_ray.models.lora import attach_lora
from tests.fixtures_models import tiny_task


def tiny_adapter(
    start: LoadedModel, *, seed: int = 1, size: float = 0.1, rank: int = 4
) -> LoadedModel:
    """A copy of `start` with a random adapter on every linear layer, as if it had been tuned."""
    tuned = copy_model(start)
    tuned.model.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = attach_lora(tuned, TrainingConfig(rank=rank), base_digest="start")
        for name, parameter in tuned.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=size)
    tuned.model.eval()
    return tuned


def tiny_full(start: LoadedModel, *, seed: int = 2, size: float = 0.05) -> LoadedModel:
    """A copy of `start` with noise on every weight, as if all of it had been tuned."""
    tuned = copy_model(start)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuned


def in_bfloat16(loaded: LoadedModel) -> LoadedModel:
    """The model itself with its weights in bfloat16."""
    loaded.model.to(torch.bfloat16)
    return loaded


def whole(loaded: LoadedModel) -> dict:
    """All weights as arrays, an adapter folded in."""
    return {
        name: weight.detach().numpy().copy()
        for name, weight in merged(loaded).model.named_parameters()
    }


def context(
    workdir: Path,
    *,
    task: TaskData | None = None,
    models: Mapping[str, LoadedModel] | None = None,
    seed: int = 0,
    training: TrainingConfig | None = None,
    runtime: Runtime | None = None,
) -> StageContext:
    """What a hook gets from the engine; `models` by role."""
    given = dict(models or {})
    return StageContext(
        seed=seed,
        task=task or tiny_task(),
        runtime=runtime or Runtime(),
        workdir=workdir,
        load=given.__getitem__,
        training=training
        or TrainingConfig(max_length=64, batch_size=4, epochs=1.0, rank=4, alpha=8.0),
    )
