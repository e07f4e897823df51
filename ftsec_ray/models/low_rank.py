"""The part of a change of weights in its top singular directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def top_part(delta: Tensor, rank: int, draw: np.random.Generator | None = None) -> Any:
    """The part of a difference in its top singular directions, float64; all of it if `rank` is its
    full rank or it is no matrix.

    Args:
        delta: Any shape; what is not a matrix counts as rank one.
        rank: Number of directions.
        draw: If given, random directions replace the top ones.
    """
    import torch

    if rank == 0:
        return torch.zeros_like(delta)
    if delta.ndim != 2 or rank >= min(delta.shape):  # noqa: PLR2004
        return delta
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.T
    if draw is None:
        vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
    else:
        gaussian = torch.from_numpy(draw.standard_normal((len(wide), rank)))
        vectors = torch.linalg.qr(gaussian).Q.to(delta)
    part = vectors @ (vectors.T @ wide)
    return part if delta.shape[0] <= delta.shape[1] else part.T
