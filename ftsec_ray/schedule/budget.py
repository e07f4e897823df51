"""Tracks the budget of a run: limits, cost so far, and expected cost of running units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_SLACK = 1e-9
"""Relative tolerance: rounding must not stop a sweep that costs exactly its budget."""


class Ledger:
    """Cost against limits, by name of the limit (such as usd or hours)."""

    def __init__(
        self, limits: Mapping[str, float] | None = None, spent: Mapping[str, float] | None = None
    ) -> None:
        self.limits = dict(limits or {})
        self.spent: dict[str, float] = {name: (spent or {}).get(name, 0.0) for name in self.limits}
        self._reserved: dict[str, dict[str, float]] = {}

    def fits(self, spend: Mapping[str, float]) -> bool:
        """Whether a unit with this expected cost may start: with the cost so far and that of the
        running units, it stays within every limit.
        """
        flight = Counter[str]()
        for estimate in self._reserved.values():
            flight.update(estimate)  # type: ignore[arg-type]  # a Counter adds floats as well
        return all(
            self.spent[name] + flight[name] + spend.get(name, 0.0) <= limit * (1 + _SLACK)
            for name, limit in self.limits.items()
        )

    def reserve(self, unit: str, spend: Mapping[str, float]) -> None:
        """Add the expected cost of a unit that starts."""
        if self.limits:
            self._reserved[unit] = {name: spend.get(name, 0.0) for name in self.limits}

    def release(self, unit: str) -> None:
        """Remove the expected cost of a unit that ended; `charge` adds its real cost."""
        self._reserved.pop(unit, None)

    def charge(self, spend: Mapping[str, float]) -> None:
        """Add a real cost."""
        for name in self.limits:
            self.spent[name] += spend.get(name, 0.0)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {self.spent[name]:.3g} of {limit:g} spent"
            for name, limit in self.limits.items()
        )
