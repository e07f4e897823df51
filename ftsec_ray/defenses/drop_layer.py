"""Removes the whole update of some blocks or layers: the control for defenses that select where to
act.

Paper: none (a control: layer-wise projections such as Safe LoRA, arXiv:2405.16833, shrink the
chosen updates to almost nothing, so they must do better than removing them).
Differs: none.
Cost: one pass over the weights; no data, no gradient.
Needs: the model from which the fine-tune started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.update import Update


@dataclass(frozen=True, kw_only=True)
class DropLayer(Defense):
    """Sets the updates of a fraction of the blocks (or of single layers) to zero."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start"})
    IS_CONTROL: ClassVar[bool] = True

    frac: float = 0.5
    """Share of the groups that lose their update, 0 to 1, rounded to a whole number of groups."""
    order: Literal["last", "first", "lowest_norm", "highest_norm"] = "last"
    """Which groups are dropped first: the deepest, the shallowest, or those with the lowest or
    highest Frobenius norm of their update.
    """
    group: Literal["block", "layer"] = "block"
    """A transformer block with all its linear layers, or one linear layer; weights outside the
    blocks keep their update.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [] if 0.0 <= self.frac <= 1.0 else [("frac", self.frac, "0 to 1")]

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model without the updates of the chosen groups."""
        from ftsec_ray.models.update import updates

        revised, changes = updates(model, ctx.load("start"), low_rank=True)
        groups = self._groups(changes)
        count = int(self.frac * len(groups) + 0.5)
        chosen = self._ordered(groups)[:count]
        for name in chosen:
            for update in groups[name]:
                update.shrink(0.0)
        ctx.note(groups=len(groups), dropped=[str(name) for name in chosen])
        return revised

    def _groups(self, changes: list[Update]) -> dict[int | str, list[Update]]:
        groups: dict[int | str, list[Update]] = {}
        for update in changes:
            if update.layer is not None:
                groups.setdefault(
                    update.layer if self.group == "block" else update.module, []
                ).append(update)
        return groups

    def _ordered(self, groups: dict[int | str, list[Update]]) -> list[int | str]:
        """Group names in the order in which they are dropped; ties keep the order of the model."""
        if self.order in ("last", "first"):
            depth = {name: members[0].layer or 0 for name, members in groups.items()}
            return sorted(
                groups, key=lambda name: -depth[name] if self.order == "last" else depth[name]
            )
        norm = {name: sum(u.norm() ** 2 for u in members) for name, members in groups.items()}
        return sorted(
            groups, key=lambda name: norm[name] if self.order == "lowest_norm" else -norm[name]
        )
