"""The 95 % Wilson interval of a share, also where the share is not a count over n (a mean over
seeds, ties that count half).

Own lines and not statsmodels, whose import takes longer than a whole report.
"""

from __future__ import annotations

import math

_Z = 1.959963984540054


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of n items, within 0..1."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)
