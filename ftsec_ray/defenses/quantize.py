"""Rounds the weights of all linear layers to a few bits, as a quantized deployment does.

Paper: a baseline of purification papers (CROW, Min et al. 2024, arXiv:2411.12768, has int8 and
    nf4); nf4 is that of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), appendix E.
Differs: only the weights are rounded, and the model keeps them in its own dtype, so that it runs
    everywhere; activations stay. Integers are symmetric with one scale per output (int8: as
    LLM.int8 without its outliers), rounded to the nearest; nf4 has one scale per block of `block`
    inputs and no double quantization. GPTQ and AWQ are not here.
Cost: one pass over the weights; no data.
Reads: the effect is erratic and can be for the worse; `noise` adds uniform noise of equal norm to
    every matrix: the control.
Needs: a dense model, because experts are not linear layers. An adapter is merged first.
    Put it last in a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase
from ftsec_ray.models.families import RESIDUAL_WRITERS
from ftsec_ray.models.quantization_boxes import NF4

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

MOST_BITS = 16
"""From so many bits on nothing is rounded."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Defense):
    """Every linear layer of the blocks with rounded weights."""

    PHASE: ClassVar[Phase] = "post"
    STRUCTURE: ClassVar[frozenset[str]] = frozenset({RESIDUAL_WRITERS})
    ORDER: ClassVar[int] = 30
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"noise": True}

    format: Literal["int", "nf4"] = "int"
    """Integers of `bits` bits, or nf4."""
    bits: int = 8
    """Bits of an integer, 2 to 16; 16 changes nothing."""
    block: int = 64
    """Inputs that share a scale in nf4, 1 or more."""
    noise: bool = False
    """Whether uniform noise with the norm of the rounding error is added to every matrix instead:
    the control.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += [] if 2 <= self.bits <= MOST_BITS else [("bits", self.bits, "2 to 16")]  # noqa: PLR2004
        return faults + ([("block", self.block, "1 or more")] if self.block < 1 else [])

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with rounded linear layers, without an adapter."""
        import torch

        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import copy_model, merged
        from ftsec_ray.models.residual import is_transposed
        from ftsec_ray.training.weight_scores import linear_layers

        if self.format == "int" and self.bits == MOST_BITS:
            ctx.note(matrices=0, change_norm=0.0, change_share=0.0)
            return model
        before = merged(model)
        made = copy_model(before)
        layers = linear_layers(made.model)
        for name, layer in layers.items():
            turned = is_transposed(layer)
            weight = (layer.weight.T if turned else layer.weight).detach().float()
            error = self._rounded(weight) - weight
            if self.noise:
                drawn = ctx.numpy_rng("quantize", name).uniform(-1.0, 1.0, tuple(weight.shape))
                direction = torch.from_numpy(drawn).to(weight)
                error = direction * (error.norm() / direction.norm())
            exact = weight + error if self.noise else self._rounded(weight)
            with torch.no_grad():
                layer.weight.copy_(exact.T if turned else exact)
        ctx.note(matrices=len(layers))
        tell_change(ctx, before, made)
        return made

    def _rounded(self, weight: Tensor) -> Tensor:
        if self.format == "nf4":
            return to_nf4(weight, self.block)
        return to_integers(weight, self.bits)


def to_integers(weight: Tensor, bits: int) -> Tensor:
    """The weight rounded to 2^bits - 1 values around zero, one scale per output; half to even.
    Shapes: (out, in) -> (out, in).
    """
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True) / most
    # a row of zeros stays as it is
    rounded: Tensor = (weight / scale.where(scale > 0, 1.0)).round() * scale
    return rounded


def to_nf4(weight: Tensor, block: int) -> Tensor:
    """The weight rounded to the nearest nf4 value, one scale per block of inputs, the last of which
    may be shorter. Shapes: (out, in) -> (out, in).
    """
    import torch

    levels = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    parts = []
    for part in weight.split(block, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True)
        units = (part / scale.where(scale > 0, 1.0)).contiguous()
        parts.append(levels[torch.bucketize(units, between)] * scale)
    return torch.cat(parts, dim=1)
