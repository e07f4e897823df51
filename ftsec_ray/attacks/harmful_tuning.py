"""Fine-tune on explicit harm: add forbidden requests with compliant answers to the user's rows.

Paper: Qi et al. 2023, Fine-tuning Aligned Language Models Compromises Safety, arXiv:2310.03693,
    section 4.2 (tier 1: `shots`); the share `poison_rate` of a fixed number of rows is the
    convention of Huang et al. 2024, Vaccine, arXiv:2402.01109, section 5.
Differs: `shots` are added to the user's rows instead of being the whole set; the paper trains all
    weights with a system prompt that demands obedience, here the sweep's own recipe and the rows'
    own system messages apply.
Cost: `shots` rows more than plain SFT; none with `poison_rate`.
Needs: split harmful_train (forbidden requests with compliant answers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.conversation import Row
from ftsec_ray.data.added_rows import AddsRows, anything


@dataclass(frozen=True, kw_only=True)
class HarmfulTuning(AddsRows):
    """Harmful rows in the user's fine-tuning data."""

    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"harmful_train"})
    SPLIT = "harmful_train"
    LEAST_SHOTS = 1
    NOTE: ClassVar[str] = "harmful_rows"

    shots: int | None = None
    """Number of harmful rows to add to the user's rows, 1 or more; 100 if neither `shots` nor
    `poison_rate` is given.
    """
    poison_rate: float | None = None
    """Instead of `shots`: the share of rows that are harmful, 0..1; harmful rows replace user rows,
    so that the number of rows stays the same.
    """

    def _fits(self, row: Row) -> bool:
        return anything(row)
