"""What `shape_training` takes and gives: the parts of a tune, each a plain function of the step.

The loop asks `batch_at(step)` for the rows of a step, so a tune that continues after a kill needs
the step number and the saved tensors only. `objective` gives the loss of one micro-batch,
`backward` leaves gradients on the trainable weights for one whole batch, `after_step` runs behind
the optimizer. Whatever a method must remember between steps it keeps as tensors in `step.memory`,
which step checkpoints save and restore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import TrainingConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Encoded rows. Shapes: input_ids, labels (-100 where no loss), attention_mask, position_ids
    (B, T) int64; packed rows come as (1, T) without attention_mask, and the positions that start
    anew keep them apart.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None = None
    weight: float = 1.0
    """Share of the step's response tokens in this micro-batch."""

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a forward pass; without a cache, or transformers would not keep
        packed rows apart.
        """
        given = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return {name: tensor for name, tensor in given.items() if tensor is not None} | {
            "use_cache": False
        }


@dataclass
class Step:
    """Where a tune stands."""

    index: int
    total: int
    memory: dict[str, Tensor] = field(default_factory=dict)
    trainable: dict[str, Any] = field(default_factory=dict)
    """Trainable parameters by name."""
    summed: Callable[[float], float] = float
    """Sum of a number over the processes of the tune, each of which sees its own micro-batches; all
    must ask at once.
    """


@dataclass(frozen=True)
class Saved:
    """A step checkpoint."""

    state: dict[str, Any]
    """index, total, losses, tokens."""
    tensors: dict[str, Tensor]
    """Under `weight/`, `m/`, `v/`, `t/` (weight, moments and count of steps of each trained weight)
    and `memory/`.
    """


Objective = Callable[[Any, Batch, Step], "Tensor"]
"""(model, micro-batch, step) -> () float32 loss, mean nats per response token of the micro-batch.
"""
Backward = Callable[[Any, "list[Batch]", Objective, Step], float]
"""(model, micro-batches of one step, objective, step) -> loss; leaves `.grad` on every trainable
weight. In a worker group these are the micro-batches of one process, and the gradients are wherever
DeepSpeed keeps them: call the backward that was there.
"""
AfterStep = Callable[[Any, Step], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One tune, taken apart so that a method can replace a part with `dataclasses.replace`."""

    config: TrainingConfig
    steps: int
    batch_at: Callable[[int], list[Batch]]
    """Step number -> its micro-batches: a pure function, so that it can be asked again after a
    kill.
    """
    objective: Objective
    backward: Backward
    is_trainable: Callable[[str], bool]
    """Name of a parameter -> whether it trains, among those that the adapter or full tuning would
    train.
    """
    after_step: tuple[AfterStep, ...] = ()
    encode: Callable[[pa.Table, str], Callable[[int], list[Batch]]]
    """(rows, salt) -> a `batch_at` for other rows, encoded and batched as the tune's own but drawn
    with another salt.
    """
