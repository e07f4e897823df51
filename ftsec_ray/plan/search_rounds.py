"""The attacker's search as a part of the plan: proposals, scores and choice.

A plan grows by rounds. Each round of a search proposes `batch` settings at once, and the next ones
when all of these are measured or have failed. Proposals follow from the recorded seed and the
measurements of earlier rounds alone, so that planning again over a store that holds these walks the
same rounds, and what a killed run had proposed is proposed again. Trials run on the first seed of
the sweep.

The prompts are split into two halves by a hash of their id. The first half chooses: the setting
with the highest success whose loss of utility against the same cell without an attack stays within
the bound. The second half reports.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ftsec_ray import schema
from ftsec_ray.config.sweep import AttackSearch, SearchSpec
from ftsec_ray.errors import SpecError
from ftsec_ray.identity import digest, unit_interval
from ftsec_ray.measured import CLEAN, Count, utility_metrics
from ftsec_ray.plan.stage import Cell
from ftsec_ray.registry import name_of
from ftsec_ray.success import sign_of, source_of, success_metric

Half = Literal["choose", "report"]
STARTUP = 8
"""Trials that are drawn at random before measurements guide the others."""
_SLACK = 1e-9
"""A loss that is the bound but for rounding is within it."""


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """What became of a cell."""

    verdicts: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """Probe -> prompt -> verdict."""
    failed: bool = False


OutcomeLookup = Callable[[Cell], CellOutcome | None]
"""What is known of a cell; None where it is still to be measured."""


def nothing_known(cell: Cell) -> CellOutcome | None:  # noqa: ARG001
    """The look at an empty store."""
    return None


def half_of(prompt_id: str) -> Half:
    """The half that a prompt belongs to, in every cell of every sweep."""
    return "choose" if unit_interval("search", prompt_id) < 0.5 else "report"


def rate(told: CellOutcome | None, metric: str, half: Half) -> Count:
    """A metric on one half of the prompts."""
    known = schema.METRICS[metric]
    asked = [
        verdict
        for probe in known.probes
        for prompt, verdict in (told.verdicts.get(probe, {}) if told else {}).items()
        if half_of(prompt) == half
    ]
    judged = [verdict for verdict in asked if verdict is not None]
    return Count(
        hits=sum(schema.counts(known.verdict, verdict) for verdict in judged),
        n=len(judged),
        n_null=len(asked) - len(judged),
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one half of the prompts says of a setting."""

    value: float | None
    """The searched metric."""
    utility_loss: float | None
    """Clean accuracy lost against the cell without an attack; below 0 where it rose."""
    is_coherent: bool = True


def score(
    told: CellOutcome | None, reference: CellOutcome | None, metric: str, half: Half
) -> Score:
    """The score of a cell; clean accuracy is right answers to benign requests where the task has
    none, and where the attack drives clean accuracy itself.
    """
    losses = {}
    for utility in CLEAN:
        before, after = rate(reference, utility, half).value, rate(told, utility, half).value
        if before is not None and after is not None and utility != metric:
            losses[utility] = before - after
    coherent = rate(told, "coherent_rate", half).value
    return Score(
        value=rate(told, metric, half).value,
        utility_loss=losses.get(utility_metrics(losses)[0]),
        is_coherent=coherent is None or coherent >= schema.INCOHERENT_BELOW,
    )


def is_within(one: Score, bound: float) -> bool:
    """Whether a setting may be chosen: measured, coherent, and within the bound."""
    return (
        one.value is not None
        and one.utility_loss is not None
        and one.is_coherent
        and one.utility_loss <= bound + _SLACK
    )


def choose(scores: Sequence[Score], bound: float, sign: int = 1) -> int | None:
    """The place of the strongest score within the bound; of equals the one that costs less utility,
    then the first.
    """
    ranked = [
        (sign * one.value, -one.utility_loss, -place)
        for place, one in enumerate(scores)
        if is_within(one, bound) and one.value is not None and one.utility_loss is not None
    ]
    return -max(ranked)[2] if ranked else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One proposed setting."""

    number: int
    values: Mapping[str, Any]
    """By the names of the ranges."""
    cell: Cell | None
    """None where the attack refuses these values together."""
    told: CellOutcome | None
    score: Score | None
    """On the choosing half; None until it is measured, and where it failed."""

    @property
    def status(self) -> str:
        """done, failed or pending."""
        return "pending" if self.told is None else "failed" if self.told.failed else "done"


@dataclass(frozen=True, kw_only=True)
class PlannedSearch:
    """One search in one place of the grid, as far as it has come."""

    key: str
    """Identity of the search in its place."""
    entry: AttackSearch
    metric: str
    """The metric whose verdicts count (`success.source_of`)."""
    sampler_seed: int
    references: tuple[Cell, ...]
    """The place without an attack, one cell per seed; the first is that of the trials."""
    fixed: tuple[Cell, ...]
    """The attack with its fixed parameters, likewise."""
    trials: tuple[Trial, ...]
    chosen: Trial | None
    finals: tuple[Cell, ...]
    """The chosen setting, one cell per seed."""
    is_open: bool
    """Whether trials are still to be measured or proposed."""

    @property
    def left(self) -> int:
        """Trials that may still be proposed."""
        return self.entry.search.trials - len(self.trials) if self.is_open else 0

    @property
    def cells(self) -> list[Cell]:
        """All cells that the search needs."""
        return [
            *self.references,
            *self.fixed,
            *(trial.cell for trial in self.trials if trial.cell is not None),
            *self.finals,
        ]


def search_key(entry: AttackSearch, cell: Cell) -> str:
    """What a search is in its place; not how many trials it has, so that more of them begin with
    those that it had.
    """
    told = {
        one.name: getattr(entry.search, one.name)
        for one in fields(entry.search)
        if one.name != "trials"
    }
    stack = [[name_of(one), one] for one in cell.defenses]
    return digest(
        [
            name_of(entry.attack),
            entry.attack,
            told,
            cell.model.name,
            cell.task.name,
            stack,
            cell.seed,
        ]
    )


class Proposer:
    """Optuna's tree-structured Parzen estimator, asked for a batch at a time; equal seeds and
    scores give equal proposals.
    """

    def __init__(self, search: SearchSpec, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search, self._sign = search, sign_of(search.metric)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what of its sampler Optuna calls experimental
            sampler = optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=STARTUP,
                multivariate=True,
                constant_liar=True,
                constraints_func=lambda trial: (trial.user_attrs.get("excess", 1.0),),
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        """The next settings, by the names of the ranges."""
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(count):
                trial = self._study.ask()
                self._asked.append(trial)
                found.append(self._values(trial))
        return found

    def _values(self, trial: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in self._search.ranges:
            if one.choices:
                found[one.name] = one.choices[
                    trial.suggest_categorical(one.name, list(range(len(one.choices))))
                ]
            elif isinstance(one.low, int):
                found[one.name] = trial.suggest_int(one.name, one.low, one.high, log=one.log)
            else:
                found[one.name] = trial.suggest_float(one.name, one.low, one.high, log=one.log)
        return found

    def tell(self, scores: Iterable[Score | None]) -> None:
        """What became of the settings asked for last; None and a setting without a number count as
        failed.
        """
        import optuna

        asked, self._asked = self._asked, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for trial, one in zip(asked, scores, strict=True):
                if one is None or one.value is None or one.utility_loss is None:
                    self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                trial.set_user_attr(
                    "excess",
                    one.utility_loss - self._search.max_utility_loss if one.is_coherent else 1.0,
                )
                self._study.tell(trial, self._sign * one.value)


Setting = Callable[[Mapping[str, Any], int | None], tuple[Cell, ...]]
"""(values, number of the trial) -> its cell; (values, None) -> those of the chosen setting, one per
seed. None at all where the attack refuses these values together; SpecError where they fit on no
machine.
"""


def walk(
    entry: AttackSearch,
    key: str,
    references: tuple[Cell, ...],
    fixed: tuple[Cell, ...],
    setting: Setting,
    look: OutcomeLookup,
) -> PlannedSearch:
    """A search through its rounds as far as measurements lead; `references` and `fixed` have a cell
    per seed, that of the trials first.
    """
    spec = entry.search
    metric = source_of(spec.metric, success_metric(entry.attack))
    sampler_seed = int(key[:8], 16)
    reference = look(references[0])
    proposer = Proposer(spec, sampler_seed)
    trials: list[Trial] = []
    while len(trials) < spec.trials and (
        not trials or (reference and all(one.told for one in trials[-spec.batch :]))
    ):
        if trials:
            proposer.tell(one.score for one in trials[-spec.batch :])
        for values in proposer.ask(min(spec.batch, spec.trials - len(trials))):
            cell = _tried(setting, values, len(trials))
            told = CellOutcome(failed=True) if cell is None else look(cell)
            scored = (
                None
                if told is None or told.failed or reference is None
                else score(told, reference, metric, "choose")
            )
            # the verdicts themselves are not kept: a search may have thousands of trials
            trials.append(
                Trial(
                    number=len(trials),
                    values=values,
                    cell=cell,
                    told=told and CellOutcome(failed=told.failed),
                    score=scored,
                )
            )
    is_open = reference is None or any(one.told is None for one in trials)
    measured = [one for one in trials if one.score is not None]
    place = (
        None
        if is_open
        else choose(
            [one.score for one in measured if one.score],
            spec.max_utility_loss,
            sign_of(spec.metric),
        )
    )
    chosen = None if place is None else measured[place]
    return PlannedSearch(
        key=key,
        entry=entry,
        metric=metric,
        sampler_seed=sampler_seed,
        references=references,
        fixed=fixed,
        trials=tuple(trials),
        chosen=chosen,
        finals=() if chosen is None else setting(chosen.values, None),
        is_open=is_open,
    )


def _tried(setting: Setting, values: Mapping[str, Any], number: int) -> Cell | None:
    try:
        return next(iter(setting(values, number)), None)
    except SpecError:
        return None
