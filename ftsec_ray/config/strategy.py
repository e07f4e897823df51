"""In how many processes a tune runs: the keys of `training` that say where and how, and are never
part of a digest.

`training: {adapter: full, strategy: auto, deepspeed_above: 3.0e9, deepspeed: {zero_stage: 2,
offload: optimizer, workers: 4}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.typed import build, unknown_keys
from ftsec_ray.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """How DeepSpeed deals a model out; what is left to `auto` is the smallest that fits by the
    memory table.
    """

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """What is split over the workers: 0 nothing, 1 the optimizer's state, 2 gradients too, 3
    weights too.
    """
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in host memory: the optimizer's state (stage 1 or more), or weights as well (stage
    3).
    """
    workers: Annotated[int, Ge(1)] | None = None
    """Processes of a tune, one GPU each; None: the GPUs of a stage, with `gpus_per_stage: auto` as
    few as fit, without GPUs two.
    """
    micro_batch: Annotated[int, Ge(1)] | None = None
    """Rows per forward pass of one worker; None: that of `resources`, else what fits."""

    def __post_init__(self) -> None:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage != "auto" and self.zero_stage < least:
            raise SpecError(
                f"offload: {self.offload} under a ZeRO stage that does not split it",
                self.zero_stage,
                f"zero_stage: auto, or {least} or more",
                "leave zero_stage out",
            )


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Whether a tune runs in one process or in several by DeepSpeed."""

    strategy: Literal["auto", "single", "deepspeed"] = "auto"
    """`auto`: one process where that suffices, else DeepSpeed; `single` and `deepspeed` without
    looking.
    """
    deepspeed_above: Annotated[float, Gt(0)] | None = None
    """Weights above which `auto` takes DeepSpeed; None: where one process does not fit on one GPU
    by the memory table.
    """
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Whether each block is computed again in the backward pass: less memory, more time, equal
    gradients. `auto`: on a GPU where a tune does not fit otherwise by the memory table; never on a
    CPU.
    """
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How DeepSpeed runs."""


def split_training(
    given: object, known: type, faults: Faults
) -> tuple[object, StrategyConfig | None]:
    """What is left of the `training` of a sweep file for the identity of its tunes, and the
    strategy, None with faults.
    """
    if not isinstance(given, Mapping):
        return given, StrategyConfig()
    own = {f.name for f in fields(StrategyConfig)}
    all_keys = {f.name for f in fields(known)} | own
    unknown_keys(given, all_keys, "training", faults)
    before = len(faults.found)
    deepspeed = build(DeepSpeedConfig, given.get("deepspeed"), "training.deepspeed", faults)
    rest: dict[str, Any] = {
        key: value for key, value in given.items() if key in own - {"deepspeed"}
    }
    if isinstance(rest.get("gradient_checkpointing"), bool):  # how YAML reads on and off
        rest["gradient_checkpointing"] = "on" if rest["gradient_checkpointing"] else "off"
    strategy = build(StrategyConfig, rest, "training", faults, deepspeed=deepspeed)
    identity = {key: value for key, value in given.items() if key in all_keys - own}
    return identity, strategy if len(faults.found) == before else None
