"""What `shape_training` takes and returns: the parts of a fine-tune, each a function of the step.

The loop calls `batch_at(step)` for the rows of a step, so that a resumed fine-tune needs only the
step number and the saved tensors. `objective` gives the loss of one micro-batch, `backward` leaves
gradients on the trainable weights for one whole batch, `after_step` runs after the optimizer. A
method keeps what it must remember between steps as tensors in `step.memory`; step checkpoints save
and restore them.
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
    (B, T) int64; packed rows are (1, T) without attention_mask, and restarting positions separate
    them.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None = None
    weight: float = 1.0
    """Share of the step's response tokens in this micro-batch."""

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a forward pass; without a cache, because transformers would not
        separate packed rows with one.
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
    """The current position of a fine-tune."""

    index: int
    total: int
    memory: dict[str, Tensor] = field(default_factory=dict)
    trainable: dict[str, Any] = field(default_factory=dict)
    """Trainable parameters by name."""
    summed: Callable[[float], float] = float
    """Sum of a number over the processes of the fine-tune, each with its own micro-batches; all
    processes must call it at the same point.
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
weight. In a worker group these are the micro-batches of one process, and DeepSpeed stores the
gradients elsewhere: call the previous backward instead of `loss.backward()`.
"""
AfterStep = Callable[[Any, Step], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One fine-tune in parts, so that a method can replace a part with `dataclasses.replace`."""

    config: TrainingConfig
    rows: pa.Table
    """The fine-tune's rows (schema.ROWS), as all methods have left them."""
    steps: int
    batch_at: Callable[[int], list[Batch]]
    """Step number -> its micro-batches: a pure function, so that a resumed fine-tune can call it
    again.
    """
    objective: Objective
    backward: Backward
    is_trainable: Callable[[str], bool]
    """Name of a parameter -> whether it trains, among those that the adapter or full fine-tuning
    trains.
    """
    after_step: tuple[AfterStep, ...] = ()
    encode: Callable[[pa.Table, str], Callable[[int], list[Batch]]]
    """(rows, salt) -> a `batch_at` for other rows, encoded and batched like the fine-tune's own but
    shuffled with another salt.
    """
