"""What defenses share that fine-tune the finished model further: the recipe, the rows, and the one
fine-tune with its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.data.added_rows import defenders_rows, is_exchange
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Fault, Phase, above_faults, least_faults

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.config.sweep import TrainingConfig
    from ftsec_ray.training.setup import Training

CONFLICTS_OF_TRAINING = {"antidote": "further training can bring back what was removed"}
"""`CONFLICTS` of every defense that fine-tunes the finished model further."""


@dataclass(frozen=True, kw_only=True)
class TunesOnCleanRows(Defense):
    """Base of defenses that fine-tune the finished model on trusted rows."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"benign_train", "trusted", "safety"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"revise_model"})
    CONFLICTS: ClassVar[Mapping[str, str]] = CONFLICTS_OF_TRAINING

    split: Literal["benign_train", "trusted", "safety"] = "benign_train"
    """The trusted rows: benign requests, held-out rows of the user's task, or refusals."""
    rows: int = 100
    """Maximum number of rows, 1 or more."""
    epochs: float = 5.0
    """Passes over the rows; 0 changes nothing."""
    learning_rate: float = 1e-3
    """Peak learning rate, more than 0."""
    batch_size: int = 8
    """Rows per optimizer step, 1 or more."""

    def check(self) -> list[Fault]:
        """Faults of the parameters beyond their types."""
        return [
            *least_faults(self, {"rows": 1, "epochs": 0.0, "batch_size": 1}),
            *above_faults(self, "learning_rate"),
        ]

    def needs(self) -> frozenset[str]:
        """The split of the rows."""
        return self.NEEDS - TunesOnCleanRows.NEEDS | {self.split}

    def _config(self, ctx: StageContext) -> TrainingConfig:
        return repair_config(
            ctx,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
        )


def repair_config(
    ctx: StageContext,
    *,
    learning_rate: float,
    epochs: float,
    batch_size: int,
    schedule: Literal["constant", "linear", "cosine"] = "cosine",
    warmup_frac: float = 0.1,
) -> TrainingConfig:
    """The recipe of the cell with a new adapter on all linear layers and without dropout: the
    settings of the user's adapter do not apply to the adapter that repairs the model.
    """
    config: TrainingConfig = replace(
        ctx.training,
        adapter="lora",
        targets="all-linear",
        layers=None,
        rslora=False,
        quantization="none",
        dropout=0.0,
        alpha=2.0 * ctx.training.rank,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        warmup_frac=warmup_frac,
    )
    return config


def exchanges_of(ctx: StageContext, split: str, count: int, *, by: str) -> list[dict[str, Any]]:
    """Up to `count` random rows of a split with a user's message and an answer, chosen as
    `defenders_rows` says, in the order of their ids: fewer rows are a part of more rows. DataError
    if there is none.
    """
    rows = defenders_rows(ctx, split, by)
    pool = [row for row in rows if is_exchange(row)]
    if not pool:
        raise DataError(
            f"{by}: no row of split {split!r} has a request and an answer",
            len(rows),
            "one row or more with both",
            f"give split {split!r} such rows, or use another split",
        )
    return sorted(pool[:count], key=lambda row: str(row["row_id"]))


def repair_sft(
    model: LoadedModel,
    rows: list[dict[str, Any]] | pa.Table,
    config: TrainingConfig,
    ctx: StageContext,
    *,
    shape: Callable[[Training], Training] | None = None,
    part: str = "repair",
) -> LoadedModel:
    """Fine-tune a copy of the model, with its adapter merged, on rows; the new adapter is merged.

    The record gets `<part>_rows`, `<part>_steps` and the first and last loss. Of a model with
    weights of fewer bits than float32, rounding is recorded too.
    """
    from ftsec_ray.models.load import folded
    from ftsec_ray.models.precision import tell_rounding
    from ftsec_ray.models.row_tokens import tell_cuts
    from ftsec_ray.training.loop import sft

    table = from_rows(rows) if isinstance(rows, list) else rows
    report = sft(
        model,
        table,
        config,
        seed=ctx.seed,
        runtime=ctx.runtime,
        # of its own, so that no fine-tune resumes from a checkpoint of another
        workdir=ctx.workdir / part,
        shape=shape,
    )
    tell_cuts(ctx, report.cuts)
    ctx.note(
        **{
            f"{part}_rows": table.num_rows,
            f"{part}_steps": len(report.losses),
            f"{part}_tokens": report.tokens,
            f"{part}_first_loss": report.losses[0],
            f"{part}_last_loss": report.losses[-1],
        }
    )
    repaired, lost = folded(report.loaded)
    tell_rounding(ctx, lost, repaired)
    return repaired
