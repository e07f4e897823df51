"""What Ray Tune asks while a run is on: which unit a trial gets, which trial a free worker gets,
and what became of both.

With `tune_executor` and `tune_internals` the only module that imports `ray.tune`. Where Tune offers
no other way it reads Tune's controller, through `tune_internals`.
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
"""Trials that have ended and that Tune may remember."""


class StageSearcher(Searcher):
    """Hands units to Tune as the dispatcher says, and tells it what became of them."""

    def __init__(self, leases: UnitLeases, *, given: frozenset[str]) -> None:
        super().__init__()
        self.leases = leases
        self.live: dict[str, str] = {}
        """Trial id -> unit."""
        self.is_stopped = False
        self.fault: EnvironmentFault | None = None
        """Why the run cannot go on."""
        self._given = given
        """Units whose stages the workers have."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A unit for a new trial; None only while a trial is live, FINISHED when no unit is
        left.
        """
        dispatcher = self.leases.dispatcher
        if self.is_stopped or dispatcher.finished:
            return str(Searcher.FINISHED)
        unit = self.leases.take(self.leases.warm)
        if unit is None:
            # With nothing live only a budget can be the reason; the dispatcher has then finished.
            return str(Searcher.FINISHED) if dispatcher.finished else None
        self.live[trial_id] = unit.id
        config = {"unit": unit.id, "on": unit.resource, "attempt": dispatcher.attempt(unit.id)}
        if unit.id not in self._given:  # it was not foreseen when the workers got their units
            config["rebuilt"] = json.dumps([stage.to_json() for stage in unit.stages])
        return config

    def on_trial_start(self, trial_id: str) -> None:
        """A worker took the unit of a trial."""
        if trial_id in self.live:
            self.leases.started(self.live[trial_id])

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001, FBT002
    ) -> None:  # noqa: FBT001, FBT002
        """Settle the unit of a trial by its verdicts; one that ended in an error waits for `lost`,
        which is told why.
        """
        if error or trial_id not in self.live:
            return
        self.leases.answered(self.live.pop(trial_id), result or {})
        self.is_stopped = self.is_stopped or self.leases.is_broken

    def lost(self, trial_id: str, why: str) -> None:
        """The worker of a trial is gone."""
        unit = self.live.pop(trial_id, None)
        if unit is not None:
            self.leases.lost(unit, why)

    def save(self, checkpoint_path: str) -> None:
        """States of the units, for people; nothing reads them back."""
        with open(checkpoint_path, "w", encoding="utf-8") as stream:  # noqa: PTH123 - the path is Tune's
            json.dump(
                {
                    unit: state.value
                    for unit, state in self.leases.dispatcher.scheduler.states().items()
                },
                stream,
            )

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: what is done is read from the store."""
        raise EnvironmentFault(
            "a run is resumed by planning again, not by Tuner.restore",
            checkpoint_path,
            "ftsec run with the same store",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> StageSearcher:
        return self

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return (Searcher, ())  # Tune pickles its searcher into scratch that is never read


class OldestFirst(FIFOScheduler):  # type: ignore[misc]
    """First in, first out, and nothing kept of trials that have ended.

    A worker that has just become free goes to the oldest trial whose own worker is not about to
    start: first in, first out to the letter would throw that one away, and where starting takes
    longer than a unit a cluster would never be filled. Tune keeps one idle worker for trials to
    come, with its core or its GPU, and does not see that the workers of a worker group wait for
    it: while a worker group lives, idle workers are let go. Tune also keeps every trial to its end,
    and writes and reads them all once more when it is done: tens of kilobytes and some milliseconds
    for each. Nobody here asks for them, since what became of a unit stands in the store.
    """

    def __init__(self, searcher: StageSearcher) -> None:
        super().__init__()
        self._searcher = searcher
        self._live_trials = 0
        """Trials that had not ended at the last look."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The oldest trial that waits for room, or for a worker that has not been asked for."""
        controller = controller_of(tune_controller)
        self._forget(controller)
        waiting = trials_without_start(controller)
        reusing = (trial for trial in waiting if has_idle_worker(controller, trial))
        return self._or_release(next(reusing, waiting[0] if waiting else None), controller)

    def _or_release(self, chosen: Any, controller: Any) -> Any:
        """The chosen trial; where there is none and a worker group lives, idle workers go."""
        if chosen is None and self._searcher.leases.has_group:
            release_idle_workers(controller)
        return chosen

    def _forget(self, controller: Any) -> None:
        """Now and then, drop the trials whose end the searcher knows."""
        if count_trials(controller) >= self._live_trials + KEPT_TRIALS:
            forget_trials(controller, lambda trial: trial.trial_id not in self._searcher.live)
            self._live_trials = count_trials(controller)


class NewestFirst(OldestFirst):
    """Gives a worker that has just become free to the newest trial.

    First in, first out would give it to the oldest, whose own worker may be about to start, and
    throw that one away: where starting takes longer than a unit, no worker would ever be added. All
    waiting trials have a free slot (see `free_slots` of the leases), so nothing is overtaken by
    more than the start of a worker.
    """

    def __init__(self, searcher: StageSearcher) -> None:
        super().__init__(searcher)
        self._fresh: deque[Any] = deque()
        self._older: deque[Any] = deque()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:  # noqa: ARG002
        """Note a new trial."""
        self._fresh.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A trial that Tune has not yet asked a worker for, else the oldest that waits."""
        controller = controller_of(tune_controller)
        self._forget(controller)
        chosen = next((trial for trial in self._fresh if trial.status == "PENDING"), None)
        self._older += self._fresh
        self._fresh.clear()
        if (
            len(self._older) > KEPT_TRIALS
        ):  # the first may wait long for its worker, while those behind it come and go
            self._older = deque(one for one in self._older if one.status == "PENDING")
        while self._older and self._older[0].status != "PENDING":
            self._older.popleft()
        return self._or_release(chosen or (self._older[0] if self._older else None), controller)


class TrialMonitor(tune.Callback):
    """Tells starts and losses, settles trials of which Tune never told the searcher, follows a
    cluster's growth, and notices a stall.
    """

    def __init__(self, searcher: StageSearcher, capacity: ClusterCapacity) -> None:
        self._searcher = searcher
        self._capacity = capacity
        self._growth = GrowthMonitor(capacity)
        self._began = self._checked = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A worker took the unit of a trial."""
        self._searcher.on_trial_start(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """The worker of a trial died."""
        self._searcher.lost(trial.trial_id, _last_words(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """Once a second, compare what Tune thinks of its trials with what the searcher thinks."""
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
    """Prints nothing and remembers nothing of any trial: Tune adds one that does both unless it is
    given one.
    """

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Say nothing."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say nothing."""


def _last_words(trial: Any) -> str:
    """What Ray says of the death of a trial's worker."""
    path = trial.error_file
    lines = (
        Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).is_file() else []
    )
    return death_text(lines)


class StopWhenStalled(tune.Stopper):
    """Ends the tuner when the searcher says so."""

    def __init__(self, searcher: StageSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """Never: a trial ends by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop everything."""
        return self._searcher.is_stopped
