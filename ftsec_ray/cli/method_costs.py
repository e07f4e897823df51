"""The measured costs of methods beside a plain fine-tune, for `ftsec show`: figures in a file that
`python -m tests.benchmarks.bench_method_cost --write` makes from the records of a finished sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
class MeasuredCost:
    """The cost of one setting of a method on one model; ratios are to the CPU time, time and peak
    memory of the plain fine-tune of the same run, or per prompt for `answering`.
    """

    kind: str
    """`attack` or `defense`."""
    method: str
    setting: str
    """Parameters that vary in the sweep; empty if there was one setting."""
    model: str
    sweep: str
    seeds: int
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
    rows = map(MeasuredCost.from_json, json.loads(FILE.read_text(encoding="utf-8")))
    return [row for row in rows if kind in (None, row.kind) and method in (None, row.method)]


def text_of_costs(costs: Iterable[MeasuredCost]) -> str:
    """The content of the file: one line for each cost, ratios in hundredths."""

    def plain(cost: MeasuredCost) -> str:
        values = {
            name: [round(part, 2) + 0.0 for part in value] if isinstance(value, tuple) else value
            for name, value in asdict(cost).items()
        }
        return json.dumps(values)

    ordered = sorted(costs, key=lambda cost: (cost.kind, cost.method, cost.model))
    return "[\n" + ",\n".join(map(plain, ordered)) + "\n]\n"
