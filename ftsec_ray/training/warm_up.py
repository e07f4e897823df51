"""A short fine-tune on the user's rows before the real one, for filters that read what a model
learns from them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.models.load import merged
from ftsec_ray.models.row_tokens import tell_cuts
from ftsec_ray.training.loop import sft

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import LoadedModel, StageContext


def warmed_up(ctx: StageContext, rows: pa.Table, epochs: float | None) -> LoadedModel:
    """The cell's aligned model, fine-tuned on the rows by the sweep's recipe without quantization.

    A killed warm-up continues from its step checkpoint.

    Args:
        ctx: The context of the hook; the method needs the role `reference`.
        rows: The user's rows.
        epochs: Passes over the rows; None: as many as the sweep's recipe, 0: no training.
    """
    model = ctx.load("reference")
    if epochs == 0 or not rows.num_rows:
        loaded = merged(model)
    else:
        config = ctx.training or TrainingConfig()
        config = replace(
            config, quantization="none", epochs=config.epochs if epochs is None else epochs
        )
        report = sft(model, rows, config, seed=ctx.seed, runtime=ctx.runtime, workdir=ctx.workdir)
        tell_cuts(ctx, report.cuts)
        ctx.note(warm_up_steps=len(report.losses), warm_up_loss=report.losses[-1])
        loaded = merged(report.loaded)
    loaded.model.to(ctx.runtime.device).eval()
    return loaded
