"""Flags an adapter if one statistic of the singular values of its update differs, layer by layer,
from adapters trained on clean rows; runs no prompt.

Paper: Weight space Detection of Backdoors in LoRA Adapters, arXiv:2602.15195: five features of the
    update of each attention projection, and a logistic regression on them. Here: per layer, the
    singular values of B @ A from the R x R core of two QR factorizations, one statistic of them,
    and its distance from the bank in standard deviations of the bank; the score is the mean of
    these distances. The effective rank is that of Roy and Vetterli 2007, The effective rank.
Differs: only the paper's abstract and summaries of it were available. (1) One statistic instead of
    a regression, which needs labelled poisoned adapters: a score shows which property of the
    spectrum gives an attack away. `weight_statistics: {statistic: spectral}` takes the distance of
    five features at once. (2) All linear layers count, each for itself, not attention alone. (3)
    `kurtosis` is that of the update's entries. (4) Distances are leave-one-out: members of the bank
    are compared with the others, and the suspect with the same subsets. (5) For a model without
    an adapter, the update is the difference to its start.
Published: 97 % accuracy at less than 2 % false positives on 400 clean and 100 poisoned adapters of
    Llama-3.2-3B (abstract, version 1); a later abstract says 100 % on Llama-3.2-3B, Qwen2.5-3B and
    Gemma-2-2B. A summary names kurtosis and energy concentration as the deciding features, both
    higher with a backdoor (not checked in the paper).
Cost: seconds for adapters, no data; a whole singular value decomposition of every matrix of the
    suspect and of each model of the bank where all weights were tuned. `bank` clean fine-tunes,
    shared as for `weight_statistics`.
Reads: it finds rows unlike the bank's, not harm: the bank's adapters differ in their seed only.
    Measured on ladder:0.1m (microworld, 160 rows, rank 8, 12 seeds, `side: both`, all layers),
    AUROC of badnets at rate 0.25 / harmful_tuning with 8 shots: `effective_rank` 0.95 / 0.97,
    `first_share` 0.85 / 0.82, `kurtosis` 0.87 / 0.89, `spectral_norm` 0.88 / 0.68, the control
    0.93 / 0.65. Of these eight differences from the control, only that of `effective_rank` on
    harmful_tuning is shown (0.32, 95 % bootstrap interval 0.11 to 0.56). 8 harmless refusals added
    to clean rows (`safe_instr`) have 0.89 by `effective_rank`, and harmful_tuning is told from
    those models with 0.62. Against the paper, attacked adapters are less concentrated there: with
    `side: concentrated` the AUROC of `effective_rank` is 0.31 / 0.02.
Needs: the clean bank and the model from which the fine-tune started. An attack on the model before
    the fine-tune is not in the update, and is not found. Scores depend on learning rate, steps and
    rank: they mean nothing against a bank with another recipe. `first_share` and `effective_rank`
    need a rank of 2 or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Fault, Inspection, Phase, least_faults
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


@dataclass(frozen=True, kw_only=True)
class AdapterSpectrum(Defense):
    """The mean distance of one spectral statistic from a bank of clean adapters."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"clean_bank", "start"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"statistic": "frobenius"}

    statistic: Literal[
        "first_share", "effective_rank", "spectral_norm", "kurtosis", "frobenius"
    ] = "first_share"
    """`first_share`: share of the energy (squared singular values) in the first one;
    `effective_rank`: exp of the entropy of the singular values divided by their sum;
    `spectral_norm`: the first singular value; `kurtosis`: excess kurtosis of the update's entries;
    `frobenius`: the size of the layer's update, the control: an attack that changes a layer more or
    less than clean rows do is found by it without any look at the spectrum. `spectral_norm` holds
    that size too, the other three do not change with it.
    """
    side: Literal["both", "concentrated"] = "both"
    """`both`: distances count in either direction; `concentrated`: they count as positive towards a
    more concentrated update and as negative away from it, since the paper's backdoors are more
    concentrated. That is towards a lower `effective_rank`, and higher values of the others.
    """
    share: float = 1.0
    """Share of the layers that count, those with the largest distances, above 0 and at most 1; one
    layer at least. Below 1 it finds what only a few layers show.
    """
    bank: int = 6
    """Number of clean adapters to compare with, 4 or more: the spread of two others has no use."""

    def check(self) -> list[Fault]:
        """Faults of the parameters beyond their types."""
        faults = least_faults(self, {"bank": 4})
        if not 0 < self.share <= 1:
            faults.append(("share", self.share, "above 0, at most 1"))
        return faults

    def inspect(self, subject: LoadedModel, ctx: StageContext) -> Inspection:
        """The score of a fine-tuned model and the scores of the bank."""
        import numpy as np

        start = ctx.load("start")
        suspect = self._values(subject, start)
        # one at a time: a bank of large models need not fit into memory together
        bank = [self._values(ctx.load(f"clean_bank:{i}"), start) for i in range(self.bank)]
        layers = common_layers(suspect, bank)
        table = np.array([[values[layer] for layer in layers] for values in (suspect, *bank)])
        if (table[1:] == table[1]).all():
            raise StageError(
                f"adapter_spectrum: {self.statistic} is the same in every model of the bank",
                float(table[1, 0]),
                "a bank whose models differ",
                "at rank 1 `first_share` and `effective_rank` are always 1: use `kurtosis`",
            )
        scores, distances = self.scores(table)
        furthest = int(np.argmax(distances))
        details = {
            "layers": len(layers),
            "layers_left_out": len(set(suspect).union(*bank)) - len(layers),
            "furthest_layer": layers[furthest],
            "furthest_distance": float(distances[furthest]),
        }
        return Inspection(score=scores[0], clean_scores=tuple(scores[1:]), details=details)

    def _values(self, model: LoadedModel, start: LoadedModel) -> dict[str, float]:
        """The statistic of every layer that the fine-tune changed, by the layer's dotted path."""
        return {
            layer: statistic_of(self.statistic, left, right)
            for layer, left, right in factors(model, start)
        }

    def scores(self, table: np.ndarray) -> tuple[list[float], np.ndarray]:
        """The scores of the suspect and of the bank, and the suspect's distance in each layer.
        Shapes: table (1 + bank, layers), the suspect first.
        """
        import numpy as np

        suspect, bank = table[0], table[1:]
        rests = [np.delete(bank, i, axis=0) for i in range(len(bank))]
        # the suspect is compared with the same subsets as the bank's members: the full bank would
        # have a smaller spread
        seen = [self._distances(suspect, rest) for rest in rests]
        clean = [self._distances(*pair) for pair in zip(bank, rests, strict=True)]
        score = float(np.mean([self._pooled(distances) for distances in seen]))
        return [score, *map(self._pooled, clean)], np.mean(seen, axis=0)

    def _distances(self, point: np.ndarray, bank: np.ndarray) -> np.ndarray:
        """How suspicious each layer is, in standard deviations of the bank."""
        distances = deviations(point, bank)
        if self.side == "both":
            return abs(distances)
        return -distances if self.statistic == "effective_rank" else distances

    def _pooled(self, distances: np.ndarray) -> float:
        """The mean of the largest distances."""
        import numpy as np

        # 0.07 * 100 is above 7 in floating point
        count = max(1, math.ceil(self.share * len(distances) - 1e-9))
        return float(np.sort(distances)[-count:].mean())


def statistic_of(name: str, left: Tensor, right: Tensor | None) -> float:
    """A statistic of the update `left @ right`, or of `left` alone, that is not 0 everywhere.

    Shapes: left (out, R), right (R, in); or left (out, in) and None.
    """
    if name == "kurtosis":
        return entry_kurtosis(left, right)
    sigma = singular_values(left, right)
    if name == "first_share":
        energy = sigma.square()
        return float(energy[0] / energy.sum())
    if name == "effective_rank":
        weights = sigma / sigma.sum()
        return math.exp(-float((weights * weights.clamp(min=1e-300).log()).sum()))
    return float(sigma[0] if name == "spectral_norm" else sigma.square().sum().sqrt())
