"""The types that engine and methods exchange, and the context that a hook gets from the engine.

This module does not import torch, so that methods, plans and catalogues load in milliseconds.
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
"""A conversation: messages with `role` (system, user, assistant, tool), `content`, and other keys
that the chat template reads (`tool_calls`, ...); the available tools are a message of role `tools`.
"""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Information on a model besides its weights."""

    name: str
    """Name in the sweep."""
    family: str
    """Model family; sizes are compared only within a family."""
    parameters: int
    """Number of distinct weights (a tied embedding counts once)."""
    aligned: bool
    """Whether it is safety-aligned."""


@dataclass
class LoadedModel:
    """A causal language model in memory with its tokenizer; hooks may change `model` in place and
    return it.
    """

    model: Any
    """`transformers.PreTrainedModel`, or `peft.PeftModel` if an unmerged adapter is attached."""
    tokenizer: Any
    """`transformers.PreTrainedTokenizerBase` with a chat template."""
    info: ModelInfo
    base_digest: str | None = None
    """Digest of the base model's artifact if an adapter is attached; None for full weights."""
    quantization: str | None = None
    """Quantization of the linear layers under the adapter (`int8`, `nf4`); None: none."""
    attention: str | None = None
    """Attention implementation that the sweep sets; None: the default of transformers."""

    @property
    def has_adapter(self) -> bool:
        """Whether an unmerged LoRA adapter is attached."""
        return hasattr(self.model, "peft_config")


@dataclass(frozen=True)
class TaskData:
    """All rows of one task by split name (schema.ROWS), and the judge of answers to them."""

    name: str
    splits: Mapping[str, pa.Table]
    """train, test, harmful_train, harmful_test, safety, borderline_test, benign_train, benign_test,
    text; a task may lack some.
    """
    labels: tuple[str, ...]
    """Label words of the classification rows in `train` and `test`; empty for other tasks."""
    judge: str
    """Name of the judge of harmful and benign requests: see evals."""

    def split(self, name: str) -> pa.Table:
        """One split (schema.ROWS); DataError if the task has no rows in it."""
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
    """Several processes that train one model with DeepSpeed; never part of a digest."""

    workers: int
    """Processes, each with one GPU; without GPUs, each with an equal part of the CPU cores."""
    zero_stage: int
    """What is sharded across them. 0: nothing; 1: the optimizer state; 2: also gradients; 3: also
    weights.
    """
    micro_batch: int
    """Rows per forward pass of one process."""
    offload_optimizer: bool = False
    """Whether the optimizer state and its copy of the weights stay in host memory."""
    offload_parameters: bool = False
    """Whether the weights stay in host memory between their uses; only with stage 3."""
    gradient_checkpointing: bool = False
    """Whether the backward pass recomputes each block."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The runtime settings of a stage; only `numerics` is part of a digest."""

    device: str = "cpu"
    numerics: NumericsMode = "fast"
    """CPU kernels of the sweep's processes."""
    micro_batch: int | None = None
    """Rows per forward pass in training. None: chosen by the length of the rows."""
    eval_batch: int = 64
    """Prompts per generation batch."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints of a fine-tune."""
    timeout_s: float | None = None
    """Time limit of a stage in seconds, after which its process is killed. None: no limit."""
    ray_above: int = 100_000
    """Number of rows from which a data set is crafted in blocks; by Ray Data if the stage has
    pipeline workers.
    """
    gradient_checkpointing: bool = False
    """Whether the backward pass of training recomputes each block; gradients are the same."""
    worker_group: WorkerGroup | None = None
    """The worker group of this process; None if it trains alone."""


@dataclass
class StageContext:
    """The context of a hook: data, models and services of the engine."""

    seed: int
    task: TaskData
    runtime: Runtime
    workdir: Path
    """Work folder of the stage, for checkpoints; it is kept if the process is killed."""
    load: Callable[[str], LoadedModel]
    """Loads another model of the cell by role: `unaligned` (before alignment), `start` (before the
    fine-tune), ...
    """
    training: Any = None
    """TrainingConfig of the cell, for hooks that fine-tune."""
    served: Callable[[Any], Any] = field(default=lambda generator: generator, repr=False)
    """While the model answers: a generator -> the same as the defenses of the cell serve it, for an
    attack that knows them; elsewhere it changes nothing.
    """
    notes: dict[str, Any] = field(default_factory=dict)
    """Measurements for the stage's record.json (JSON values)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Measurements that are summed over all batches of rows."""
    warnings: list[str] = field(default_factory=list)
    """Warnings that `run`, `status` and the report show."""

    @cached_property
    def rng(self) -> random.Random:
        """A random generator for whole tables; for decisions on single rows, use `chance`."""
        return random.Random(int(digest(["rng", self.seed]), 16))  # noqa: S311

    def chance(self, row_id: str, *salt: str) -> float:
        """A number in [0, 1) that depends only on the seed, the row and `salt`."""
        return unit_interval(self.seed, row_id, *salt)

    def shuffled(self, split: str, *salt: str) -> list[dict[str, Any]]:
        """The rows of a split of the task in an order that depends only on the seed, the row ids
        and `salt`: the first n of them are a part of the first n + 1.
        """
        rows = self.task.split(split).to_pylist()
        return sorted(rows, key=lambda row: self.chance(row["row_id"], *salt))

    def numpy_rng(self, *salt: str) -> np.random.Generator:
        """A numpy generator that depends only on the seed and `salt`."""
        import numpy as np

        return np.random.default_rng(int(digest(["numpy", self.seed, *salt])[:16], 16))

    def note(self, **values: Any) -> None:
        """Add measurements, which must be JSON values, to the stage's record."""
        json.dumps(values)
        self.notes.update(values)

    def warn(self, text: str) -> None:
        """Add a warning that `run`, `status` and the report show.

        Args:
            text: One sentence with its numbers, without the name of the stage; equal warnings of
                several stages are shown in one line.
        """
        self.warnings.append(text)

    def count(self, **values: int) -> None:
        """Add to the measurements that the stage's record holds as sums over all batches."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + int(value)
