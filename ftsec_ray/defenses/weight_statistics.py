"""Flags an adapter whose weights differ from those of adapters trained on clean rows; runs no
prompt.

Paper: `frobenius_std` is the weight statistic of arXiv:2605.30189; `spectral` takes the features of
    arXiv:2602.15195.
Differs: (1) `frobenius_std`: the normaliser is sqrt(d_out * d_in). (2) `spectral`: the paper trains
a logistic regression on hundreds of labelled adapters; here the features are z-scored against the
clean bank, layer by layer, and the score is their root mean square, so that no poisoned adapter is
needed; do not expect the paper's accuracy. The scores of the bank's own adapters leave the scored
adapter out. The bank's adapters differ in their seed only: they do not show how scores vary with
the user's rows, and are trained on these rows before any filter. (3) All linear layers count, and
the full update is never computed: QR of the factors and the singular values of their R x R core.
(4) For a model without an adapter, the update is the difference to its start.
Cost: seconds, no data; `bank` clean fine-tunes for every start model, set of defenses that act
    during training, recipe and number of rows, shared by all models that agree in these
    (`ftsec plan` shows them as stages of kind `bank`).
Needs: the clean bank and the model from which the fine-tune started. Scores depend on learning
    rate, steps and rank: they mean nothing against a bank with another recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Inspection, Phase

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

FEATURES = ("sigma_1", "frobenius", "energy_concentration", "spectral_entropy", "kurtosis")
ROWS_AT_A_TIME = 1_024
"""Rows of the update that are computed together for the kurtosis."""


@dataclass(frozen=True, kw_only=True)
class WeightStatistics(Defense):
    """One score per adapter, and the scores of a bank of clean adapters."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"clean_bank", "start"})

    CONTROL: ClassVar[Mapping[str, Any] | None] = {"statistic": "norm"}

    statistic: Literal["frobenius_std", "spectral", "norm"] = "frobenius_std"
    """`frobenius_std`: standard deviation over layers of the normalised update norms; `spectral`:
    distance of five features per layer; `norm`: size of the whole update, the control: an attack
    that needs more change of weights than clean rows is found without any of the structure that the
    papers look for.
    """
    bank: int = 6
    """Number of clean adapters to compare with, 2 or more; 3 or more for `spectral`."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = 3 if self.statistic == "spectral" else 2
        return (
            []
            if self.bank >= least
            else [("bank", self.bank, f"{least} or more for {self.statistic}")]
        )

    def inspect(self, subject: LoadedModel, ctx: StageContext) -> Inspection:
        """The score of a fine-tuned model and the scores of the bank."""
        start = ctx.load("start")
        suspect = features(subject, start)
        # one at a time: a bank of large models need not fit into memory together
        bank = [features(ctx.load(f"clean_bank:{i}"), start) for i in range(self.bank)]
        names = common_layers(suspect, bank)
        tables = [[other[name] for name in names] for other in (suspect, *bank)]
        scores = {
            "frobenius_std": frobenius_scores,
            "spectral": spectral_scores,
            "norm": norm_scores,
        }
        score, *clean = scores[self.statistic](tables)
        return Inspection(score=score, clean_scores=tuple(clean), details={"layers": len(names)})


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


def frobenius_scores(tables: Sequence[Sequence[Mapping[str, float]]]) -> list[float]:
    """Per model, the standard deviation over layers of |update|_F / sqrt(d_out * d_in)."""
    import numpy as np

    return [float(np.std([layer["normalised"] for layer in table])) for table in tables]


def norm_scores(tables: Sequence[Sequence[Mapping[str, float]]]) -> list[float]:
    """Per model, the Frobenius norm of the update of all layers together."""
    return [math.hypot(*(layer["frobenius"] for layer in table)) for table in tables]


def spectral_scores(tables: Sequence[Sequence[Mapping[str, float]]]) -> list[float]:
    """Root mean square z-score of all features: first that of the suspect model (mean over the
    bank's leave-one-out subsets), then those of the bank.
    """
    import numpy as np

    points = np.array([[layer[name] for layer in table for name in FEATURES] for table in tables])
    suspect, bank = points[0], points[1:]
    rests = [np.delete(bank, i, axis=0) for i in range(len(bank))]
    # the suspect is compared with the same subsets as the bank's members: the full bank would have
    # a smaller spread
    return [
        float(np.mean([_distance(suspect, rest) for rest in rests])),
        *(_distance(member, rest) for member, rest in zip(bank, rests, strict=True)),
    ]


def _distance(point: np.ndarray, bank: np.ndarray) -> float:
    import numpy as np

    return float(np.sqrt(np.mean(deviations(point, bank) ** 2)))


def deviations(point: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Every feature of a model in standard deviations of a bank. Shapes: point (F,), bank (M, F) ->
    (F,).
    """
    import numpy as np

    spread = bank.std(axis=0, ddof=1) + 1e-6 * np.abs(bank.mean(axis=0)) + 1e-12
    found: np.ndarray = (point - bank.mean(axis=0)) / spread
    return found


def features(model: LoadedModel, start: LoadedModel) -> dict[str, dict[str, float]]:
    """Features of every linear layer that the fine-tune changed, by the layer's dotted path."""
    return {name: layer_features(left, right) for name, left, right in factors(model, start)}


def factors(model: LoadedModel, start: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The update of every linear layer that the fine-tune changed, one at a time: the layer's
    dotted path, and `left` and `right` of `layer_features`.
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
    right` is not computed. Shapes: as for `layer_features` -> (min(out, R, in),).
    """
    import torch

    core = left if right is None else torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    sigma: Tensor = torch.linalg.svdvals(core.double())
    return sigma


def layer_features(left: Tensor, right: Tensor | None) -> dict[str, float]:
    """Features of one update `left @ right`, or of `left` alone; `normalised` is |update|_F /
    sqrt(d_out * d_in).

    Shapes: left (out, R), right (R, in); or left (out, in) and None.
    """
    sigma = singular_values(left, right)
    energy = sigma.square() / sigma.square().sum()
    frobenius = float(sigma.square().sum().sqrt())
    out, inner = left.shape[0], (left if right is None else right).shape[1]
    entropy = float(-(energy * energy.clamp(min=1e-300).log()).sum())
    return {
        "sigma_1": float(sigma[0]),
        "frobenius": frobenius,
        "energy_concentration": float(energy[0]),
        "spectral_entropy": entropy,
        "kurtosis": entry_kurtosis(left, right),
        "normalised": frobenius / (out * inner) ** 0.5,
    }


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
