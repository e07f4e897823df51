"""The results of a sweep in the form that the claims need: conditions with their metrics by seed.

A condition is a model, a task, an attack with its parameters and a stack of defenses with their
parameters. Only done cells count, and only conditions with coherent output: a model that answers
gibberish has neither a backdoor nor safety.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ftsec_ray.claims.contrast import Rates
from ftsec_ray.results.points import NONE, GridPoint, points_of
from ftsec_ray.success import without_trigger

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results


class Evidence:
    """All conditions of a sweep, and why cells are missing."""

    def __init__(self, results: Results) -> None:
        self._statuses: Counter[tuple[str, str]] = Counter()
        self._errors: dict[str, str] = {}
        cells = results.cells.to_pylist()
        for cell in cells:
            if not cell["defenses"]:
                self._statuses[cell["attack"], cell["status"]] += 1
            if cell["status"] != "done":
                self._errors.setdefault(
                    cell["attack"], (cell["error"] or cell["error_code"] or "").split("\n")[0]
                )
        done = [cell for cell in cells if cell["status"] == "done"]
        self.all = points_of(done, results.metrics.to_pylist())
        self._own_controls: dict[str, dict[str, Any]] = results.meta.get("own_controls", {})
        self._trivial = frozenset(results.meta.get("controls", ()))
        self._is_one_task = len({point.task for point in self.all}) < 2

    def conditions(
        self, *, attack: str | None = None, where: Callable[[GridPoint], bool] | None = None
    ) -> list[GridPoint]:
        """Coherent undefended conditions of an attack (None: of all except `none`), ordered by
        size.
        """
        kept = (
            point
            for point in self.all
            if not point.is_incoherent
            and not point.defenses
            and (point.attack == attack if attack else point.attack != NONE)
        )
        return sorted(
            (point for point in kept if where is None or where(point)),
            key=lambda point: (point.size or 0, point.model, point.task, str(point.params)),
        )

    def place_name(self, point: GridPoint) -> str:
        """A condition's model, and its task if the sweep has several."""
        return point.model if self._is_one_task else f"{point.model}, {point.task}"

    def defended(self, undefended: GridPoint) -> Iterator[GridPoint]:
        """The same attack on the same model and task, with one defense that is no control."""
        for point in self.all:
            if (
                len(point.defenses) == 1
                and not self._is_control(point)
                and point.slice == undefended.slice
                and point.attack == undefended.attack
                and point.params == undefended.params
            ):
                yield point

    def _is_control(self, point: GridPoint) -> bool:
        """Whether a condition's only defense is a trivial control, or its mechanism is off."""
        name, params = point.stack[0]
        off = self._own_controls.get(name)
        given = json.loads(params)
        return name in self._trivial or (off is not None and {**given, **off} == given)

    def reference(self, attacked: GridPoint) -> Rates:
        """What an attack's success is compared with: for a backdoor the same prompts without the
        trigger, otherwise the same metric of the model without the attack.
        """
        metric = attacked.success_metric
        without = without_trigger(metric)
        if without is not None and attacked.runs(without):
            return attacked.runs(without)
        return next(
            (
                point.successes_by(metric)
                for point in self.conditions(attack=NONE)
                if point.slice == attacked.slice
            ),
            {},
        )

    def missing(self, attack: str | None = None) -> str:
        """The states of an attack's undefended cells (None: of all attacks), in words."""
        counts: Counter[str] = Counter()
        for (name, status), count in self._statuses.items():
            if name == attack or (attack is None and name != NONE):
                counts[status] += count
        wanted = f"attack {attack!r}" if attack else "an attack"
        if not counts:
            return f"the results have no undefended cell of {wanted}"
        incoherent = sum(
            point.is_incoherent and not point.defenses
            for point in self.all
            if (point.attack == attack if attack else point.attack != NONE)
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
