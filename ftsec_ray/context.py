"""The values that pass between the engine and the methods, and all that a running stage may ask of
the engine.

Nothing here imports torch: methods, plans and catalogues load in milliseconds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.errors import DataError
from ftsec_ray.identity import digest, unit_interval
from ftsec_ray.numerics import NumericsMode

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Chat = list[dict[str, Any]]
"""A conversation: messages with `role` (system, user, assistant, tool), `content`, and what else
the model's template reads (`tool_calls`, ...); functions on offer are a message of role `tools`.
"""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model besides its weights."""

    name: str
    """As the sweep calls it."""
    family: str
    """Models are compared by size only within a family."""
    parameters: int
    """Count of distinct weights (a tied embedding counts once)."""
    aligned: bool
    """Whether it went through a safety alignment."""


@dataclass
class LoadedModel:
    """A causal language model in memory with its tokenizer; hooks may change `model` in place and
    return it.
    """

    model: Any
    """`transformers.PreTrainedModel`, or `peft.PeftModel` when an adapter is attached and not
    merged.
    """
    tokenizer: Any
    """`transformers.PreTrainedTokenizerBase` with a chat template."""
    info: ModelInfo
    base_digest: str | None = None
    """Digest of the artifact under the adapter; None when the weights are whole."""
    quantization: str | None = None
    """How the linear layers under the adapter are packed (`int8`, `nf4`); None: not at all."""
    attention: str | None = None
    """Attention implementation that the sweep names; None: what transformers takes."""

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is attached and not merged."""
        return hasattr(self.model, "peft_config")


@dataclass(frozen=True)
class TaskData:
    """All rows of one task by split name (schema.ROWS), and what is needed to judge answers to
    them.
    """

    name: str
    splits: Mapping[str, pa.Table]
    """train, test, harmful_train, harmful_test, safety, borderline_test, benign_train, benign_test,
    text; a task may lack some.
    """
    labels: tuple[str, ...]
    """The label words of the classification rows in `train` and `test`; empty where there are none.
    """
    judge: str
    """Name of the judge of harmful and benign requests: see evals."""

    def split(self, name: str) -> pa.Table:
        """One split (schema.ROWS); DataError when the task has none of that name or it is empty."""
        table = self.splits.get(name)
        if table is None or table.num_rows == 0:
            raise DataError(
                f"task {self.name!r} has no rows in split {name!r}",
                name,
                " | ".join(k for k, v in sorted(self.splits.items()) if v.num_rows),
                f"give the task a source for {name!r}, or leave out the method that needs it",
            )
        return table


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """How several processes train one model together by DeepSpeed: never part of a digest."""

    workers: int
    """Processes, one GPU each, or one share of the cores each where there is no GPU."""
    zero_stage: int
    """What is split over them: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
    """
    micro_batch: int
    """Rows per forward pass of one process."""
    offload_optimizer: bool = False
    """Whether the optimizer's state and its copy of the weights stay in host memory."""
    offload_parameters: bool = False
    """Whether the weights stay in host memory between their uses; with stage 3 only."""
    gradient_checkpointing: bool = False
    """Whether each block is computed again in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a stage runs; of this only `numerics` is part of a digest."""

    device: str = "cpu"
    numerics: NumericsMode = "fast"
    """Which CPU kernels the processes of the sweep are started with."""
    micro_batch: int | None = None
    """Rows per forward pass in training; None: chosen by length."""
    eval_batch: int = 64
    """Prompts per generation batch."""
    checkpoint_every_s: float = 60.0
    """Seconds between step checkpoints of a tune."""
    timeout_s: float | None = None
    """Seconds that a stage may take, until its process is ended; None: as long as it takes."""
    ray_above: int = 100_000
    """Rows from which on a set is crafted in blocks, by Ray Data where the stage has workers for
    it.
    """
    gradient_checkpointing: bool = False
    """Whether training computes each block again in the backward pass; gradients are the same."""
    worker_group: WorkerGroup | None = None
    """The worker group that this process belongs to; None where it trains alone."""


@dataclass
class StageContext:
    """What a hook may ask of the engine."""

    seed: int
    task: TaskData
    runtime: Runtime
    workdir: Path
    """Scratch of this stage that survives a kill: step checkpoints go here."""
    load: Callable[[str], LoadedModel]
    """Load another model of the cell by role: `unaligned` (the twin before alignment), `start`
    (what tuning started from).
    """
    training: Any = None
    """TrainingConfig of the sweep, for hooks that tune."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Measurements that the hook wants in its record.json (JSON values)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Measurements that add up over the batches of a set."""
    warnings: list[str] = field(default_factory=list)
    """What whoever reads the results has to know: `run`, `status` and the report show it."""

    @cached_property
    def rng(self) -> random.Random:
        """A generator for draws over whole tables; for the fate of single rows use `chance`."""
        return random.Random(int(digest(["rng", self.seed]), 16))  # noqa: S311

    def chance(self, row_id: str, *salt: str) -> float:
        """A number in [0, 1) that depends on the seed, the row and `salt` only."""
        return unit_interval(self.seed, row_id, *salt)

    def numpy_rng(self, *salt: str) -> np.random.Generator:
        """A numpy generator decided by the seed and `salt`."""
        import numpy as np

        return np.random.default_rng(int(digest(["numpy", self.seed, *salt])[:16], 16))

    def note(self, **values: Any) -> None:
        """Keep measurements in the stage's record; they must be JSON values."""
        json.dumps(values)
        self.notes.update(values)

    def warn(self, text: str) -> None:
        """Have `run`, `status` and the report say something to whoever reads the results.

        One sentence with its numbers, without the name of the stage. Stages that say the same are
        told in one line.
        """
        self.warnings.append(text)

    def count(self, **values: int) -> None:
        """Add to measurements that stand in the stage's record as sums over all batches of rows."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + int(value)
