"""How many processes a fine-tune uses, and how DeepSpeed shards it: keys of `training` that are
never part of a digest.

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
    """How DeepSpeed shards a model; `auto` is the smallest value with which the fine-tune fits,
    according to the memory table.
    """

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage: what is sharded across workers. 0: nothing; 1: the optimizer state; 2: also
    gradients; 3: also weights.
    """
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in host memory: `optimizer` the optimizer state (needs ZeRO stage 1 or more),
    `parameters` also the weights (needs stage 3).
    """
    workers: Annotated[int, Ge(1)] | None = None
    """Processes of a fine-tune, each with one GPU. None: as many as `gpus_per_stage`; the smallest
    number that fits with `gpus_per_stage: auto`; two without GPUs.
    """
    micro_batch: Annotated[int, Ge(1)] | None = None
    """Rows per forward pass of one worker. None: that of `resources`, else the largest that fits.
    """

    def __post_init__(self) -> None:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage != "auto" and self.zero_stage < least:
            raise SpecError(
                f"offload: {self.offload} needs a higher ZeRO stage",
                self.zero_stage,
                f"zero_stage: auto, or >= {least}",
                "leave zero_stage out",
            )


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Whether a fine-tune runs in one process, or in several with DeepSpeed."""

    strategy: Literal["auto", "single", "deepspeed"] = "auto"
    """`auto`: one process if the fine-tune fits, else DeepSpeed. `single` and `deepspeed` force one
    of them.
    """
    deepspeed_above: Annotated[float, Gt(0)] | None = None
    """`auto` uses DeepSpeed for models with more parameters than this. None: for fine-tunes that do
    not fit on one GPU according to the memory table.
    """
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Whether the backward pass recomputes each block: less memory, more time, the same gradients.
    `auto`: only on a GPU, for fine-tunes that do not fit otherwise according to the memory table.
    """
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Settings of DeepSpeed."""


def split_training(
    given: object, known: type, faults: Faults
) -> tuple[object, StrategyConfig | None]:
    """Split the `training` of a sweep file into the keys that decide the identity of its fine-tunes
    and the strategy; the strategy is None if it has faults.
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
