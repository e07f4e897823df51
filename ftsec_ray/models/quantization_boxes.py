"""Which weights quantize to the same codes and scales: an interval for every weight, in the formats
of models.quantized and models.gguf_blocks.

A format of bitsandbytes keeps one scale for each group of weights (a row in int8, 64 consecutive
weights in nf4): the largest magnitude in it, which stays as it is, and so do all others of that
magnitude. Every other weight may move between the ends of its code, less a margin, up to that
magnitude.

Weights are (out, in), as the linear layer applies them; a Conv1D holds them transposed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ftsec_ray.models.gguf_blocks import GgufFormat, gguf_box, gguf_changed, is_gguf, type_of
from ftsec_ray.models.quantized import Quantization

if TYPE_CHECKING:
    from torch import Tensor

StoredFormat = Quantization | GgufFormat
STEPS = 127
"""Codes of int8 on each side of 0."""
BLOCK = 64
"""Weights with one scale in nf4."""
INT8_MARGIN = 0.1
"""Margin on each side of an int8 code, as a share of the distance between two codes. bitsandbytes
rounds weights to float16 first, which moves them by 1/16 of that distance at most.
"""
NF4_MARGIN = 0.01
"""Margin on each side of an nf4 code, as a share of its interval."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of nf4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E)."""


def codes(weight: Tensor, how: Quantization) -> tuple[Tensor, Tensor]:
    """The code of every weight, (out, in) int64, and the scale of every group."""
    import torch

    groups, scales = _grouped(weight, how)
    safe = scales.clamp(min=torch.finfo(torch.float32).tiny)
    if how == "int8":
        found = (groups * (STEPS / safe)).round().long()
    else:
        found = torch.bucketize(groups / safe, _middles(weight))
    return _as(found, weight), scales


def box(weight: Tensor, how: Quantization) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of every weight, (out, in) float32: any weights between
    them have the same codes and scales as `weight`, which is between them too.
    """
    import torch

    groups, scales = _grouped(weight, how)
    if how == "int8":
        code = codes(weight, how)[0].reshape(groups.shape)
        low = (code - 0.5 + INT8_MARGIN) * scales / STEPS
        high = (code + 0.5 - INT8_MARGIN) * scales / STEPS
    else:
        middles = _middles(weight)
        ends = torch.cat([-torch.ones_like(middles[:1]), middles, torch.ones_like(middles[:1])])
        code = _grouped(codes(weight, how)[0], how)[0].long()
        left, right = ends[code], ends[code + 1]
        inside = NF4_MARGIN * (right - left)
        low, high = (left + inside) * scales, (right - inside) * scales
    low, high = low.maximum(-scales), high.minimum(scales)
    own = weight.float()
    is_fixed = _as(groups.abs() >= scales, weight)
    low, high = _as(low, weight).minimum(own), _as(high, weight).maximum(own)
    return torch.where(is_fixed, own, low), torch.where(is_fixed, own, high)


def is_quantized(inputs: int, formats: tuple[StoredFormat, ...]) -> bool:
    """Whether a layer with this number of inputs is quantized in all formats."""
    return all(not is_gguf(how) or type_of(inputs, how) is not None for how in formats)


def common_box(weight: Tensor, formats: tuple[StoredFormat, ...]) -> tuple[Tensor, Tensor]:
    """The values that keep the codes and scales of all formats."""
    import torch

    boxes = (
        gguf_box(weight, how) if is_gguf(how) else box(weight, cast("Quantization", how))
        for how in formats
    )
    lows, highs = zip(*boxes, strict=True)
    return torch.stack(lows).amax(0), torch.stack(highs).amin(0)


def changed(before: Tensor, after: Tensor, formats: tuple[StoredFormat, ...]) -> Tensor:
    """Where two weights differ in a code, or in the scale of their group, in one of the formats of
    bitsandbytes, or by `gguf_changed`: (out, in) bool.
    """
    import torch

    differs = torch.zeros(before.shape, dtype=torch.bool, device=before.device)
    for how in formats:
        if is_gguf(how):
            differs |= gguf_changed(before, after, how)
            continue
        own = cast("Quantization", how)
        (old, old_scales), (new, new_scales) = codes(before, own), codes(after, own)
        groups, _ = _grouped(before, own)
        apart = (old_scales != new_scales).expand(groups.shape)
        differs |= (old != new) | _as(apart, before)
    return differs


def _grouped(weight: Tensor, how: Quantization) -> tuple[Tensor, Tensor]:
    """The weights as groups, one per line, filled up with zeros, and their largest magnitudes."""
    import torch

    values = weight.detach()
    if how == "int8":
        # as bitsandbytes does before it quantizes
        groups = values.half().float() if values.is_floating_point() else values.float()
    else:
        flat = values.float().reshape(-1)
        groups = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    return groups, groups.abs().amax(dim=1, keepdim=True)


def _as(groups: Tensor, weight: Tensor) -> Tensor:
    return groups.reshape(-1)[: weight.numel()].reshape(weight.shape)


def _middles(weight: Tensor) -> Tensor:
    import torch

    values = torch.tensor(NF4, device=weight.device)
    return (values[:-1] + values[1:]) / 2
