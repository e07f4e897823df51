"""Takes a few gradient steps on one refusal: the control that every repair of safety must beat.

Paper: Safety at One Shot: Patching Fine-Tuned LLMs with A Single Instance (Zhang et al. 2026,
    arXiv:2601.01887): one safety row restores what fine-tuning took away.
Differs: written from the paper's abstract; its code was not read. The row is a random one of the
    task's refusals, not a chosen one. A step takes all `rows` together, at a constant learning
    rate, on a new adapter that is merged.
Cost: `steps` optimizer steps on `rows` rows.
Reads: look at over-refusal (`benign_rate`, `borderline_rate`) beside it: a model that has learned
    to refuse everything is safe too. `split: benign_train` takes the same steps on benign rows.
Needs: split safety (forbidden requests with refusals); benign_train with `split: benign_train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ftsec_ray.data.added_rows import drawn
from ftsec_ray.method import Defense, Phase, above_faults, least_faults
from ftsec_ray.training.repair import CONFLICTS_OF_TRAINING, repair_config, repair_sft

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class OneShotRepair(Defense):
    """A few steps on one refusal."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "benign_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"revise_model"})
    ORDER: ClassVar[int] = 10
    CONFLICTS: ClassVar[Mapping[str, str]] = CONFLICTS_OF_TRAINING
    IS_CONTROL: ClassVar[bool] = True

    rows: int = 1
    """Number of rows, 0 or more; 0 changes nothing."""
    steps: int = 5
    """Optimizer steps, each on all of these rows, 0 or more; 0 changes nothing."""
    learning_rate: float | None = None
    """Constant learning rate, more than 0; None: that of the sweep's fine-tune."""
    split: Literal["safety", "benign_train"] = "safety"
    """Refusals, or benign requests with answers: what the steps alone do."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [
            *least_faults(self, {"rows": 0, "steps": 0}),
            *(above_faults(self, "learning_rate") if self.learning_rate is not None else []),
        ]

    def needs(self) -> frozenset[str]:
        """The split of the rows."""
        return frozenset({self.split})

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after the steps, with the adapter merged."""
        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import merged

        if not self.rows or not self.steps:
            ctx.note(repair_rows=0, repair_steps=0, change_norm=0.0, change_share=0.0)
            return model
        rows = drawn(ctx, self.split, self.rows, by="one_shot_repair")
        config = repair_config(
            ctx,
            learning_rate=self.learning_rate or ctx.training.learning_rate,
            epochs=1.0,
            batch_size=self.rows,
            schedule="constant",
            warmup_frac=0.0,
        )
        before = merged(model)
        repaired = repair_sft(
            before, rows, config, ctx, shape=lambda training: replace(training, steps=self.steps)
        )
        ctx.note(repair_row_ids=[str(row["row_id"]) for row in rows[:8]])
        tell_change(ctx, before, repaired)
        return repaired
