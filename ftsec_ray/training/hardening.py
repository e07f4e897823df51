"""What defenses share that train the aligned model once more before the user's fine-tune: their
rows, the recipe of an adapter that is merged afterwards, and the record of its change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.conversation import Row
from ftsec_ray.data.pairs import REFUSALS
from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Phase, above_faults, least_faults
from ftsec_ray.registry import name_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.training.setup import Training

LEAST = {
    "safety_rows": 1,
    "benign_rows": 0,
    "batch_size": 1,
    "lora_rank": 1,
    "weight_decay": 0.0,
}
HARMFUL = "harmful_train"
BENIGN = "benign_train"


@dataclass(frozen=True, kw_only=True)
class Hardens(Defense):
    """Base of defenses that train an adapter on the aligned model, and merge it."""

    PHASE: ClassVar[Phase] = "pre"
    ORDER: ClassVar[int] = 10

    safety_rows: int = 256
    """Maximum number of refusal rows, 1 or more."""
    benign_rows: int = 256
    """Maximum number of benign rows mixed in, 0 or more: without them a small model learns to
    refuse everything."""
    epochs: float = 3.0
    """Passes over the refusals and the benign rows, above 0."""
    learning_rate: float = 1e-3
    """Peak learning rate of the optimizer, above 0."""
    batch_size: int = 16
    """Rows per optimizer step, 1 or more."""
    lora_rank: int = 8
    """Rank of the adapter that is trained and merged, 1 or more; its alpha is twice the rank."""
    weight_decay: float = 0.1
    """Weight decay of AdamW on the adapter, 0 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return least_faults(self, LEAST) + above_faults(self, "epochs", "learning_rate")

    def needs(self) -> frozenset[str]:
        """`benign_train` only if its rows are mixed in."""
        return self.NEEDS if self.benign_rows else self.NEEDS - {BENIGN}

    def _merged_sft(
        self,
        model: LoadedModel,
        rows: pa.Table,
        ctx: StageContext,
        *,
        shape: Callable[[Training], Training] | None = None,
        **settings: Any,
    ) -> LoadedModel:
        """The model after a fine-tune of a new adapter on `rows`, with the adapter merged.

        Args:
            model: The model to harden.
            rows: Rows of the plain loss.
            ctx: Where the record is written.
            shape: Replaces parts of the training.
            settings: Other settings of the training than those of the parameters.
        """
        from ftsec_ray.models.load import folded
        from ftsec_ray.models.precision import tell_rounding
        from ftsec_ray.models.row_tokens import tell_cuts
        from ftsec_ray.training.loop import sft

        given = {
            "adapter": "lora",
            # the settings of the user's adapter do not apply to the adapter that hardens the base
            "targets": "all-linear",
            "layers": None,
            "rslora": False,
            "quantization": "none",
            "rank": self.lora_rank,
            "alpha": 2.0 * self.lora_rank,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "schedule": "cosine",
            "warmup_frac": 0.1,
            "weight_decay": self.weight_decay,
        }
        report = sft(
            model,
            rows,
            replace(ctx.training, **{**given, **settings}),
            seed=ctx.seed,
            runtime=ctx.runtime,
            workdir=ctx.workdir,
            shape=shape,
        )
        tell_cuts(ctx, report.cuts)
        ctx.note(
            rows=rows.num_rows,
            steps=len(report.losses),
            first_loss=report.losses[0],
            last_loss=report.losses[-1],
            change_norm=change_norm(report.loaded),
        )
        hardened, lost = folded(report.loaded)
        tell_rounding(ctx, lost, hardened)
        return hardened

    def _plain_rows(self, ctx: StageContext) -> pa.Table:
        """The refusals and the benign rows."""
        import pyarrow as pa

        parts = [(REFUSALS, self.safety_rows), (BENIGN, self.benign_rows)]
        return pa.concat_tables(
            capped(ctx, split, count, by=name_of(self)) for split, count in parts if count
        )


def change_norm(tuned: LoadedModel) -> float:
    """Norm of the update of an adapter over all its layers."""
    from ftsec_ray.models.lora import lora_modules

    return float(
        sum(float(module.delta().double().square().sum()) for module in lora_modules(tuned)) ** 0.5
    )


def capped(
    ctx: StageContext,
    split: str,
    count: int,
    *,
    by: str,
    fits: Callable[[Row], bool] | None = None,
) -> pa.Table:
    """Up to `count` random rows of a split for the method `by`, chosen by the seed and the row ids,
    in the order of the split; DataError if none fits.
    """
    table = ctx.task.split(split)
    ids = table.column("row_id").to_pylist()
    places = list(range(len(ids)))
    if fits is not None:
        places = [i for i, row in enumerate(table.to_pylist()) if fits(row)]
        if not places:
            raise DataError(
                f"{by}: no row of split {split!r} of task {ctx.task.name!r} has a prompt and an"
                " answer",
                len(ids),
                "at least one such row",
                f"add rows to {split}, or leave out {by}",
            )
    chosen = sorted(places, key=lambda i: ctx.chance(ids[i], by))[:count]
    return table.take(sorted(chosen))
