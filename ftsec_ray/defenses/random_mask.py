"""Zeroes a random fraction of every weight's update: the control for pruning defenses of equal
density.

Paper: none (a control; Antidote, Huang et al. 2024, arXiv:2408.09600, chooses its mask).
Differs: the mask applies to the update and not to the weight, so that nothing of the start is lost;
kept entries are not scaled up (Yu et al. 2024, arXiv:2311.03099, scale them up and keep the attack
as well as the task).
Cost: one pass over the weights; the adapter is merged, because a masked product has full rank.
Needs: the model from which the fine-tune started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class RandomMask(Defense):
    """Keeps each entry of the update with probability 1 - frac, independently."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start"})
    IS_CONTROL: ClassVar[bool] = True

    frac: float = 0.5
    """Share of the entries that are reset to the start, 0 to 1."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [] if 0.0 <= self.frac <= 1.0 else [("frac", self.frac, "0 to 1")]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with a random part of every update removed."""
        import numpy as np
        import torch

        from ftsec_ray.models.update import updates

        revised, changes = updates(model, ctx.load("start"), low_rank=False)
        dropped = entries = 0
        for update in changes:
            weight = update.weight.detach()
            draws = ctx.numpy_rng("random_mask", update.name).random(
                tuple(weight.shape), dtype=np.float32
            )
            keep = torch.from_numpy(draws >= self.frac).to(weight.device)
            update.write(torch.where(keep, weight, update.start.detach().to(weight.device)))
            dropped, entries = dropped + int((~keep).sum()), entries + keep.numel()
        ctx.note(weights=len(changes), entries=entries, dropped=dropped)
        return revised
