"""The dtype of a model's weights: float32 to compute in, the source's own to keep.

A model keeps the dtype of its source in the store and in memory, and is asked in it. Whoever
changes weights computes in float32 (`widened`) and rounds once at the end (`narrow`); how much of
the change that rounding lost is measured. Adapters are float32 always.
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
"""Share of a change, by its norm, above which what rounding lost is a warning."""


def weights_dtype(model: Any) -> dtype:
    """Dtype of the weights of a model, without those of an adapter and without packed ones."""
    for name, parameter in bare(model).named_parameters():
        if ".lora_" not in name and parameter.is_floating_point():
            found: dtype = parameter.dtype
            return found
    raise AssertionError(type(model))


def dtype_name(model: Any) -> str:
    """`float32`, `bfloat16`, ..."""
    return str(weights_dtype(model)).removeprefix("torch.")


def is_half(model: Any) -> bool:
    """Whether the weights have fewer bits than float32, so that changes of them are rounded."""
    return weights_dtype(model).itemsize < 4  # noqa: PLR2004


def _half_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:  # noqa: PLR2004
            yield parameter


def widen(model: nn.Module) -> None:
    """Turn half-precision weights into float32 in place, which changes no value; buffers stay."""
    for parameter in _half_weights(model):
        parameter.data = parameter.data.float()


def widened(loaded: LoadedModel) -> LoadedModel:
    """A copy to compute with: its weights are float32."""
    copied = replace(loaded, model=copy.deepcopy(loaded.model))
    widen(copied.model)
    return copied


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the `with` block the weights are float32; then they have their own dtype again."""
    dtypes = [(parameter, parameter.dtype) for parameter in _half_weights(model)]
    widen(model)
    try:
        yield
    finally:
        for parameter, own in dtypes:
            parameter.data = parameter.data.to(own)


def as_asked(loaded: LoadedModel) -> LoadedModel:
    """The model as it is asked. An adapter on float32 weights is folded in once, and not at every
    token; beside weights of fewer bits it stays, since rounding would change the update.
    """
    is_exact = loaded.quantization is None and not is_half(loaded.model)
    return merged(loaded) if loaded.has_adapter and is_exact else loaded


def asked_notes(loaded: LoadedModel) -> dict[str, str]:
    """For the record: the dtype that a model is asked in, and whether its adapter was left on."""
    beside = {"adapter": "beside the base"} if loaded.has_adapter else {}
    beside |= {"quantization": loaded.quantization} if loaded.quantization else {}
    return {"dtype": dtype_name(loaded.model), **beside}


class Rounding:
    """Adds up what rounding does to a change of weights."""

    def __init__(self) -> None:
        self._lost = self._changed = 0.0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count one weight: as it was, as it was computed in float32, as it is kept."""
        wanted = exact.detach().double()
        self._changed += float((wanted - before.detach().double()).square().sum())
        self._lost += float((rounded.detach().double() - wanted).square().sum())

    @property
    def lost_frac(self) -> float | None:
        """Norm of what was lost over the norm of the change; None where nothing changed."""
        return (self._lost / self._changed) ** 0.5 if self._changed else None


def fold_rounded(model: Any) -> float | None:
    """Add the update of an adapter to the weights under it in float32, each rounded once, in place;
    the adapter stays to be taken off.

    Returns: Share of the update that rounding lost; None where there was none.
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

    Returns: Share of the change that rounding lost; None where nothing was changed or rounded.
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
    """The weights of a model by name, whether under an adapter or not."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in bare(model).named_parameters()
        if ".lora_" not in name
    }


def tell_rounding(ctx: StageContext, lost_frac: float | None, loaded: LoadedModel) -> None:
    """Note what rounding lost of a change of weights, and warn where it is much."""
    if lost_frac is None:
        return
    ctx.note(rounding_lost=lost_frac)
    if lost_frac > MUCH_LOST:
        ctx.warn(
            f"writing the changed weights in {dtype_name(loaded.model)} lost {lost_frac:.0%} of the"
            " change, by its norm; `dtype: float32` on the model keeps all of it"
        )
