"""Shrinks the whole update of the tune towards its start: the control that every repair of weights
must beat.

Paper: none (a control; compare WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, which averages
    start and tuned model).
Differs: applied to the adapter's factor B where an adapter is attached, which is the same update
    exactly.
Cost: one pass over the weights; no data, no gradient.
Needs: the model that tuning started from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class Shrink(Defense):
    """start + gamma * (tuned - start)."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start"})
    IS_CONTROL: ClassVar[bool] = True

    gamma: float = 0.5
    """Share of the update that stays, 0 (the start) to 1 (no change)."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [] if 0.0 <= self.gamma <= 1.0 else [("gamma", self.gamma, "0 to 1")]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with every update multiplied by `gamma`."""
        from ftsec_ray.models.update import updates

        revised, found = updates(model, ctx.load("start"), low_rank=True)
        for update in found:
            update.shrink(self.gamma)
        ctx.note(weights=len(found), gamma=self.gamma)
        return revised
