"""The measured costs of methods beside a plain fine-tune, for `ftsec show`: figures in a file that
`python -m tests.benchmarks.bench_method_cost --write` makes from the records of a finished sweep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ftsec_ray.cli.method_figures import MethodFigure, read_figures, text_of_figures

FILE = Path(__file__).with_name("method_costs.json")


class Ratio(NamedTuple):
    """A ratio over seeds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        middle, low, high = (f"{round(value, 2) + 0.0:.2f}" for value in self)
        return middle if low == high else f"{middle} ({low} to {high})"


@dataclass(frozen=True, kw_only=True)
class MeasuredCost(MethodFigure):
    """The cost of one setting of a method on one model; ratios are to the CPU time, time and peak
    memory of the plain fine-tune of the same run, or per prompt for `answering`.
    """

    cpu: Ratio | None
    """What the method adds; negative if the fine-tune became shorter."""
    wall: Ratio | None
    flops: Ratio | None
    """Floating-point operations of training only."""
    peak: Ratio | None
    """None if the method has no stage of its own before the answers."""
    answering: Ratio | None
    """None if the method does not act while the model answers."""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> MeasuredCost:
        """The cost from the values of `asdict`."""
        ratios = {
            name: Ratio(*plain[name]) if plain[name] else None
            for name in ("cpu", "wall", "flops", "peak", "answering")
        }
        return cls(**{**plain, **ratios})

    @property
    def text(self) -> str:
        """One line for the page of the method."""
        parts = [f"{self.answering} x the CPU time per answer"] if self.answering else []
        if self.cpu and (any(self.cpu) or not parts):
            flops = f" ({self.flops} x its FLOP)" if self.flops and any(self.flops) else ""
            parts.insert(0, f"{self.cpu} x the CPU time{flops} of a plain fine-tune in addition")
        setting = f"{self.setting}: " if self.setting else ""
        return f"{setting}{'; '.join(parts)} ({self.model}, {self.seeds} seeds, {self.sweep})"


def costs_of(kind: str | None = None, method: str | None = None) -> list[MeasuredCost]:
    """The measured costs of a method, or of all methods."""
    return read_figures(FILE, MeasuredCost.from_json, kind, method)


def text_of_costs(costs: Iterable[MeasuredCost]) -> str:
    """The content of the file: one line for each cost, ratios in hundredths."""

    def plain(cost: MeasuredCost) -> dict[str, Any]:
        """The values of one cost, for JSON."""
        return {
            name: [round(part, 2) + 0.0 for part in value] if isinstance(value, tuple) else value
            for name, value in asdict(cost).items()
        }

    ordered = sorted(costs, key=lambda cost: (cost.kind, cost.method, cost.model))
    return text_of_figures(map(plain, ordered))
