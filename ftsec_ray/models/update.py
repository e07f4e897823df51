"""What a fine-tune changed: the update of every weight relative to the start model.

An update is read in float32 and written back either as a LoRA factor (if the fine-tuned model still
has its adapter on the start's own weights, and the new update keeps the rank) or as a full weight.
Models are edited in place.
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
    """The change of one weight: low-rank if `lora` is given, else `weight - start`."""

    name: str
    """Dotted path of the layer for a low-rank update, of the weight for a full one."""
    weight: Any
    """The weight itself (under the adapter, for a low-rank update); full updates are written into
    it.
    """
    start: Any = None
    """The weight of the start model, for a full update."""
    lora: LoraModule | None = None
    is_transposed: bool = False
    """Whether the weight is stored as (in, out)."""

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight of this layer as a map of columns, (out, in)."""
        return weight.T if self.is_transposed else weight

    @property
    def layer(self) -> int | None:
        """Index of the transformer block that the weight belongs to; None outside the blocks."""
        return layer_of(self.name)

    @property
    def module(self) -> str:
        """Dotted path of the layer, for both kinds of update."""
        return self.name.removesuffix(".weight")

    def delta(self) -> Tensor:
        """The update as a map of columns, (out, in) float32; in the shape of the weight if that is
        not a matrix.
        """
        if self.lora is not None:
            return self.lora.delta()
        delta: Tensor = self.weight.detach().float() - self.start.detach().float().to(
            self.weight.device
        )
        return self.oriented(delta)

    def norm(self) -> float:
        """Frobenius norm of the update; a low-rank update is not multiplied out."""
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
        """Replace the fine-tuned weight, for a full update."""
        import torch

        if self.lora is not None:
            raise StageError(
                "a low-rank update cannot take a full matrix",
                self.name,
                "full weights",
                "call updates(..., low_rank=False)",
            )
        with torch.no_grad():
            self.weight.copy_(weight)


def whole_weights(loaded: LoadedModel) -> dict[str, Any]:
    """Every weight by its name in the model without adapter; without the adapter's own weights."""
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in whole_model(loaded).named_parameters()
        if ".lora_" not in name
    }


def transposed_weights(loaded: LoadedModel) -> set[str]:
    """Names of the weights that are stored as (in, out), as in `whole_weights`."""
    return {
        f"{name}.weight".replace(".base_layer.", ".")
        for name, module in whole_model(loaded).named_modules()
        if is_transposed(module)
    }


def stands_on(loaded: LoadedModel, start: LoadedModel) -> bool:
    """Whether the weights under the adapter are those of `start`, bit for bit (either may be
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
    """The model to edit in place and its non-zero updates, in model order.

    With `low_rank` and an adapter on the start's weights, the model keeps its adapter; otherwise an
    adapter is merged first.

    Args:
        tuned: The model after the fine-tune and later changes.
        start: The model from which the fine-tune started; it is only read.
        low_rank: Whether the caller's change of an update keeps it inside the columns of LoRA's B
            or the rows of A.
    """
    start = merged(start) if start.has_adapter else start
    if low_rank and tuned.has_adapter and stands_on(tuned, start):
        turned = transposed_weights(tuned)
        changes = [
            Update(m.name, m.base_weight, lora=m, is_transposed=f"{m.name}.weight" in turned)
            for m in lora_modules(tuned)
        ]
    else:
        tuned = merged(tuned) if tuned.has_adapter else tuned
        changes = _whole_updates(tuned, start)
    return tuned, [update for update in changes if update.norm() > 0.0]


def _whole_updates(tuned: LoadedModel, start: LoadedModel) -> list[Update]:
    theirs, turned = whole_weights(start), transposed_weights(tuned)
    changes = []
    for name, weight in whole_weights(tuned).items():
        if name not in theirs or theirs[name].shape != weight.shape:
            got = tuple(theirs[name].shape) if name in theirs else None
            raise StageError(
                f"weight {name!r} of the fine-tuned model has no counterpart in its start model",
                got,
                f"a weight of shape {tuple(weight.shape)}",
                "do not combine an attack that changes shapes with a defense on the update",
            )
        changes.append(Update(name, weight, start=theirs[name], is_transposed=name in turned))
    return changes
