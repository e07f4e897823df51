"""How the report writes shares and their differences."""

from __future__ import annotations

_LEAST = 0.005
"""Differences below it round to zero."""


def share(value: float | None) -> str:
    """Two decimals; a dash for none."""
    return "–" if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """A difference of shares with its sign; a dash for none."""
    if value is None:
        return "–"
    return "0.00" if abs(value) < _LEAST else f"{value:+.2f}".replace("-", "−")
