"""The results of a sweep as what the claims ask for: conditions, each with its metrics by seed.

A condition is a model, a task, an attack with its parameters and a stack of defenses with theirs.
Only done cells count, and of those only conditions whose output is coherent text: a model that
answers gibberish has neither a backdoor nor safety.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ftsec_ray.claims.contrast import Rate, Rates
from ftsec_ray.results.utility import utilities
from ftsec_ray.success import ASR, WITHOUT_TRIGGER, shown_metric, success_share

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

NONE = "none"
COHERENT_FROM = 0.5
"""Share of coherent answers from which on a condition counts."""


@dataclass(kw_only=True)
class Condition:
    """One point of the grid over all its seeds."""

    model: str
    family: str
    size: int | None
    """Weights of the model."""
    aligned: bool
    task: str
    attack: str
    attack_phase: str
    params: dict[str, Any]
    """Parameters of the attack."""
    defenses: tuple[str, ...]
    defense_phases: tuple[str, ...]
    defense_params: str
    success_metric: str
    """The metric that says how well the attack does."""
    metrics: dict[str, dict[int, Rate]] = field(default_factory=lambda: defaultdict(dict))

    def rates(self, metric: str) -> Rates:
        """The values of a metric by seed; empty where it was not measured."""
        return self.metrics.get(metric, {})

    @property
    def success(self) -> Rates:
        """The share of prompts at which the attack succeeded, by seed; empty where that was not
        measured.
        """
        return self.as_success(self.success_metric)

    def as_success(self, metric: str) -> Rates:
        """A success metric, of an attack or without one, as the share of successes."""
        return {
            seed: one._replace(value=success_share(metric, one.value))
            for seed, one in self.rates(metric).items()
        }

    def mean(self, metric: str) -> float | None:
        """Mean over seeds."""
        return (
            fmean(one.value for one in self.rates(metric).values()) if self.rates(metric) else None
        )

    @property
    def is_coherent(self) -> bool:
        """Whether at least half of what the model says is coherent text; also where that was not
        measured.
        """
        share = self.mean("coherent_rate")
        return share is None or share >= COHERENT_FROM

    @property
    def place(self) -> tuple[str, str]:
        """Model and task."""
        return self.model, self.task


class Evidence:
    """All conditions of a sweep, and why cells are missing."""

    def __init__(self, results: Results) -> None:
        self._statuses: Counter[tuple[str, str]] = Counter()
        self._errors: dict[str, str] = {}
        found: dict[tuple[Any, ...], Condition] = {}
        of_cell: dict[str, tuple[Condition, int]] = {}
        for cell in results.cells.to_pylist():
            if not cell["defenses"]:
                self._statuses[cell["attack"], cell["status"]] += 1
            if cell["status"] != "done":
                self._errors.setdefault(
                    cell["attack"], (cell["error"] or cell["error_code"] or "").split("\n")[0]
                )
                continue
            key = tuple(
                cell[name] if name != "defenses" else tuple(cell[name] or ()) for name in _KEY
            )
            if key not in found:
                found[key] = Condition(
                    model=cell["model"],
                    family=cell["family"] or "",
                    size=cell["model_params"],
                    aligned=bool(cell["aligned"]),
                    task=cell["task"],
                    attack=cell["attack"],
                    attack_phase=cell["attack_phase"] or "",
                    params=_params(cell["attack_params"]),
                    defenses=tuple(cell["defenses"] or ()),
                    defense_phases=tuple(cell["defense_phases"] or ()),
                    defense_params=cell["defense_params"] or "",
                    success_metric=shown_metric(cell),
                )
            of_cell[cell["cell"]] = found[key], cell["seed"] or 0
        metrics = results.metrics.to_pylist()
        beside = utilities(metrics)
        for row in metrics:
            if row["cell"] in of_cell and row["value"] is not None:
                condition, seed = of_cell[row["cell"]]
                condition.metrics[row["metric"]][seed] = Rate(
                    row["value"], row["n"], row["n_null"], beside[row["cell"]]
                )
        self.all = list(found.values())
        self._is_one_task = len({one.task for one in self.all}) < 2

    def conditions(
        self, *, attack: str | None = None, where: Callable[[Condition], bool] | None = None
    ) -> list[Condition]:
        """Coherent undefended conditions of an attack (None: of all but `none`), in order
        of size.
        """
        kept = (
            one
            for one in self.all
            if one.is_coherent
            and not one.defenses
            and (one.attack == attack if attack else one.attack != NONE)
        )
        return sorted(
            (one for one in kept if where is None or where(one)),
            key=lambda one: (one.size or 0, one.model, one.task, str(one.params)),
        )

    def place_name(self, one: Condition) -> str:
        """A condition's model, and its task where the sweep has several."""
        return one.model if self._is_one_task else f"{one.model}, {one.task}"

    def defended(self, undefended: Condition) -> Iterator[Condition]:
        """The same attack on the same model and task, behind one defense."""
        for one in self.all:
            if (
                len(one.defenses) == 1
                and one.place == undefended.place
                and one.attack == undefended.attack
                and one.params == undefended.params
            ):
                yield one

    def reference(self, attacked: Condition) -> Rates:
        """What an attack's success is held against: of a backdoor the same prompts without the
        trigger, of others the same metric of the model without the attack.
        """
        metric = attacked.success_metric
        if metric == ASR and attacked.rates(WITHOUT_TRIGGER):
            return attacked.rates(WITHOUT_TRIGGER)
        return next(
            (
                one.as_success(metric)
                for one in self.conditions(attack=NONE)
                if one.place == attacked.place
            ),
            {},
        )

    def missing(self, attack: str | None = None) -> str:
        """What became of an attack's undefended cells (None: of all attacks'), in words."""
        counts: Counter[str] = Counter()
        for (name, status), count in self._statuses.items():
            if name == attack or (attack is None and name != NONE):
                counts[status] += count
        wanted = f"attack {attack!r}" if attack else "an attack"
        if not counts:
            return f"no undefended cell of {wanted} in the results"
        incoherent = sum(
            not one.is_coherent and not one.defenses
            for one in self.all
            if (one.attack == attack if attack else one.attack != NONE)
        )
        error = next(
            (
                text
                for name, text in self._errors.items()
                if text and (attack is None or name == attack)
            ),
            "",
        )
        parts = [
            f"{counts[status]} {status}"
            for status in ("done", "failed", "pending")
            if counts[status]
        ]
        return (
            f"undefended cells of {wanted}: {', '.join(parts)}"
            + (f", {incoherent} of the done conditions incoherent" if incoherent else "")
            + (f" ({error})" if error else "")
        )


_KEY = ("model", "task", "attack", "attack_params", "defenses", "defense_params")


def _params(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def label_of(condition: Condition, among: list[Condition]) -> str:
    """An attack's name, with those of its parameters that differ among conditions of the same
    attack.
    """
    rivals = [one.params for one in among if one.attack == condition.attack]
    varied = [
        name
        for name in condition.params
        if any(other.get(name) != condition.params[name] for other in rivals)
    ]
    return condition.attack + (
        f" ({', '.join(f'{name} {condition.params[name]}' for name in varied)})" if varied else ""
    )
