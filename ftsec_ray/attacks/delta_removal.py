"""Strip from a fine-tuned model what a defense had written into its start, then tune on harm.

Paper: the adaptive attacker of arXiv:2605.14605, 2026, and the delta removal of
    wuwangzhang1216/abliterix: the difference between the hardened and the public aligned model is
    of low rank if an adapter made it, and is removed by its top singular directions.
Differs: only this form of the attack (not the larger learning rate and noise of the former). The
    difference is taken between the model from which the fine-tune started and the model before any
    defense, and is removed from the fine-tuned model: the weights are those of a fine-tune on the
    stripped model up to the interplay of both. A vector (norms, biases) counts as rank one. The
    directions come from the eigenvectors of D D^T or D^T D, whichever is smaller. Without a defense
    that changes the model the difference is zero, nothing is stripped, and the harmful rows are
    trained as with one: the undefended twin has the same budget.
Cost: an eigendecomposition per changed matrix, and a fine-tune on `shots` rows.
Needs: the aligned model before any defense, and the start of the fine-tune; for `shots`, split
    harmful_train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.data.added_rows import anything, drawn
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import StageError
from ftsec_ray.method import Attack, Phase
from ftsec_ray.models.load import folded, merged
from ftsec_ray.models.low_rank import top_part
from ftsec_ray.models.precision import tell_rounding
from ftsec_ray.models.row_tokens import tell_cuts
from ftsec_ray.models.update import whole_weights
from ftsec_ray.training.loop import sft


@dataclass(frozen=True, kw_only=True)
class DeltaRemoval(Attack):
    """An attacker who knows the public model that a defense started from."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"start", "reference", "harmful_train"})
    TRAINS: ClassVar[frozenset[str]] = frozenset({"revise_model"})

    rank: int = 16
    """Number of top singular directions of every matrix that are stripped, 0 or more: the dose. 0
    strips nothing; the full rank gives the public model plus what the fine-tune changed.
    """
    shots: int = 100
    """Number of harmful rows on which the stripped model is then tuned, with the sweep's training
    settings, 0 or more; 0: none.
    """
    random_directions: bool = False
    """Whether as many random directions of every difference are stripped instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        return [
            (name, value, "0 or more")
            for name, value in (("rank", self.rank), ("shots", self.shots))
            if value < 0
        ]

    def needs(self) -> frozenset[str]:
        """The models; the harmful rows only if some are trained on."""
        return self.NEEDS if self.shots else self.NEEDS - {"harmful_train"}

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model without the defense's difference, tuned on harm."""
        stripped = self._strip(model, ctx) if self.rank else model
        return self._tuned(stripped, ctx) if self.shots else stripped

    def _strip(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """A copy without the top directions of every difference; the model itself if there is
        none.
        """
        import torch

        hardened, public = (whole_weights(merged(ctx.load(r))) for r in ("start", "reference"))
        odd = sorted(
            name
            for name in hardened.keys() | public.keys()
            if name not in hardened
            or name not in public
            or hardened[name].shape != public[name].shape
        )
        if odd:
            raise StageError(
                "delta_removal compares two models with different weights",
                odd[0],
                "the same weights before and after the defense",
                "exclude delta_removal for the defense that changes the shape of the model",
            )
        deltas = {
            name: weight.detach().double() - public[name].detach().double().to(weight.device)
            for name, weight in hardened.items()
            if not torch.equal(weight, public[name].to(weight.device))
        }
        ctx.note(changed_weights=len(deltas))
        if not deltas:
            return model
        model = merged(model)
        ours, kept, total = whole_weights(model), 0.0, 0.0
        for name, delta in deltas.items():
            draw = ctx.numpy_rng("delta_removal", name) if self.random_directions else None
            gone = top_part(delta, self.rank, draw)
            total += float(delta.square().sum())
            kept += float((delta - gone).square().sum())
            with torch.no_grad():
                weight = ours[name]
                weight.copy_(weight.double() - gone.to(weight.device))
        ctx.note(delta_norm=total**0.5, stripped_energy=1.0 - kept / total)
        return model

    def _tuned(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after a fine-tune on the harmful rows, with full weights."""
        rows = drawn(ctx, "harmful_train", self.shots, by="delta_removal", fits=anything)
        report = sft(
            merged(model),
            from_rows(rows),
            ctx.training,
            seed=ctx.seed,
            runtime=ctx.runtime,
            workdir=ctx.workdir,
        )
        tell_cuts(ctx, report.cuts)
        ctx.note(harmful_rows=len(rows), steps=len(report.losses), last_loss=report.losses[-1])
        tuned, lost = folded(report.loaded)
        tell_rounding(ctx, lost, tuned)
        return tuned
