"""No defense: the baseline that every defense is compared with.

Paper: none.
Differs: none; a sweep treats `none` as the empty stack, so it adds no stage.
Cost: 0.
Needs: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.method import Defense, Phase


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """A defense without hooks."""

    PHASE: ClassVar[Phase] = "pre"
