"""How well a detector's score tells attacked models from models that nobody attacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftsec_ray.measured import Measured, threshold_of, wilson

FALSE_ALARMS = 0.01
"""Share of unattacked models that may score above the threshold."""


class Scored(NamedTuple):
    """A detector's score of one model."""

    raw: float
    standardised: float | None
    """In standard deviations of the model's clean bank; None without a bank that varies."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """What the scores of two groups of models say."""

    auroc: float
    """Chance that an attacked model scores above an unattacked one; a tie counts half."""
    tpr: Measured
    """Share of attacked models above the threshold of `FALSE_ALARMS`."""
    fpr: float
    """Share of unattacked models above it: `FALSE_ALARMS` or less."""
    n_clean: int
    n_attacked: int
    is_standardised: bool
    """Whether scores are relative to each model's clean bank."""


def separation(clean: Sequence[Scored], attacked: Sequence[Scored]) -> Separation | None:
    """The separation of two groups; None if one is empty. Scores are relative to the clean banks
    if every model has one, otherwise as they are.
    """
    if not clean or not attacked:
        return None
    is_standardised = all(one.standardised is not None for one in (*clean, *attacked))
    low, high = (_values(group, is_standardised=is_standardised) for group in (clean, attacked))
    above = sum(float(a > c) + 0.5 * float(a == c) for a in high for c in low)
    threshold = threshold_of(low, FALSE_ALARMS)
    # nothing is above an infinite score of an unattacked model
    detected, alarms = (
        [score >= threshold and not math.isinf(threshold) for score in group]
        for group in (high, low)
    )
    share = sum(detected) / len(high)
    return Separation(
        auroc=above / (len(low) * len(high)),
        tpr=Measured(value=share, n=len(high), prompts=wilson(share, len(high))),
        fpr=sum(alarms) / len(low),
        n_clean=len(low),
        n_attacked=len(high),
        is_standardised=is_standardised,
    )


def _values(group: Sequence[Scored], *, is_standardised: bool) -> list[float]:
    """The scores that are compared."""
    if not is_standardised:
        return [one.raw for one in group]
    return [one.standardised for one in group if one.standardised is not None]
