"""The attacker's search as part of the plan: proposals, scores and the chosen setting.

A plan grows in rounds. Each round of a search proposes `batch` settings at once; the next round
starts when all of them are measured or have failed. Proposals depend only on the recorded seed and
on the measurements of earlier rounds. So planning again with the same store gives the same rounds,
and a restarted run proposes the same settings again. Trials run on the first seed of the sweep.

The prompts are split into two halves by a hash of their id. The first half selects the setting with
the highest attack success whose utility loss, against the same cell without an attack, stays within
the bound. The second half is held out for the report.
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
"""Random trials before measurements guide the proposals."""
_SLACK = 1e-9
"""Tolerance for rounding when a utility loss is compared with its bound."""


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """The outcome of a cell."""

    verdicts: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """Probe -> id of the prompt -> verdict."""
    failed: bool = False


OutcomeLookup = Callable[[Cell], CellOutcome | None]
"""The outcome of a cell; None if it is not measured yet."""


def nothing_known(cell: Cell) -> CellOutcome | None:  # noqa: ARG001
    """The lookup for an empty store."""
    return None


def half_of(prompt_id: str) -> Half:
    """The half of a prompt; the same in every cell of every sweep."""
    return "choose" if unit_interval("search", prompt_id) < 0.5 else "report"


def rate(outcome: CellOutcome | None, metric: str, half: Half) -> Count:
    """A metric on one half of the prompts."""
    counted = schema.METRICS[metric]
    asked = [
        verdict
        for probe in counted.probes
        for prompt, verdict in (outcome.verdicts.get(probe, {}) if outcome else {}).items()
        if half_of(prompt) == half
    ]
    judged = [verdict for verdict in asked if verdict is not None]
    return Count(
        hits=sum(schema.counts(counted.verdict, verdict) for verdict in judged),
        n=len(judged),
        n_null=len(asked) - len(judged),
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """The measurement of a setting on one half of the prompts."""

    value: float | None
    """Value of the searched metric."""
    utility_loss: float | None
    """Loss of clean accuracy against the cell without an attack; negative if accuracy rose."""
    is_coherent: bool = True


def score(
    outcome: CellOutcome | None, reference: CellOutcome | None, metric: str, half: Half
) -> Score:
    """The score of a cell against its reference without an attack.

    Utility is clean accuracy; if the task has none, or if it is the searched metric, utility is the
    rate of correct answers to benign requests.
    """
    losses = {}
    for utility in CLEAN:
        before, after = rate(reference, utility, half).value, rate(outcome, utility, half).value
        if before is not None and after is not None and utility != metric:
            losses[utility] = before - after
    coherent = rate(outcome, "coherent_rate", half).value
    return Score(
        value=rate(outcome, metric, half).value,
        utility_loss=losses.get(utility_metrics(losses)[0]),
        is_coherent=coherent is None or coherent >= schema.INCOHERENT_BELOW,
    )


def is_within(measured: Score, bound: float) -> bool:
    """Whether a setting may be chosen: measured, coherent, and utility loss within the bound."""
    return (
        measured.value is not None
        and measured.utility_loss is not None
        and measured.is_coherent
        and measured.utility_loss <= bound + _SLACK
    )


def choose(scores: Sequence[Score], bound: float, sign: int = 1) -> int | None:
    """Index of the strongest score within the bound; ties go to the smaller utility loss, then to
    the first. None if no score is within the bound.

    Args:
        scores: The scores.
        bound: Largest allowed utility loss.
        sign: 1 if a higher value is a stronger attack, -1 if a lower one is.
    """
    ranked = [
        (sign * s.value, -s.utility_loss, -index)
        for index, s in enumerate(scores)
        if is_within(s, bound) and s.value is not None and s.utility_loss is not None
    ]
    return -max(ranked)[2] if ranked else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One proposed setting."""

    number: int
    values: Mapping[str, Any]
    """Values of the searched parameters, by name."""
    cell: Cell | None
    """None if the attack rejects this combination of values."""
    outcome: CellOutcome | None
    """None until the trial is measured."""
    score: Score | None
    """Score on the first half of the prompts; None if it is not measured yet or failed."""

    @property
    def status(self) -> str:
        """`done`, `failed` or `pending`."""
        return "pending" if self.outcome is None else "failed" if self.outcome.failed else "done"


@dataclass(frozen=True, kw_only=True)
class PlannedSearch:
    """The search of one attack on one model, task and defense stack, with its trials so far."""

    key: str
    """Identity of the search."""
    entry: AttackSearch
    metric: str
    """The metric whose verdicts count (`success.source_of`)."""
    sampler_seed: int
    references: tuple[Cell, ...]
    """Cells without an attack, one per seed; the trials are compared with the first."""
    fixed: tuple[Cell, ...]
    """Cells of the attack with its fixed parameters, one per seed."""
    trials: tuple[Trial, ...]
    chosen: Trial | None
    finals: tuple[Cell, ...]
    """Cells of the chosen setting, one per seed."""
    is_open: bool
    """Whether more trials must be measured or proposed."""

    @property
    def left(self) -> int:
        """Number of trials that may still be proposed."""
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
    """Identity of a search on a cell's model, task, stack and seed. The number of trials is not
    part of it, so that a search with more trials continues the earlier one.
    """
    settings = {
        f.name: getattr(entry.search, f.name) for f in fields(entry.search) if f.name != "trials"
    }
    stack = [[name_of(defense), defense] for defense in cell.defenses]
    return digest(
        [
            name_of(entry.attack),
            entry.attack,
            settings,
            cell.model.name,
            cell.task.name,
            stack,
            cell.seed,
        ]
    )


class Proposer:
    """Proposes settings in batches with Optuna's tree-structured Parzen estimator; equal seeds and
    scores give equal proposals.
    """

    def __init__(self, search: SearchSpec, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search, self._sign = search, sign_of(search.metric)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns about experimental options
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
        """The next settings: values of the searched parameters, by name."""
        settings = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(count):
                trial = self._study.ask()
                self._asked.append(trial)
                settings.append(self._values(trial))
        return settings

    def _values(self, trial: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for r in self._search.ranges:
            if r.choices:
                index = trial.suggest_categorical(r.name, list(range(len(r.choices))))
                values[r.name] = r.choices[index]
            elif isinstance(r.low, int):
                values[r.name] = trial.suggest_int(r.name, r.low, r.high, log=r.log)
            else:
                values[r.name] = trial.suggest_float(r.name, r.low, r.high, log=r.log)
        return values

    def tell(self, scores: Iterable[Score | None]) -> None:
        """Report the scores of the last batch, in its order; None, or a score without values,
        counts as failed.
        """
        import optuna

        asked, self._asked = self._asked, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for trial, s in zip(asked, scores, strict=True):
                if s is None or s.value is None or s.utility_loss is None:
                    self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                trial.set_user_attr(
                    "excess",
                    s.utility_loss - self._search.max_utility_loss if s.is_coherent else 1.0,
                )
                self._study.tell(trial, self._sign * s.value)


Setting = Callable[[Mapping[str, Any], int | None], tuple[Cell, ...]]
"""(values, number of the trial) -> the cell of the trial; (values, None) -> the cells of the chosen
setting, one per seed. Empty if the attack rejects this combination of values; SpecError if the
fine-tune fits on no machine.
"""


def walk(
    entry: AttackSearch,
    key: str,
    references: tuple[Cell, ...],
    fixed: tuple[Cell, ...],
    setting: Setting,
    look: OutcomeLookup,
) -> PlannedSearch:
    """Plan a search round by round, as far as its trials are measured.

    Args:
        entry: The attack and its search.
        key: Identity of the search.
        references: Cells without an attack, one per seed, that of the trials first.
        fixed: Cells of the attack with its fixed parameters, one per seed.
        setting: Makes the cells of a setting.
        look: Returns the outcome of a cell.
    """
    spec = entry.search
    metric = source_of(spec.metric, success_metric(entry.attack))
    sampler_seed = int(key[:8], 16)
    reference = look(references[0])
    proposer = Proposer(spec, sampler_seed)
    trials: list[Trial] = []
    while len(trials) < spec.trials and (
        not trials or (reference and all(trial.outcome for trial in trials[-spec.batch :]))
    ):
        if trials:
            proposer.tell(trial.score for trial in trials[-spec.batch :])
        for values in proposer.ask(min(spec.batch, spec.trials - len(trials))):
            cell = _tried(setting, values, len(trials))
            outcome = CellOutcome(failed=True) if cell is None else look(cell)
            scored = (
                None
                if outcome is None or outcome.failed or reference is None
                else score(outcome, reference, metric, "choose")
            )
            # Verdicts are dropped to save memory: a search may have thousands of trials.
            trials.append(
                Trial(
                    number=len(trials),
                    values=values,
                    cell=cell,
                    outcome=outcome and CellOutcome(failed=outcome.failed),
                    score=scored,
                )
            )
    is_open = reference is None or any(trial.outcome is None for trial in trials)
    measured = [trial for trial in trials if trial.score is not None]
    index = (
        None
        if is_open
        else choose(
            [trial.score for trial in measured if trial.score],
            spec.max_utility_loss,
            sign_of(spec.metric),
        )
    )
    chosen = None if index is None else measured[index]
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
