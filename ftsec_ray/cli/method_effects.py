"""The measured effects of methods, for `ftsec show`: figures in a file that `python -m
tests.benchmarks.bench_method_effect --write` makes from the results of a finished sweep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftsec_ray.cli.method_figures import MethodFigure, read_figures, text_of_figures

FILE = Path(__file__).with_name("method_effects.json")


@dataclass(frozen=True, kw_only=True)
class MeasuredEffect(MethodFigure):
    """Attack success with one setting of a method on one model, and what it is compared with."""

    attack: str
    """Of a defense: the attack; empty for attacks."""
    metric: str
    """What counts as success, as a share 0..1."""
    value: float
    low: float | None
    high: float | None
    """95 % interval of `value`: over seeds, or over prompts if there was one seed."""
    beside: dict[str, float]
    """What stands beside it: `base rate`, or `no defense` and `control`."""
    conclusion: str
    """Of an attack: whether it took effect. Of a defense: what the report concludes of it and its
    control."""

    @property
    def text(self) -> str:
        """One line for the page of the method."""
        names = (f"{self.setting}:" if self.setting else "", self.attack, self.metric)
        head = " ".join(filter(None, names))
        interval = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        beside = "".join(f", {name} {value:.2f}" for name, value in self.beside.items())
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return (
            f"{head} {self.value:.2f}{interval}{beside}: {self.conclusion} ({self.model}, {seeds},"
            f" {self.sweep})"
        )


def effects_of(kind: str | None = None, method: str | None = None) -> list[MeasuredEffect]:
    """The measured effects of a method, or of all methods."""
    return read_figures(FILE, lambda plain: MeasuredEffect(**plain), kind, method)


def text_of_effects(effects: Iterable[MeasuredEffect]) -> str:
    """The content of the file: one line for each effect, shares in hundredths."""

    def plain(effect: MeasuredEffect) -> dict[str, Any]:
        """The values of one effect, for JSON."""
        values: dict[str, Any] = asdict(effect)
        for name in ("value", "low", "high"):
            values[name] = None if values[name] is None else round(values[name], 2) + 0.0
        values["beside"] = {name: round(value, 2) + 0.0 for name, value in effect.beside.items()}
        return values

    ordered = sorted(effects, key=lambda one: (one.kind, one.method, one.sweep, one.model))
    return text_of_figures(map(plain, ordered))
