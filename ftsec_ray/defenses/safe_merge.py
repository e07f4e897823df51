"""Mixes the update of a fine-tune on refusals into the layers where the user's update leaves the
directions of alignment.

Paper: SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via Selective
    Layer-Wise Model Merging (Djuhera et al. 2025, arXiv:2503.17239); official code
    aladinD/SafeMERGE.
Differs: (1) the official code mixes the factors of two adapters, which adds their cross terms; here
    the updates themselves are mixed. (2) The projection is that of `safe_lora` (`code`): no true
    projector, but only its cosine is used. (3) For a model without an adapter the update is the
    difference to the start. (4) The safe model is the start fine-tuned on the task's refusals with
    an adapter; everything is computed in float32 and rounded once.
Cost: one fine-tune on `safety_rows` rows; two more models in memory; one d x d product per layer.
Reads: `safe: zero` mixes in nothing and so shrinks the chosen updates by `tuned_weight`: the
    control. `tau: 1.01` merges every layer, `tau: -1.01` none.
Needs: split safety; the aligned model (`reference`), the same before alignment (`unaligned`), and
    the model from which the fine-tune started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.defenses.safe_lora import cosine, official_projection
from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Phase, above_faults, least_faults
from ftsec_ray.training.repair import exchanges_of, repair_config, repair_sft

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.update import Update

MATRIX = 2
"""Dimensions of a matrix."""


@dataclass(frozen=True, kw_only=True)
class SafeMerge(Defense):
    """In layers with a low cosine: tuned_weight * update + safe_weight * safe update."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "unaligned", "reference", "start"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"revise_model"})
    ORDER: ClassVar[int] = 20
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"safe": "zero"}

    tau: float = 0.35
    """Layers whose cosine between update and projected update is below it are merged; -1.01 to
    1.01. The official code: 0.35.
    """
    tuned_weight: float = 0.8
    """Weight of the user's update in a merged layer, 0 or more."""
    safe_weight: float = 0.2
    """Weight of the safe update in a merged layer, 0 or more."""
    safe: Literal["refusals", "zero"] = "refusals"
    """The safe update: that of a fine-tune on refusals, or nothing."""
    safety_rows: int = 128
    """Maximum number of refusals, 1 or more."""
    epochs: float = 5.0
    """Passes over the refusals, more than 0."""
    learning_rate: float | None = None
    """Peak learning rate on the refusals, more than 0; None: that of the sweep's fine-tune."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        most = 1.01
        return [
            *([] if -most <= self.tau <= most else [("tau", self.tau, "-1.01 to 1.01")]),
            *least_faults(self, {"tuned_weight": 0.0, "safe_weight": 0.0, "safety_rows": 1}),
            *above_faults(self, "epochs"),
            *(above_faults(self, "learning_rate") if self.learning_rate is not None else []),
        ]

    def needs(self) -> frozenset[str]:
        """The models, and refusals if they are trained on."""
        return self.NEEDS if self.safe == "refusals" else self.NEEDS - {"safety"}

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with the chosen layers merged, without an adapter."""
        import torch

        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import copy_model, merged
        from ftsec_ray.models.precision import narrow, tell_rounding, widened
        from ftsec_ray.models.update import updates, whole_weights

        # in float32 before an adapter is merged, so that weights are rounded once
        start, before = (merged(widened(one)) for one in (ctx.load("start"), model))
        made, changes = updates(copy_model(before), start, low_rank=False)
        cosines = self._cosines(changes, ctx)
        chosen = [update for update in changes if cosines.get(update.module, 2.0) < self.tau]
        safe: Mapping[str, Any] = {}
        if chosen and self.safe == "refusals":
            safe = whole_weights(self._safe_model(start, ctx))
        for update in chosen:
            base = update.start.detach().to(update.weight)
            mixed = base + self.tuned_weight * (update.weight.detach() - base)
            if update.name in safe:
                mixed += self.safe_weight * (safe[update.name].detach().to(base) - base)
            with torch.no_grad():
                update.write(mixed)
        tell_rounding(ctx, narrow(made, model), made)
        ctx.note(
            layers=len(cosines),
            merged=[update.module for update in chosen],
            cosines={name: round(value, 6) for name, value in cosines.items()},
        )
        tell_change(ctx, before, made, start)
        return made

    def _safe_model(self, start: LoadedModel, ctx: StageContext) -> LoadedModel:
        rows = exchanges_of(ctx, "safety", self.safety_rows, by="safe_merge")
        config = repair_config(
            ctx,
            learning_rate=self.learning_rate or ctx.training.learning_rate,
            epochs=self.epochs,
            batch_size=ctx.training.batch_size,
        )
        return repair_sft(start, rows, config, ctx, part="safety")

    def _cosines(self, changes: list[Update], ctx: StageContext) -> dict[str, float]:
        """Of every linear layer of a block that the fine-tune changed, the cosine between its
        update and the projected update; 0 where alignment changed nothing, as in the official code.
        """
        from ftsec_ray.models.update import whole_weights

        aligned, unaligned = (whole_weights(ctx.load(role)) for role in ("reference", "unaligned"))
        found, is_aligned = {}, False
        for update in changes:
            if update.weight.ndim != MATRIX or update.layer is None:
                continue
            V = self._alignment(update, aligned, unaligned)
            found[update.module] = 0.0
            if V.any():
                is_aligned, delta = True, update.delta()
                found[update.module] = cosine(official_projection(V.to(delta), delta), delta)
        if not is_aligned:
            raise StageError(
                "safe_merge: alignment changed none of the fine-tuned layers",
                len(changes),
                "a layer that both alignment and the fine-tune changed",
                "give the model as it was before alignment (`unaligned`)",
            )
        return found

    def _alignment(
        self, update: Update, aligned: Mapping[str, Any], unaligned: Mapping[str, Any]
    ) -> Tensor:
        """Aligned minus unaligned weight of a layer, (out, in) float32."""
        for weights in (aligned, unaligned):
            if update.name not in weights or weights[update.name].shape != update.weight.shape:
                raise StageError(
                    f"safe_merge: weight {update.name!r} has no counterpart of the same shape",
                    tuple(weights[update.name].shape) if update.name in weights else None,
                    str(tuple(update.weight.shape)),
                )
        one, other = (
            update.oriented(weights[update.name].detach().float())
            for weights in (aligned, unaligned)
        )
        return one - other
