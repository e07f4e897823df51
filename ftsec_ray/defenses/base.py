"""What a defense is: a method that answers, in the order of its stack, at every hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.method import Method


@dataclass(frozen=True, kw_only=True)
class Defense(Method):
    """Base of all defenses."""

    KIND: ClassVar[str] = "defense"
    IS_CONTROL: ClassVar[bool] = False
    """Whether it is a trivial control: what every other defense at one of its hooks is compared with."""
