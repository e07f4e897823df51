"""The answer to a sweep's question, in at most five sentences and one table.

The rule. A defense is credited with an effect on an attack only where

- the attack took effect without a defense (`took_effect`), on a finished model;
- the table `comparisons` calls the defense `better` than each of its own controls (kind `control`):
  on the same prompts and seeds, and corrected over all tests of attack success;
- it is also `better` than no defense, where that was compared.

What is lost in utility stands in the same sentence: every measure that the same table calls `worse`
than with the control or without a defense, in the attacked cell or without an attack.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ftsec_ray.report.grid import Grid, Key, MethodLabel
from ftsec_ray.report.took_effect import AttackEffect, effects_of_attack, state_over
from ftsec_ray.results.compare import CONTROL
from ftsec_ray.results.points import NONE

Word = Literal[
    "better", "no difference shown", "not tested", "incoherent", "worse", "mixed", "no control"
]
_WORST_FIRST: tuple[Word, ...] = (
    "worse",
    "incoherent",
    "not tested",
    "no difference shown",
    "better",
)


@dataclass(frozen=True)
class Loss:
    """One measure of utility that is clearly worse with a defense."""

    metric: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """A defense against an attack on one model on which the attack took effect."""

    own: Key
    control: Key | None
    """The own control that it does least well against; None where the sweep has none."""
    word: Word
    before: float | None
    """Attack success with the control, or without a defense where there is no control."""
    after: float | None
    losses: tuple[Loss, ...]
    detectable: float | None
    """Smallest difference that as many prompts and seeds show four times in five."""
    against_none: str | None
    """What the table concludes of the comparison with no defense; None where it has none."""

    @property
    def is_below_none(self) -> bool:
        """Whether the table calls it better than no defense."""
        return self.against_none == "better"

    @property
    def is_tested_against_none(self) -> bool:
        """Whether the comparison with no defense could be tested."""
        return self.against_none not in (None, "not tested")


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """A defense against an attack, over the finished models on which the attack took effect."""

    attack: MethodLabel
    defense: MethodLabel
    models: tuple[ModelResult, ...]

    @property
    def counts(self) -> Counter[Word]:
        """Word -> on how many models."""
        return Counter(one.word for one in self.models)

    @property
    def word(self) -> Word:
        """One word over all models."""
        counts = self.counts
        if counts["better"] and counts["worse"]:
            return "mixed"
        order: tuple[Word, ...] = (
            "better",
            "worse",
            "incoherent",
            "no difference shown",
            "not tested",
        )
        return next((word for word in order if counts[word]), "no control")

    @property
    def credited(self) -> tuple[ModelResult, ...]:
        """The models on which the defense is credited."""
        return tuple(one for one in self.models if one.word == "better")

    @property
    def shown(self) -> tuple[ModelResult, ...]:
        """The models whose numbers stand for the word."""
        return self.credited or self.models

    @property
    def before(self) -> float | None:
        """Mean attack success with the control."""
        return _mean([one.before for one in self.shown])

    @property
    def after(self) -> float | None:
        """Mean attack success with the defense, on the same models."""
        return _mean([one.after for one in self.shown])

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Per measure of utility the largest loss on any of these models."""
        largest: dict[str, Loss] = {}
        for loss in (loss for one in self.shown for loss in one.losses):
            known = largest.get(loss.metric)
            if known is None or abs(loss.after - loss.before) > abs(known.after - known.before):
                largest[loss.metric] = loss
        return tuple(largest.values())

    @property
    def opened(self) -> ModelResult | None:
        """The model whose two cells a click opens: the largest difference."""
        known = [one for one in self.shown if one.after is not None and one.before is not None]
        return max(
            known,
            key=lambda one: abs((one.after or 0.0) - (one.before or 0.0)),
            default=None,
        )


@dataclass(frozen=True, kw_only=True)
class AttackOnModels:
    """An attack without a defense, over the finished models on which it was measured."""

    attack: MethodLabel
    on: tuple[tuple[str, str, AttackEffect], ...]
    """(model, task, effect)."""

    @property
    def effects(self) -> list[AttackEffect]:
        """The effects alone."""
        return [effect for *_, effect in self.on]

    @property
    def state(self) -> str:
        """One of: took effect (on some model), did not take effect, not known, or not measured."""
        return state_over(self.effects) or "not measured"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the page, the Markdown and the terminal say first."""

    attacks: tuple[AttackOnModels, ...]
    pairs: tuple[PairResult, ...]
    """Every defense that is no control against every attack that took effect, as far as planned."""
    controls: Mapping[str, tuple[str, ...]]
    """Label of a stack -> labels of its own controls."""
    only_controls: frozenset[str]
    """Stacks that are in the sweep as a control."""
    names: Mapping[str, str]
    """Label of a stack -> the shortest name that is its own."""

    def pair(self, attack: str, defense: str) -> PairResult | None:
        """The result of a defense against an attack."""
        return next(
            (p for p in self.pairs if (p.attack.label, p.defense.label) == (attack, defense)), None
        )


def answer_of(grid: Grid) -> Answer:
    """The answer that a grid's comparisons give."""
    controls = controls_of(grid)
    only_controls = stacks_only_controls(controls)
    attacks = tuple(
        AttackOnModels(
            attack=attack,
            on=tuple((model.name, task, e) for model, task, e in effects_of_attack(grid, attack)),
        )
        for attack in grid.real_attacks
    )
    pairs = tuple(
        pair
        for attack in attacks
        for defense in grid.acting
        if defense.label not in only_controls
        if (pair := _pair(grid, attack, defense)) is not None
    )
    return Answer(
        attacks=attacks,
        pairs=pairs,
        controls=controls,
        only_controls=only_controls,
        names=short_names(grid, only_controls),
    )


def controls_of(grid: Grid) -> dict[str, tuple[str, ...]]:
    """Label of a stack -> the labels of the controls that the sweep compares it with."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for (own, other, _), row in grid.compared.items():
        if row["kind"] == CONTROL:
            found[own[3]][other[3]] = None
    return {label: tuple(own) for label, own in found.items()}


def stacks_only_controls(controls: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The stacks that are in the sweep as a control of another one alone."""
    return frozenset({label for own in controls.values() for label in own} - set(controls))


def short_names(grid: Grid, only_controls: frozenset[str]) -> dict[str, str]:
    """Label of a stack -> its name without parameters, where no other defense has that name."""
    sharing = Counter(one.name for one in grid.defenses if one.label not in only_controls)
    return {
        one.label: (
            one.name if one.label not in only_controls and sharing[one.name] == 1 else one.label
        )
        for one in grid.defenses
    }


def _pair(grid: Grid, attack: AttackOnModels, defense: MethodLabel) -> PairResult | None:
    models = tuple(
        _on_model(grid, key)
        for model, task, effect in attack.on
        if effect.state == "took effect"
        if (key := (model, task, attack.attack.label, defense.label)) in grid.points
    )
    return PairResult(attack=attack.attack, defense=defense, models=models) if models else None


def _on_model(grid: Grid, own: Key) -> ModelResult:
    undefended = (*own[:3], NONE)
    plain = grid.success_row(own, undefended)
    held = [
        (other, row)
        for other in grid.controls_at(own)
        if (row := grid.success_row(own, other)) is not None
    ]
    if not held:
        before, after = grid.value(undefended), grid.value(own)
        return ModelResult(
            own=own,
            control=None,
            word="no control",
            before=before.value if before else None,
            after=after.value if after else None,
            losses=tuple(_losses(grid, own, undefended)),
            detectable=None,
            against_none=None if plain is None else plain["conclusion"],
        )
    other, row = min(
        held, key=lambda one: (_WORST_FIRST.index(one[1]["conclusion"]), -(one[1]["effect"] or 0.0))
    )
    word: Word = row["conclusion"]
    if word == "better" and plain is not None and plain["conclusion"] != "better":
        word = "no difference shown"
    return ModelResult(
        own=own,
        control=other,
        word=word,
        before=row["rate_against"],
        after=row["rate"],
        losses=tuple(_losses(grid, own, other)),
        detectable=row["detectable"],
        against_none=None if plain is None else plain["conclusion"],
    )


def _losses(grid: Grid, own: Key, control: Key) -> Iterator[Loss]:
    """Utility clearly worse than with the control or without a defense, attacked or not."""
    model, task, attack, defense = own
    compared: list[tuple[Key, Key]] = [
        (own, control),
        (own, (model, task, attack, NONE)),
        ((model, task, NONE, defense), (model, task, NONE, NONE)),
    ]
    for metric in grid.utility_metrics[task]:
        for one, other in compared:
            row: Mapping[str, Any] | None = grid.comparison(one, other, metric)
            if row is not None and row["conclusion"] == "worse":
                yield Loss(metric, row["rate_against"], row["rate"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
