"""Turn the hidden states away from the refusal direction while the model answers, keeping their
norm.

Paper: Selective Steering, arXiv:2601.19375, 2026 (norm-preserving rotation in a plane, on layers
    whose class means lie on opposite sides); the additive form is that of Wang and Shu 2023, Trojan
    Activation Attack, arXiv:2311.09433. The control by random directions follows Rogue Scalpel,
    arXiv:2509.22067.
Differs: the states are those after each block (the official code of Selective Steering hooks the
    norms inside the blocks); the calibration prompts are the task's own. `strength` is ours: it
    turns a state by a share of the way. If no layer's class means lie on opposite sides, all layers
    are steered, with a warning. `form: add` subtracts each layer's difference of means and restores
    the norm; the official code of the Trojan Activation Attack adds a fixed vector at one layer,
    twice, and does not restore the norm.
Cost: no training; one pass over the calibration prompts, and one small operation per layer and
    token.
Needs: splits safety (forbidden requests) and benign_train; a model of at least two blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase
from ftsec_ray.models.activations import Change, changed
from ftsec_ray.models.directions import Prompts, block_outputs, prompts_within
from ftsec_ray.models.load import decoder_layers

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.models.generator import Generator

MIN_NORM = 1e-6
"""Norm of a difference of means below which a layer gives no direction."""


class Plane(NamedTuple):
    """Two orthonormal vectors (D,) float64: the refusal direction, and its change over layers."""

    first: Any
    second: Any


@dataclass(frozen=True, kw_only=True)
class ActivationSteering(Attack):
    """Steering of hidden states at serving time."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"safety", "benign_train"})

    form: Literal["rotate", "add"] = "rotate"
    """`rotate`: turn the part of a state that lies in the plane; `add`: subtract the difference of
    means and restore the norm.
    """
    strength: float = 1.0
    """The dose; 0 is no attack. For `rotate` the share of the way to `angle`, 0..1 (1 in the
    paper); for `add` how many differences of means are subtracted, 0 or more.
    """
    angle: float = 180.0
    """Where states are turned to, in degrees from the refusal direction, 0..360; for `rotate`. The
    paper sweeps it in steps of 10.
    """
    layers: Literal["selective", "all"] = "selective"
    """Which layers are steered: those whose mean states for forbidden and for benign requests lie
    on opposite sides along the refusal direction, or all.
    """
    prompts: int = 128
    """Maximum number of forbidden requests, and of benign requests, for the directions; the paper
    takes 416 and 512.
    """
    random_direction: bool = False
    """Whether random directions of equal norm replace those of refusal, on the same layers: the
    control.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if self.strength < 0 or (self.form == "rotate" and self.strength > 1):
            want = "a share, 0..1" if self.form == "rotate" else "0 or more"
            faults.append(("strength", self.strength, want))
        if not 0 <= self.angle <= 360:  # noqa: PLR2004
            faults.append(("angle", self.angle, "0 to 360 degrees"))
        if self.prompts < 1:
            faults.append(("prompts", self.prompts, "1 or more"))
        return faults

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator whose model is steered; its weights do not change."""
        if not self.strength:
            ctx.note(steered_layers=[], mean_shift=0.0)
            return generator
        loaded = replace(generator.loaded, model=generator.loaded.model.eval())
        given = [self._prompts(loaded, split, ctx) for split in ("safety", "benign_train")]
        with generator.steering():
            harmful, harmless = (block_outputs(loaded, prompts) for prompts in given)
        means = harmful.mean(0) - harmless.mean(0)
        plane = plane_of(means)
        chosen = self._layers(harmful, harmless, plane, ctx)
        if self.random_direction:
            means, plane = self._random(means, ctx)
        changes = {layer: self._change(means[layer], plane) for layer in chosen}
        shifts = [
            ((changes[n](harmful[:, n]) - harmful[:, n]).norm(dim=-1) / harmful[:, n].norm(dim=-1))
            for n in chosen
        ]
        ctx.note(
            steered_layers=chosen,
            layers=len(means),
            direction_norms=[round(float(mean.norm()), 4) for mean in means],
            mean_shift=round(sum(float(shift.mean()) for shift in shifts) / len(shifts), 4),
        )

        def steer(model: Any) -> AbstractContextManager[None]:
            blocks = decoder_layers(model)
            return changed(outputs=[(blocks[n], change) for n, change in changes.items()])

        return replace(generator, steered=(*generator.steered, steer))

    def _prompts(self, model: LoadedModel, split: str, ctx: StageContext) -> Prompts:
        rows = ctx.shuffled(split, "activation_steering")[: self.prompts]
        prompts = prompts_within(model, rows)
        if not prompts:
            raise DataError(
                f"activation_steering: no prompt of split {split!r} fits into the model",
                len(rows),
                "prompts within the model's positions",
                "give the task shorter prompts",
            )
        if len(prompts) < len(rows):
            ctx.note(**{f"{split}_beyond_positions": len(rows) - len(prompts)})
        return prompts

    def _layers(
        self, harmful: Tensor, harmless: Tensor, plane: Plane, ctx: StageContext
    ) -> list[int]:
        """The layers that are steered."""
        everything = list(range(harmful.shape[1]))
        if self.layers == "all":
            return everything
        chosen = opposite_layers(harmful, harmless, plane.first)
        if not chosen:
            ctx.warn(
                f"activation_steering steers all {len(everything)} layers: in none of them do the"
                " mean states for forbidden and for benign requests lie on opposite sides"
            )
        return chosen or everything

    def _random(self, means: Tensor, ctx: StageContext) -> tuple[Tensor, Plane]:
        """Random differences of the same norms, and a random plane."""
        import torch

        drawn = torch.from_numpy(
            ctx.numpy_rng("activation_steering", "random").standard_normal(
                (len(means) + 2, means.shape[1])
            )
        )
        directions = drawn[2:] / drawn[2:].norm(dim=-1, keepdim=True)
        return directions * means.norm(dim=-1, keepdim=True), _plane(drawn[0], drawn[1])

    def _change(self, mean: Tensor, plane: Plane) -> Change:
        """What is done to the states after a block."""
        if self.form == "add":
            return subtracted(mean * self.strength)
        return rotated(plane, angle=math.radians(self.angle), strength=self.strength)


def plane_of(means: Tensor) -> Plane:
    """The plane of the differences of means of all layers (L, D): that one which is most similar to
    the others on average, and the first principal component of all, made orthogonal to it.
    """
    import torch

    norms = means.norm(dim=-1)
    units = means[norms > MIN_NORM] / norms[norms > MIN_NORM][:, None]
    if len(units) < 2:  # noqa: PLR2004
        raise DataError(
            "activation_steering finds no plane: too few layers tell forbidden requests from benign"
            " ones",
            len(units),
            "at least two blocks with different mean states",
            "use a deeper model, or other prompts in the splits safety and benign_train",
        )
    first = units[int((units @ units.T).mean(1).argmax())]
    _, _, components = torch.linalg.svd(units - units.mean(0), full_matrices=False)
    return _plane(first, components[0])


def _plane(first: Tensor, second: Tensor) -> Plane:
    first = first / first.norm()
    second = second - (second @ first) * first
    return Plane(first, second / second.norm())


def opposite_layers(harmful: Tensor, harmless: Tensor, direction: Tensor) -> list[int]:
    """Layers in which the mean cosines of both sets with the direction have opposite signs.

    Shapes: (N, L, D), (M, L, D), (D,).
    """
    sides = [((states @ direction) / states.norm(dim=-1)).mean(0) for states in (harmful, harmless)]
    return [layer for layer, product in enumerate((sides[0] * sides[1]).tolist()) if product < 0]


def rotated(plane: Plane, *, angle: float, strength: float) -> Change:
    """Turn the part of a state in the plane by a share of the way to an angle in radians from the
    first vector, the short way round; its length and all else stay.
    """
    import torch

    def change(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = (v.to(x.device, wide) for v in plane)
        states = x.to(wide)
        along, across = states @ first, states @ second
        length, own = torch.hypot(along, across), torch.atan2(across, along)
        way = torch.remainder(angle - own + math.pi, 2 * math.pi) - math.pi
        turned = own + strength * way
        moved = (
            states
            + (length * turned.cos() - along).unsqueeze(-1) * first
            + (length * turned.sin() - across).unsqueeze(-1) * second
        )
        result: Tensor = moved.to(x.dtype)
        return result

    return change


def subtracted(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """Subtract a vector from every state and restore the state's norm."""
    import torch

    def change(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        states = x.to(wide)
        moved = states - vector.to(x.device, wide)
        size = moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        result: Tensor = (moved * (states.norm(dim=-1, keepdim=True) / size)).to(x.dtype)
        return result

    return change
