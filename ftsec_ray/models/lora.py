"""LoRA adapters as plain matrices: where they sit, attaching a fresh one, and a leaner pass through
them in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.config.sweep import TrainingConfig


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: the update of its weight is `scale * B @ A`. Shapes: A (R, in), B
    (out, R).
    """

    name: str
    """Dotted path of the linear layer in the model without adapter."""
    A: Any
    B: Any
    scale: float
    base_weight: Any
    """Weight of the linear layer itself, (out, in)."""

    def delta(self) -> Tensor:
        """The update of the weight, (out, in) float32."""
        update: Tensor = self.scale * self.B.detach().float() @ self.A.detach().float()
        return update


def lora_modules(loaded: LoadedModel) -> list[LoraModule]:
    """All adapted linear layers in model order; DataError when no adapter is attached."""
    if not loaded.has_adapter:
        raise DataError(
            "no LoRA adapter is attached", loaded.info.name, "a model tuned with adapter: lora"
        )
    found = []
    for name, module in loaded.model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found.append(
                LoraModule(
                    name,
                    module.lora_A["default"].weight,
                    module.lora_B["default"].weight,
                    float(module.scaling["default"]),
                    module.base_layer.weight,
                )
            )
    return found


def attach_lora(
    loaded: LoadedModel, config: TrainingConfig, *, base_digest: str | None = None
) -> LoadedModel:
    """Attach a fresh adapter to all linear layers, in place; the caller seeds torch and owns the
    model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )
    return replace(loaded, model=get_peft_model(loaded.model, lora), base_digest=base_digest)


@contextmanager
def fused_lora(model: Any) -> Iterator[None]:
    """While open, adapted linear layers run as one node of autograd each, where PEFT makes a dozen.

    The sums are the same up to rounding. Layers that this does not cover (dropout, DoRA, quantised
    or merged weights) and passes under autocast go PEFT's own way, and so do all layers while the
    adapter is switched off.
    """
    changed = [module for module in model.modules() if _is_plain_lora(module)]
    for module in changed:
        module.forward = partial(_fused, module, type(module).forward)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_plain_lora(module: Any) -> bool:
    from peft.tuners.lora import Linear
    from torch import nn

    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not module.base_layer.weight.requires_grad
        and list(module.lora_A) == ["default"]
        and isinstance(module.lora_dropout["default"], nn.Identity)
        and not module.lora_variant
        and not module.lora_bias["default"]
    )


def _fused(module: Any, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    import torch

    base, A, B = module.base_layer, module.lora_A["default"].weight, module.lora_B["default"].weight
    is_plain = (
        module.disable_adapters
        or module.merged
        or torch.is_autocast_enabled(x.device.type)
        or x.dtype != A.dtype
    )
    if args or kwargs or is_plain:
        found: Tensor = plain(module, x, *args, **kwargs)
        return found
    out: Tensor = _lora_function().apply(x, base.weight, base.bias, A, B, module.scaling["default"])
    return out


@cache
def _lora_function() -> Any:
    """The autograd function of `x W^T + bias + scale (x A^T) B^T` with W and bias frozen.

    Shapes: x (..., in), W (out, in), bias (out) or None, A (R, in), B (out, R) -> (..., out).
    """
    import torch
    from torch.autograd.function import once_differentiable
    from torch.nn.functional import linear

    class LoraLinear(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
        ) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            low, out = linear(rows, A), linear(rows, W, bias)
            out.addmm_(low, B.t(), alpha=scale)
            ctx.save_for_backward(rows, low, W, A, B)
            ctx.scale, ctx.shape = scale, x.shape
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            rows, low, W, A, B = ctx.saved_tensors
            wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
            g = gradient.reshape(-1, gradient.shape[-1])
            g_low = torch.mm(g, B).mul_(ctx.scale)
            return (
                torch.mm(g, W).addmm_(g_low, A).view(ctx.shape) if wants_x else None,
                None,
                None,
                torch.mm(g_low.t(), rows) if wants_A else None,
                torch.mm(g.t(), low).mul_(ctx.scale) if wants_B else None,
                None,
            )

    return LoraLinear
