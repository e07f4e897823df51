"""The update of every layer that a fine-tune changed, its singular values, and its distance from
those of a bank of clean models: what detectors share that read weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ftsec_ray.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ftsec_ray.context import LoadedModel

ROWS_AT_A_TIME = 1_024
"""Rows of the update that are computed together for the kurtosis."""


def factors(model: LoadedModel, start: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The update of every linear layer that the fine-tune changed, one at a time: the layer's
    dotted path, and `left` (out, R) and `right` (R, in), whose product is the update; for a model
    without an adapter `left` (out, in) and None.
    """
    from ftsec_ray.models.lora import lora_modules
    from ftsec_ray.models.update import updates

    if model.has_adapter:
        for m in lora_modules(model):
            left, right = m.scale * m.B.detach().float(), m.A.detach().float()
            if bool(left.any() and right.any()):
                yield m.name, left, right
        return
    _, changes = updates(model, start, low_rank=False)
    for u in changes:
        if u.weight.ndim == 2 and u.layer is not None:  # noqa: PLR2004
            yield u.module, u.delta(), None


def singular_values(left: Tensor, right: Tensor | None) -> Tensor:
    """Singular values of an update, float64 in falling order, as many as it can have: `left @
    right` is not computed. Shapes: as for `factors` -> (min(out, R, in),).
    """
    import torch

    core = left if right is None else torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    sigma: Tensor = torch.linalg.svdvals(core.double())
    return sigma


def entry_kurtosis(left: Tensor, right: Tensor | None) -> float:
    """Excess kurtosis of the update's entries, computed `ROWS_AT_A_TIME` rows at a time."""
    sums = [0.0] * 5
    for start in range(0, left.shape[0], ROWS_AT_A_TIME):
        block = left[start : start + ROWS_AT_A_TIME]
        block = (block if right is None else block @ right).double()
        sums = [total + float(block.pow(power).sum()) for power, total in enumerate(sums)]
    mean, second, third, fourth = (s / sums[0] for s in sums[1:])
    variance = second - mean**2
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2 - 3.0


def common_layers(suspect: Mapping[str, object], bank: Sequence[Mapping[str, object]]) -> list[str]:
    """The layers that the fine-tune changed in all of these models; StageError if there is none."""
    names = [name for name in suspect if all(name in other for other in bank)]
    if not names:
        raise StageError(
            "the model and the clean bank have no fine-tuned layer in common",
            len(suspect),
            "one common fine-tuned layer or more",
            "train the bank with the recipe of the cell",
        )
    return names


def deviations(point: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Every feature of a model in standard deviations of a bank. Shapes: point (F,), bank (M, F) ->
    (F,).
    """
    import numpy as np

    spread = bank.std(axis=0, ddof=1) + 1e-6 * np.abs(bank.mean(axis=0)) + 1e-12
    found: np.ndarray = (point - bank.mean(axis=0)) / spread
    return found
