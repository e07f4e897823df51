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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Inspection, Phase
from ftsec_ray.models.update_spectra import (
    common_layers,
    deviations,
    entry_kurtosis,
    factors,
    singular_values,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext

FEATURES = ("sigma_1", "frobenius", "energy_concentration", "spectral_entropy", "kurtosis")


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


def features(model: LoadedModel, start: LoadedModel) -> dict[str, dict[str, float]]:
    """Features of every linear layer that the fine-tune changed, by the layer's dotted path."""
    return {name: layer_features(left, right) for name, left, right in factors(model, start)}


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
