"""The frozen base of an adapter in 8 or 4 bits, with bitsandbytes.

The base stays in the store as it is. Training an adapter on it, or evaluating the model with its
adapter, quantizes a copy of its linear layers, which gives the same bits each time. Embeddings,
norms and the head keep their dtype. Quantized weights never change: an adapter stays separate, or
is merged into the original base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ftsec_ray.errors import DataError, EnvironmentFault
from ftsec_ray.models.lora import linear_paths
from ftsec_ray.models.residual import is_transposed

if TYPE_CHECKING:
    from torch import nn

Quantization = Literal["int8", "nf4"]
OUTLIER = 6.0
"""Inputs of a larger magnitude are multiplied in the dtype of the model (Dettmers et al. 2022,
LLM.int8(), arXiv:2208.07339, section 3.2)."""


def check_bitsandbytes() -> None:
    """EnvironmentFault if bitsandbytes is not installed here."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "training on a quantized base needs bitsandbytes, which is not installed",
            "bitsandbytes",
            "the extra `quantization` on all nodes",
            "pip install 'ftsec-ray[quantization]', or set training.quantization: none",
        )


def quantize(model: Any, how: Quantization, device: str = "cpu") -> None:
    """Quantize the linear layers of a decoder in place, one after the other on a device, where they
    stay; DataError if it has none.
    """
    check_bitsandbytes()
    paths = linear_paths(model)
    if not paths:
        raise DataError("the model has no linear layers", type(model).__name__, "a decoder")
    make = _int8 if how == "int8" else _nf4
    for path in paths:
        model.set_submodule(path, _packed(model.get_submodule(path), make, device))
    setattr(model, "is_loaded_in_8bit" if how == "int8" else "is_loaded_in_4bit", True)


def _packed(linear: Any, make: Callable[[Any, int, int], nn.Module], device: str) -> nn.Module:
    """A quantized copy of a linear layer or a Conv1D, on a device."""
    import torch

    weight = linear.weight.detach().to(device)
    weight = weight.T.contiguous() if is_transposed(linear) else weight
    out_features, in_features = weight.shape
    packed: Any = make(weight, in_features, out_features)
    if getattr(linear, "bias", None) is not None:
        packed.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    moved: nn.Module = packed.to(device).requires_grad_(requires_grad=False)
    return moved


def _int8(weight: Any, in_features: int, out_features: int) -> nn.Module:
    import bitsandbytes as bnb

    packed = bnb.nn.Linear8bitLt(
        in_features, out_features, bias=False, has_fp16_weights=False, threshold=OUTLIER,
        device="meta",
    )  # fmt: skip
    packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    linear: nn.Module = packed
    return linear


def _nf4(weight: Any, in_features: int, out_features: int) -> nn.Module:
    import bitsandbytes as bnb

    packed = _portable_nf4()(
        in_features, out_features, bias=False, compute_dtype=weight.dtype,
        compress_statistics=False, quant_type="nf4", device="meta",
    )  # fmt: skip
    # On CPUs with AVX-512 BF16, bitsandbytes packs the weights anew for a kernel that computes in
    # bfloat16; all CPUs take one way here.
    packed.support_avx512bf16_for_cpu = False
    packed.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=packed
    )
    linear: nn.Module = packed
    return linear


@cache
def _portable_nf4() -> Any:
    """The 4-bit layer of bitsandbytes, with its weights widened here where a block of weights
    reaches beyond a row on a CPU: there the AVX-512 kernel of bitsandbytes 0.50 takes the scales of
    other blocks.
    """
    import bitsandbytes as bnb
    import torch

    class PortableLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """The layer's output: (..., in) -> (..., out)."""
            state = self.weight.quant_state
            if x.device.type != "cpu" or self.in_features % state.blocksize == 0:
                answer: torch.Tensor = super().forward(x)
                return answer
            packed, count = self.weight.data.flatten(), self.in_features * self.out_features
            values = state.code[torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()]
            scales = state.absmax.repeat_interleave(state.blocksize)[:count]
            weight = (values[:count] * scales).view(self.out_features, self.in_features)
            inputs = x.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(inputs.dtype)
            return torch.nn.functional.linear(inputs, weight.to(inputs.dtype), bias).to(x.dtype)

    return PortableLinear4bit
