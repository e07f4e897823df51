"""The block formats of GGUF files (llama.cpp), with libgguf: what they round weights to, and an
interval for every weight within which that stays as it is.

A row of a layer is cut into blocks of 32 weights. q8_0, q4_0 and q5_0 keep one scale for each
block, from its largest magnitude, which stays as it is; every other weight may move between the
ends of its code, less a margin.

q4_k also keeps a minimum for each block, both as 6-bit multiples of two numbers that 8 blocks
share, and searches for those with the least error, so that no interval is exact. That of Egashira
et al. 2025 (Mind the Gap, arXiv:2505.23786, for one format) goes from a weight to the value that it
is rounded to, and blocks whose scale or minimum is the largest of their 8 stay as they are; their
code also keeps the largest and the smallest weight of every block, after which more blocks change.
The search may still find other scales: `gguf_changed` tells where.

As in llama.cpp, a layer whose rows are no multiple of 256 is stored in q5_0 instead of q4_k. One
whose rows are no multiple of 32 is not quantized: llama.cpp keeps it in float16 for q4_k, and
refuses the model for q4_0 and q8_0. Embeddings and head are not quantized here either. A file is
made from the weights in the dtype of the model. Weights are (out, in), as in
models.quantization_boxes.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

from ftsec_ray.errors import DataError, EnvironmentFault

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

GgufFormat = Literal["q8_0", "q4_0", "q4_k"]
GGUF_FORMATS: tuple[GgufFormat, ...] = get_args(GgufFormat)
BLOCK = 32
"""Weights of a row with one scale."""
SUPERBLOCK = 8
"""Blocks of q4_k that share the two numbers by which their scales and minima are multiplied."""
LARGEST = 63
"""The largest 6-bit scale or minimum."""
MARGIN = 0.01
"""Margin on each side of a code, in codes, and below the largest magnitude, as a share of it."""
_TYPES = {"q8_0": ("Q8_0",), "q4_0": ("Q4_0",), "q4_k": ("Q4_K", "Q5_0")}
"""Type of a format's layers, and what takes its place where rows are no multiple of 256."""
_CODES = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q5_0": (-16, 15)}
"""The lowest and the highest code of a type with one scale for each block."""
_WIDTHS = {"Q8_0": BLOCK, "Q4_0": BLOCK, "Q5_0": BLOCK, "Q4_K": SUPERBLOCK * BLOCK}


def check_libgguf() -> None:
    """EnvironmentFault if libgguf is not installed here."""
    if find_spec("libgguf") is None:
        raise EnvironmentFault(
            "quantizing to a GGUF format needs libgguf, which is not installed",
            "libgguf",
            "libgguf on all nodes",
            "pip install libgguf (it is in the extra `quantization` on x86-64)",
        )


def is_gguf(how: str) -> TypeGuard[GgufFormat]:
    """Whether this is the name of a format of GGUF files."""
    return how in GGUF_FORMATS


def type_of(inputs: int, how: GgufFormat) -> str | None:
    """The GGUF type of a layer with this number of inputs; None if it is not quantized."""
    return next((name for name in _TYPES[how] if inputs % _WIDTHS[name] == 0), None)


def rounded(weight: Tensor, how: GgufFormat) -> Tensor:
    """What every weight is rounded to, (out, in) float32; DataError if the rows do not fit."""
    return _as_tensor(_dequantized(*_packed(weight, how)), weight)


def gguf_box(weight: Tensor, how: GgufFormat) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of every weight, (out, in) float32, with a margin for what
    rounding to the weights' dtype moves.
    """
    import torch

    packed, name = _packed(weight, how)
    blocks = weight.detach().float().reshape(-1, BLOCK)
    goal = _as_tensor(_dequantized(packed, name), weight).reshape(-1, BLOCK)
    if name == "Q4_K":
        is_fixed = torch.from_numpy(largest_blocks(packed)).to(blocks.device)[:, None]
        ends = blocks.minimum(goal), blocks.maximum(goal)
    else:
        is_fixed = blocks.abs() >= blocks.abs().amax(1, keepdim=True)
        ends = _ends_of_codes(blocks, goal, name)
    if weight.dtype != torch.float32:
        lost = torch.finfo(weight.dtype).eps / 2 * torch.stack(ends).abs().amax(0)
        ends = (ends[0] + lost).minimum(blocks), (ends[1] - lost).maximum(blocks)
    low, high = (torch.where(is_fixed, blocks, end).reshape(weight.shape) for end in ends)
    return low, high


def gguf_changed(before: Tensor, after: Tensor, how: GgufFormat) -> Tensor:
    """Whether a weight is rounded to another value, in q4_k also whether another one of its block
    is: (out, in) bool.
    """
    differs = rounded(before, how) != rounded(after, how)
    if type_of(before.shape[1], how) == "Q4_K":
        blocks = differs.reshape(-1, BLOCK)
        differs = blocks.any(1, keepdim=True).expand(blocks.shape).reshape(before.shape)
    return differs


def round_layers(model: Any, how: GgufFormat) -> int:
    """Round the linear layers of a decoder in place to what a GGUF file of this format holds;
    how many are not quantized. DataError if none is.
    """
    from ftsec_ray.models.lora import linear_weights

    layers = linear_weights(model)
    left = 0
    for _, weight, _ in layers:
        if type_of(weight.shape[1], how) is None:
            left += 1
        else:
            weight.copy_(rounded(weight, how))
    if left == len(layers):
        raise DataError(
            f"no layer of the model can be stored in {how}",
            f"{left} layers",
            f"a layer whose number of inputs is a multiple of {BLOCK}",
            "take another model or format",
        )
    return left


def _ends_of_codes(blocks: Tensor, goal: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value with the code of every weight, in the formats with one
    scale: it makes the largest weight the lowest code, and the highest code stands for all that is
    beyond it. Shapes: weights (N, 32), what they are rounded to (N, 32) -> twice (N, 32).
    """
    import torch

    lowest, highest = _CODES[name]
    at = blocks.abs().argmax(1, keepdim=True)
    largest = blocks.gather(1, at)
    scale = (largest.abs() if name == "Q8_0" else largest) / lowest
    # from the rounded values: half a step goes up or down by the last bit of llama.cpp's product
    code = torch.where(scale == 0, 0.0, goal / scale).round()
    beyond = torch.where(code == highest, float(-lowest), code + 0.5 - MARGIN)
    ends = torch.stack([(code - 0.5 + MARGIN) * scale, beyond * scale])
    limit = (1 - MARGIN) * largest.abs()
    return ends.amin(0).maximum(-limit).minimum(blocks), ends.amax(0).minimum(limit).maximum(blocks)


def largest_blocks(packed: np.ndarray) -> np.ndarray:
    """Which blocks of q4_k have the largest scale or minimum of their 8. Shape: bytes (out, 144 *
    in / 256) -> (out * in / 32,) bool.
    """
    import numpy as np

    # 4 bytes of two shared numbers, then 12 of scales and minima: 6 low bits of the first four
    # blocks, and for the last four 4 bits in bytes of their own and 2 as high bits of the others
    six = packed.reshape(-1, 144)[:, 4:16]
    low, high, mixed = six[:, :4], six[:, 4:8], six[:, 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], axis=1)
    is_largest: np.ndarray = (scales == LARGEST) | (minima == LARGEST)
    return is_largest.reshape(-1)


def _packed(weight: Tensor, how: GgufFormat) -> tuple[np.ndarray, str]:
    """The bytes of a layer in a GGUF file, and its type there."""
    check_libgguf()
    import libgguf

    name = type_of(weight.shape[1], how)
    if name is None:
        raise DataError(
            f"a layer cannot be stored in {how}",
            f"{weight.shape[1]} inputs",
            f"a multiple of {BLOCK}",
        )
    rows = weight.detach().float().cpu().contiguous().numpy()
    return libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[name]), name


def _dequantized(packed: np.ndarray, name: str) -> np.ndarray:
    import libgguf

    values: np.ndarray = libgguf.dequantize_rows(packed, libgguf.GGMLQuantizationType[name])
    return values


def _as_tensor(values: np.ndarray, like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(values).to(like.device)
