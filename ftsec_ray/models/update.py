"""What tuning changed: the update of every weight against the model that tuning started from.

An update is read in float32 and written back either as a LoRA factor (when the tuned model still
carries its adapter on the start's own weights, and the new update keeps the rank) or as a whole
weight. Models are edited in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import merged, whole_model
from ftsec_ray.models.lora import LoraModule, lora_modules
from ftsec_ray.models.residual import is_transposed
from ftsec_ray.models.targets import layer_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Update:
    """The change of one weight: low-rank where `lora` is there, else `weight - start`."""

    name: str
    """Dotted path of the layer for a low-rank update, of the weight for a whole one."""
    weight: Any
    """The weight itself (under the adapter, for a low-rank update); whole updates are written into
    it.
    """
    start: Any = None
    """The weight that tuning started from, for a whole update."""
    lora: LoraModule | None = None
    is_transposed: bool = False
    """Whether the weight is kept as (in, out)."""

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight of this layer as a map of columns, (out, in)."""
        return weight.T if self.is_transposed else weight

    @property
    def layer(self) -> int | None:
        """Index of the transformer block that the weight belongs to; None outside the blocks."""
        return layer_of(self.name)

    @property
    def module(self) -> str:
        """Dotted path of the layer, whatever the update's form."""
        return self.name.removesuffix(".weight")

    def delta(self) -> Tensor:
        """The update as a map of columns, (out, in) float32; in the shape of the weight where it
        is no matrix.
        """
        if self.lora is not None:
            return self.lora.delta()
        delta: Tensor = self.weight.detach().float() - self.start.detach().float().to(
            self.weight.device
        )
        return self.oriented(delta)

    def norm(self) -> float:
        """Frobenius norm of the update; for a low-rank one without forming it."""
        if self.lora is not None:
            A, B = self.lora.A.detach().double(), self.lora.B.detach().double()
            return abs(self.lora.scale) * float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
        return float(self.delta().double().norm())

    def shrink(self, gamma: float) -> None:
        """Multiply the update by `gamma`: 1 changes no bit, 0 gives the start's own bits."""
        import torch

        with torch.no_grad():
            if self.lora is not None:
                if gamma != 1.0:
                    self.lora.B.mul_(gamma)
            else:
                start = self.start.detach().to(self.weight.device)
                self.weight.copy_(torch.lerp(start.float(), self.weight.float(), gamma))

    def project(self, onto: Callable[[Tensor], Tensor]) -> None:
        """Replace the update by `onto(update)`, for a linear map of its columns, in float32."""
        import torch

        if self.lora is None:
            projected = self.oriented(onto(self.delta()))
            self.write(self.start.detach().float().to(self.weight.device) + projected)
            return
        with torch.no_grad():
            self.lora.B.copy_(onto(self.lora.B.detach().float()))

    def write(self, weight: Tensor) -> None:
        """Replace the tuned weight, for a whole update."""
        import torch

        if self.lora is not None:
            raise StageError(
                "a low-rank update cannot take a full matrix",
                self.name,
                "whole weights",
                "ask for updates(..., low_rank=False)",
            )
        with torch.no_grad():
            self.weight.copy_(weight)


def whole_weights(loaded: LoadedModel) -> dict[str, Any]:
    """Every weight under its name in the model without adapter; the adapter's own weights are left
    out.
    """
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in whole_model(loaded).named_parameters()
        if ".lora_" not in name
    }


def transposed_weights(loaded: LoadedModel) -> set[str]:
    """Names of the weights that are kept as (in, out), as in `whole_weights`."""
    return {
        f"{name}.weight".replace(".base_layer.", ".")
        for name, module in whole_model(loaded).named_modules()
        if is_transposed(module)
    }


def stands_on(loaded: LoadedModel, start: LoadedModel) -> bool:
    """Whether the weights under the adapter are those of `start`, bit for bit (those of one may be
    widened to float32).
    """
    import torch

    theirs = whole_weights(start)
    ours = whole_weights(loaded)
    return ours.keys() == theirs.keys() and all(
        torch.equal(weight, theirs[name].to(weight)) for name, weight in ours.items()
    )


def updates(
    tuned: LoadedModel, start: LoadedModel, *, low_rank: bool
) -> tuple[LoadedModel, list[Update]]:
    """The model to edit in place and its updates that are not zero, in model order.

    With `low_rank` and an adapter that stands on the start's weights, the model stays an adapter
    model; in all other cases an adapter is folded in first.

    Args:
        tuned: The model after tuning and whatever followed.
        start: What tuning started from; it is only read.
        low_rank: Whether the caller's change of an update keeps it inside the columns of LoRA's B
            or the rows of A.
    """
    start = merged(start) if start.has_adapter else start
    if low_rank and tuned.has_adapter and stands_on(tuned, start):
        turned = transposed_weights(tuned)
        found = [
            Update(m.name, m.base_weight, lora=m, is_transposed=f"{m.name}.weight" in turned)
            for m in lora_modules(tuned)
        ]
    else:
        tuned = merged(tuned) if tuned.has_adapter else tuned
        found = _whole_updates(tuned, start)
    return tuned, [update for update in found if update.norm() > 0.0]


def _whole_updates(tuned: LoadedModel, start: LoadedModel) -> list[Update]:
    theirs, turned = whole_weights(start), transposed_weights(tuned)
    found = []
    for name, weight in whole_weights(tuned).items():
        if name not in theirs or theirs[name].shape != weight.shape:
            got = tuple(theirs[name].shape) if name in theirs else None
            raise StageError(
                f"weight {name!r} of the tuned model has no twin in its start",
                got,
                str(tuple(weight.shape)),
                "an attack that changes shapes cannot be combined with a defense on the update",
            )
        found.append(Update(name, weight, start=theirs[name], is_transposed=name in turned))
    return found
