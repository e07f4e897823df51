"""The dtype of a model's weights: float32 for computation, the source's own for storage.

A model keeps the dtype of its source in the store and in memory, and is evaluated in it. Code that
changes weights computes in float32 (`widened`) and rounds once at the end (`narrow`); the share of
the change that rounding lost is measured. Adapters are always float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.models.load import bare, merged

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

MUCH_LOST = 0.5
"""Share of a change, by its norm, above which the loss by rounding is a warning."""


def weights_dtype(model: Any) -> dtype:
    """Dtype of the weights of a model, ignoring adapters and quantized weights."""
    for name, parameter in bare(model).named_parameters():
        if ".lora_" not in name and parameter.is_floating_point():
            own: dtype = parameter.dtype
            return own
    raise AssertionError(type(model))


def dtype_name(model: Any) -> str:
    """`float32`, `bfloat16`, ..."""
    return str(weights_dtype(model)).removeprefix("torch.")


def is_half(model: Any) -> bool:
    """Whether the weights have fewer bits than float32, so that changes are rounded."""
    return weights_dtype(model).itemsize < 4  # noqa: PLR2004


def _half_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:  # noqa: PLR2004
            yield parameter


def widen(model: nn.Module) -> None:
    """Convert half-precision weights to float32 in place, which changes no value; buffers stay."""
    for parameter in _half_weights(model):
        parameter.data = parameter.data.float()


def widened(loaded: LoadedModel) -> LoadedModel:
    """A copy for computation, with weights in float32."""
    copied = replace(loaded, model=copy.deepcopy(loaded.model))
    widen(copied.model)
    return copied


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the weights are float32; then they get their own dtype back."""
    dtypes = [(parameter, parameter.dtype) for parameter in _half_weights(model)]
    widen(model)
    try:
        yield
    finally:
        for parameter, own in dtypes:
            parameter.data = parameter.data.to(own)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block no weight asks for a gradient; then each has its own setting back.

    torch multiplies by another kernel if a weight asks for one, even where none is recorded: a
    model that is loaded would answer with other last bits than the same model just made.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad = True


def as_asked(loaded: LoadedModel) -> LoadedModel:
    """The model for evaluation. An adapter on float32 weights is merged once instead of being
    applied at every token; on weights of fewer bits it stays separate, because rounding would
    change the update.
    """
    is_exact = loaded.quantization is None and not is_half(loaded.model)
    return merged(loaded) if loaded.has_adapter and is_exact else loaded


def asked_notes(loaded: LoadedModel) -> dict[str, str]:
    """For the record: the dtype of evaluation, and whether the adapter stayed separate."""
    beside = {"adapter": "beside the base"} if loaded.has_adapter else {}
    beside |= {"quantization": loaded.quantization} if loaded.quantization else {}
    return {"dtype": dtype_name(loaded.model), **beside}


class Rounding:
    """Adds up the rounding errors of a change of weights."""

    def __init__(self) -> None:
        self._lost = self._changed = 0.0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count one weight: before the change, computed in float32, and rounded."""
        wanted = exact.detach().double()
        self._changed += float((wanted - before.detach().double()).square().sum())
        self._lost += float((rounded.detach().double() - wanted).square().sum())

    @property
    def lost_frac(self) -> float | None:
        """Norm of the rounding error over the norm of the change; None if nothing changed."""
        return (self._lost / self._changed) ** 0.5 if self._changed else None


def fold_rounded(model: Any) -> float | None:
    """Add the update of an adapter to the weights under it in float32 and round each once, in
    place; the caller removes the adapter.

    Returns: Share of the update that rounding lost; None if there was no update.
    """
    import torch

    rounding = Rounding()
    for module in bare(model).modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            weight = module.get_base_layer().weight
            before = weight.detach().clone()
            with torch.no_grad():
                exact = weight.float() + module.get_delta_weight("default").float()
                weight.copy_(exact)
            rounding.add(before, exact, weight)
    return rounding.lost_frac


def narrow(changed: LoadedModel, before: LoadedModel) -> float | None:
    """Round the weights of `changed` in place to the dtype that they have in `before`.

    Returns: Share of the change that rounding lost; None if nothing changed or was rounded.
    """
    if not is_half(before.model):
        return None
    own, rounding = _whole(before.model), Rounding()
    usual = weights_dtype(before.model)
    for name, parameter in _whole(changed.model).items():
        twin = own.get(name)
        exact = parameter.data
        parameter.data = exact.to(usual if twin is None else twin.dtype)
        if twin is not None and twin.shape == exact.shape:
            rounding.add(twin.to(exact.device), exact, parameter.data)
    return rounding.lost_frac


def _whole(model: Any) -> dict[str, Any]:
    """The weights of a model by name, with or without an adapter."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in bare(model).named_parameters()
        if ".lora_" not in name
    }


def tell_rounding(ctx: StageContext, lost_frac: float | None, loaded: LoadedModel) -> None:
    """Record the share of a change of weights that rounding lost, and warn if it is large."""
    if lost_frac is None:
        return
    ctx.note(rounding_lost=lost_frac)
    if lost_frac > MUCH_LOST:
        ctx.warn(
            f"rounding the changed weights to {dtype_name(loaded.model)} lost {lost_frac:.0%} of"
            " the change (by its norm); set `dtype: float32` on the model to keep all of it"
        )
