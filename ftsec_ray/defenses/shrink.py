"""Scales the whole update of the fine-tune down towards its start: the control for every repair of
weights.

Paper: none (a control; compare WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, which averages
    start and fine-tuned model).
Differs: with an adapter, the adapter's factor B is scaled, which is exactly the same update.
Cost: one pass over the weights; no data, no gradient.
Needs: the model from which the fine-tune started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class Shrink(Defense):
    """Returns start + gamma * (tuned - start)."""

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

        revised, changes = updates(model, ctx.load("start"), low_rank=True)
        for update in changes:
            update.shrink(self.gamma)
        ctx.note(weights=len(changes), gamma=self.gamma)
        return revised
