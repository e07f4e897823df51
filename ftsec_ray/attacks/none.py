"""Attack nothing: the reference cell that every attack and every defense is compared with.

Paper: none.
Differs: there is nothing to differ from; it has no hook, so its stages are those of an honest user.
    Its phase is `pre` because a table needs one; reports set it apart by its name.
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
