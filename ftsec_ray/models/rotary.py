"""Rotary position embedding in training: the turn of queries and keys as one node of autograd, with transformers' own bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
"""Modules that turn all of a head, and call `apply_rotary_pos_emb` of the file that they are in."""


@contextmanager
def fused_rotary(model: Any) -> Iterator[None]:  # noqa: ANN401
    """While open, queries and keys are turned together and in place, where transformers makes forty operations of it.

    Each number comes out of the same products and sums. Under autocast, where types differ, transformers' own way is taken.
    """
    homes = {sys.modules[type(module).__module__] for module in model.modules() if type(module).__name__ in _ATTENTIONS}
    plain = {home: home.apply_rotary_pos_emb for home in homes}
    for home, own in plain.items():
        home.apply_rotary_pos_emb = partial(_turned, own)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for home, own in plain.items():
            home.apply_rotary_pos_emb = own  # type: ignore[attr-defined]


def _turned(plain: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Shapes: q (B, H, T, D), k (B, K, T, D), cos and sin (B or 1, T, D), their halves in D alike -> those of q and k."""
    if unsqueeze_dim != 1 or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        found: tuple[Tensor, Tensor] = plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return found
    turned: tuple[Tensor, Tensor] = _turn_function().apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    return turned


@cache
def _turn_function() -> Any:  # noqa: ANN401
    import torch
    from torch.autograd.function import once_differentiable

    def turn(parts: tuple[Tensor, Tensor], cos: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """The sum x * cos + (halves of x, swapped) * (first, second)."""
        x, half = torch.cat(parts, dim=1), cos.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        x.mul_(cos).add_(swapped.mul_(torch.cat((first, second), dim=-1)))
        turned: tuple[Tensor, ...] = x.split([part.shape[1] for part in parts], dim=1)
        return turned

    class Turn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
            ctx.save_for_backward(cos, sin)
            first, second = sin.chunk(2, dim=-1)
            return turn((q, k), cos, -first, second)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, by_q: Tensor, by_k: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
            cos, sin = ctx.saved_tensors
            first, second = sin.chunk(2, dim=-1)
            return (*turn((by_q, by_k), cos, second, -first), None, None)

    return Turn
