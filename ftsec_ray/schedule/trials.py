"""Connects Ray Tune with the dispatcher: which unit a trial runs, which trial a free worker gets,
and the results of both.

Only this module, `tune_executor` and `tune_internals` import `ray.tune`. Where Tune has no public
interface, it uses Tune's controller through `tune_internals`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from ray import tune  # noqa: TID253 - this module is the place for it
from ray.tune.progress_reporter import TrialProgressCallback  # noqa: TID253
from ray.tune.schedulers import FIFOScheduler  # noqa: TID253
from ray.tune.search import Searcher  # noqa: TID253

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule.cluster_capacity import ClusterCapacity, GrowthMonitor, is_stalled
from ftsec_ray.schedule.tune_internals import (
    controller_of,
    count_trials,
    forget_trials,
    has_idle_worker,
    release_idle_workers,
    trials_without_start,
)
from ftsec_ray.schedule.unit_leases import UnitLeases, death_text

KEPT_TRIALS = 256
"""Ended trials that Tune may keep before they are dropped."""


class StageSearcher(Searcher):
    """Gives the dispatcher's units to Tune as trials, and reports their results back."""

    def __init__(self, leases: UnitLeases, *, given: frozenset[str]) -> None:
        super().__init__()
        self.leases = leases
        self.live: dict[str, str] = {}
        """Trial id -> unit."""
        self.is_stopped = False
        self.fault: EnvironmentFault | None = None
        """Why the run cannot continue; None if it can."""
        self._given = given
        """Ids of the units whose stages the workers already have."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A unit for a new trial; None if it must wait for a live trial; FINISHED if no unit is
        left.
        """
        dispatcher = self.leases.dispatcher
        if self.is_stopped or dispatcher.finished:
            return str(Searcher.FINISHED)
        unit = self.leases.take(self.leases.warm)
        if unit is None:
            # Without live trials, only the budget is the reason; the dispatcher is then finished.
            return str(Searcher.FINISHED) if dispatcher.finished else None
        self.live[trial_id] = unit.id
        config = {"unit": unit.id, "on": unit.resource, "attempt": dispatcher.attempt(unit.id)}
        if unit.id not in self._given:  # added after the workers got their units
            config["rebuilt"] = json.dumps([stage.to_json() for stage in unit.stages])
        return config

    def on_trial_start(self, trial_id: str) -> None:
        """Report that a worker started the unit of a trial."""
        if trial_id in self.live:
            self.leases.started(self.live[trial_id])

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001, FBT002
    ) -> None:  # noqa: FBT001, FBT002
        """Report the results of a trial's unit; after an error, `lost` is called instead, with the
        reason.
        """
        if error or trial_id not in self.live:
            return
        self.leases.answered(self.live.pop(trial_id), result or {})
        self.is_stopped = self.is_stopped or self.leases.is_broken

    def lost(self, trial_id: str, why: str) -> None:
        """Report that the worker of a trial died."""
        unit = self.live.pop(trial_id, None)
        if unit is not None:
            self.leases.lost(unit, why)

    def save(self, checkpoint_path: str) -> None:
        """Write the states of the units, for debugging; nothing reads this file."""
        with open(checkpoint_path, "w", encoding="utf-8") as stream:  # noqa: PTH123 - the path is Tune's
            json.dump(
                {
                    unit: state.value
                    for unit, state in self.leases.dispatcher.scheduler.states().items()
                },
                stream,
            )

    def restore(self, checkpoint_path: str) -> None:
        """Always raise EnvironmentFault: a run is resumed from the store."""
        raise EnvironmentFault(
            "Tuner.restore cannot resume a run",
            checkpoint_path,
            "a run that is resumed from its store",
            "run `ftsec run` again with the same store",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> StageSearcher:
        return self

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return (Searcher, ())  # Tune pickles its searcher into a file that is never read


class OldestFirst(FIFOScheduler):  # type: ignore[misc]
    """Runs the oldest waiting trial first, and drops trials that have ended.

    A worker that becomes free goes to the oldest trial whose own worker is not about to start.
    Tune's plain FIFO order would discard the worker that is starting; if a start takes longer than
    a unit, the cluster would never fill up.

    Tune keeps one idle worker with its core or GPU for later trials, although the workers of a
    worker group may wait for these resources; so while a worker group is live, idle workers are
    stopped. Tune also keeps all ended trials, and writes and reads them once more at the end, at
    tens of kilobytes and some milliseconds each. They are dropped, since the store has the results.
    """

    def __init__(self, searcher: StageSearcher) -> None:
        super().__init__()
        self._searcher = searcher
        self._live_trials = 0
        """Trials that had not ended at the last check."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The oldest waiting trial that can use an idle worker, else the oldest one whose worker is
        not about to start.
        """
        controller = controller_of(tune_controller)
        self._forget(controller)
        waiting = trials_without_start(controller)
        reusing = (trial for trial in waiting if has_idle_worker(controller, trial))
        return self._or_release(next(reusing, waiting[0] if waiting else None), controller)

    def _or_release(self, chosen: Any, controller: Any) -> Any:
        """The chosen trial; if there is none and a worker group is live, stop idle workers."""
        if chosen is None and self._searcher.leases.has_group:
            release_idle_workers(controller)
        return chosen

    def _forget(self, controller: Any) -> None:
        """Drop ended trials whose result the searcher has, after every KEPT_TRIALS new ones."""
        if count_trials(controller) >= self._live_trials + KEPT_TRIALS:
            forget_trials(controller, lambda trial: trial.trial_id not in self._searcher.live)
            self._live_trials = count_trials(controller)


class NewestFirst(OldestFirst):
    """Gives a worker that becomes free to the newest trial.

    FIFO order would give it to the oldest trial and discard that trial's own worker, which may be
    about to start; if a start takes longer than a unit, no worker would ever be added. All waiting
    trials have a free slot (see `free_slots` of UnitLeases), so an older trial waits at most for
    the start of its worker.
    """

    def __init__(self, searcher: StageSearcher) -> None:
        super().__init__(searcher)
        self._fresh: deque[Any] = deque()
        self._older: deque[Any] = deque()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:  # noqa: ARG002
        """Record a new trial."""
        self._fresh.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A trial for which Tune has not yet requested a worker, else the oldest waiting one."""
        controller = controller_of(tune_controller)
        self._forget(controller)
        chosen = next((trial for trial in self._fresh if trial.status == "PENDING"), None)
        self._older += self._fresh
        self._fresh.clear()
        if len(self._older) > KEPT_TRIALS:  # the first trial may wait while later ones end
            self._older = deque(trial for trial in self._older if trial.status == "PENDING")
        while self._older and self._older[0].status != "PENDING":
            self._older.popleft()
        return self._or_release(chosen or (self._older[0] if self._older else None), controller)


class TrialMonitor(tune.Callback):
    """Reports starts and dead workers, settles trials that Tune did not report to the searcher, and
    checks for growth of the cluster and for stalls.
    """

    def __init__(self, searcher: StageSearcher, capacity: ClusterCapacity) -> None:
        self._searcher = searcher
        self._capacity = capacity
        self._growth = GrowthMonitor(capacity)
        self._began = self._checked = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Report that a worker started the unit of a trial."""
        self._searcher.on_trial_start(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Report that the worker of a trial died."""
        self._searcher.lost(trial.trial_id, _last_words(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """Once a second, compare Tune's states of the trials with those of the searcher."""
        now = time.monotonic()
        if now - self._checked < 1.0:
            return
        self._checked = now
        live = [trial for trial in trials if trial.trial_id in self._searcher.live]
        for trial in live:
            if trial.status == "TERMINATED":
                self._searcher.on_trial_complete(trial.trial_id, trial.last_result)
            elif trial.status == "ERROR":
                self._searcher.lost(trial.trial_id, _last_words(trial))
        running = {trial.config["on"] for trial in live if trial.status == "RUNNING"}
        leases, classes = self._searcher.leases, {trial.config["on"] for trial in live}
        last_event = max(leases.dispatcher.last_event, self._began)
        if (
            live
            and is_stalled(now - last_event, is_running=bool(running))
            and self._capacity.has_capacity(classes)
        ):
            self._searcher.is_stopped = True
        if self._growth.is_due:
            leases.free_slots, leases.limit = self._capacity.free_slots_and_limit(
                least=len(self._capacity.used)
            )
            self._searcher.fault = self._growth.look(classes, running, last_event)
            self._searcher.is_stopped = (
                self._searcher.is_stopped or self._searcher.fault is not None
            )


class NoProgress(TrialProgressCallback):  # type: ignore[misc]
    """A progress callback that does nothing; without it, Tune adds its own, which prints and stores
    every trial.
    """

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Print nothing."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print nothing."""


def _last_words(trial: Any) -> str:
    """Ray's error message for the death of a trial's worker."""
    path = trial.error_file
    lines = (
        Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).is_file() else []
    )
    return death_text(lines)


class StopWhenStalled(tune.Stopper):
    """Stops the tuner when the searcher is stopped."""

    def __init__(self, searcher: StageSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """Always False: a trial ends on its own."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop all trials."""
        return self._searcher.is_stopped
