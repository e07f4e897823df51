"""Moves the aligned model further in the few directions in which alignment moved every matrix.

Paper: Perin, Chen, Chen, Hirata, Wang, Hong 2025, LoX: Low-Rank Extrapolation Robustifies LLM
    Safety Against Fine-tuning, arXiv:2506.15606: W + coefficient * U_k S_k V_k^T, where U S V^T is
    the change of W by alignment; official code VITA-Group/LoX.
Differs: the change is that from the unaligned twin to the model as it is given, so that it fits a
    model that another method has changed. The directions come from the eigenvectors of D D^T or
    D^T D, whichever is smaller. Vectors (norms, biases) stay. The default rank is one of the range
    to sweep, 1 to 16; a rank of 0 takes the whole change, as in the official command line.
Published: attack success falls by 11 to 54 points (absolute) under benign or malicious fine-tuning,
    according to the abstract.
Cost: an eigendecomposition per changed matrix, once per base model; no data, no gradient, one more
    model in memory.
Reads: too large a coefficient breaks the model: look at `benign_rate` and `cacc`. `delta_removal`
    is the attacker who knows the model before it.
Needs: the same model before alignment (`unaligned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

NAME = "lox"


@dataclass(frozen=True, kw_only=True)
class LoX(Defense):
    """Extrapolation of alignment in its top directions."""

    PHASE: ClassVar[Phase] = "pre"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"unaligned"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_directions": True}

    coefficient: float = 1.0
    """How far to go on, as a multiple of what alignment did in these directions, 0 or more: the
    dose. 0 changes nothing; sweep it from 0.5 to 2.
    """
    rank: int = 6
    """Top singular directions of every matrix, 0 or more; 0 takes all of them."""
    random_directions: bool = False
    """Whether as many random directions of every change, scaled to the same norm, are taken
    instead: the control. A matrix that has no more than `rank` directions gives all of them
    either way."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = [
            (name, value, "0 or more")
            for name, value in (("coefficient", self.coefficient), ("rank", self.rank))
            if value < 0
        ]
        if self.random_directions and self.rank == 0:
            faults.append(("rank", 0, "1 or more with `random_directions`: 0 takes all of them"))
        return faults

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model moved on in the directions of alignment."""
        import torch

        from ftsec_ray.models.change import check_counterparts
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.precision import Rounding, is_half, tell_rounding
        from ftsec_ray.models.update import whole_weights

        moved, unaligned = merged(model), merged(ctx.load("unaligned"))
        check_counterparts(
            NAME,
            moved,
            unaligned,
            "the model before alignment",
            fix="give the twin of the same architecture as `unaligned`",
        )
        before, rounding = whole_weights(unaligned), Rounding()
        changed, total, taken = 0, 0.0, 0.0
        for name, weight in whole_weights(moved).items():
            if weight.ndim != 2 or torch.equal(weight, before[name].to(weight)):  # noqa: PLR2004
                continue
            old = weight.detach().clone()
            delta = old.double() - before[name].detach().double().to(old.device)
            draw = ctx.numpy_rng(NAME, name) if self.random_directions else None
            part = self.coefficient * self._part(delta, draw)
            changed, total = changed + 1, total + float(delta.square().sum())
            taken += float(part.square().sum())
            if self.coefficient:
                with torch.no_grad():
                    weight.copy_(old.double() + part)
                rounding.add(old, old.double() + part, weight)
        if not changed:
            raise StageError(
                "lox: alignment changed no matrix",
                0,
                "a model that differs from its unaligned twin",
                "give the model as it was before alignment (`unaligned`)",
            )
        ctx.note(matrices=changed, alignment_norm=total**0.5, change_norm=taken**0.5)
        tell_rounding(ctx, rounding.lost_frac if is_half(moved.model) else None, moved)
        return moved

    def _part(self, delta: Tensor, draw: np.random.Generator | None) -> Tensor:
        """What is added of a change, before the coefficient: (out, in) float64 -> same."""
        from ftsec_ray.models.low_rank import top_part

        rank = self.rank or min(delta.shape)
        top: Tensor = top_part(delta, rank)
        if draw is None or rank >= min(delta.shape):
            return top
        random: Tensor = top_part(delta, rank, draw)
        scaled: Tensor = random * (top.norm() / random.norm())
        return scaled
