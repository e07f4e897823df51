"""What a run may still take: limits, what is spent, and what the units in flight are expected to
take. Pure arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_SLACK = 1e-9
"""Relative: sums of floats must not hold back a sweep that costs exactly its budget."""


class Ledger:
    """Spending against limits; names of what is limited are the caller's."""

    def __init__(
        self, limits: Mapping[str, float] | None = None, spent: Mapping[str, float] | None = None
    ) -> None:
        self.limits = dict(limits or {})
        self.spent: dict[str, float] = {name: (spent or {}).get(name, 0.0) for name in self.limits}
        self._reserved: dict[str, dict[str, float]] = {}

    def fits(self, spend: Mapping[str, float]) -> bool:
        """Whether a unit may start: spent, what is in flight and the unit itself stay within every
        limit.
        """
        flight = Counter[str]()
        for estimate in self._reserved.values():
            flight.update(estimate)  # type: ignore[arg-type]  # a Counter adds floats as well
        return all(
            self.spent[name] + flight[name] + spend.get(name, 0.0) <= limit * (1 + _SLACK)
            for name, limit in self.limits.items()
        )

    def reserve(self, unit: str, spend: Mapping[str, float]) -> None:
        """A unit starts."""
        if self.limits:
            self._reserved[unit] = {name: spend.get(name, 0.0) for name in self.limits}

    def release(self, unit: str) -> None:
        """A unit ended; what it took is told by `charge`."""
        self._reserved.pop(unit, None)

    def charge(self, spend: Mapping[str, float]) -> None:
        """Something was taken."""
        for name in self.limits:
            self.spent[name] += spend.get(name, 0.0)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {self.spent[name]:.3g} of {limit:g} spent"
            for name, limit in self.limits.items()
        )
