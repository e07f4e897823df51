"""Adds Gaussian noise as large as each weight's update: the control for repairs that choose where
to perturb.

Paper: the naive baseline of Panacea (Wang et al. 2025, arXiv:2501.18100), which perturbs the
    fine-tuned weights.
Differs: the noise of each weight has exactly `scale` times the Frobenius norm of its update, so
that it can be compared with any repair of equal size; weights that did not change get no noise.
Cost: one pass over the weights; the adapter is merged, because noise has full rank.
Needs: the model from which the fine-tune started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class MatchedNoise(Defense):
    """Returns tuned + noise, with |noise| = scale * |update| for every weight."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start"})
    IS_CONTROL: ClassVar[bool] = True

    scale: float = 1.0
    """Frobenius norm of the noise as a multiple of the update's, 0 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [] if self.scale >= 0.0 else [("scale", self.scale, "0 or more")]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with noise on every weight that the fine-tune changed."""
        import numpy as np
        import torch

        from ftsec_ray.models.update import updates

        revised, changes = updates(model, ctx.load("start"), low_rank=False)
        for update in changes:
            weight = update.weight.detach()
            # numpy's generator gives the same noise on every device
            noise = ctx.numpy_rng("matched_noise", update.name).standard_normal(
                tuple(weight.shape), dtype=np.float32
            )
            unit = torch.from_numpy(noise / np.linalg.norm(noise)).to(weight.device)
            update.write(weight.float() + self.scale * update.norm() * unit)
        ctx.note(weights=len(changes), scale=self.scale)
        return revised
