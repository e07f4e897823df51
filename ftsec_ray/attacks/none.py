"""No attack: the baseline that every attack and every defense is compared with.

Paper: none.
Differs: does not apply. It has no hook, so its stages are those of an honest user. Its phase is
    `pre` because each method must have one; reports show it separately by its name.
Cost: none.
Needs: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.method import Attack, Phase


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """No attack."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = None
