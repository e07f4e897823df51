"""Run units as Ray Tune trials; the only module that imports `ray.tune`, and itself imported on demand only.

A trial carries the id of a unit and nothing else; what the units are travels once per worker through the object store.
A worker that reached a verdict returns it as an ordinary result, so a trial that ends without one has lost its worker,
and the conductor puts its unit back: retries are ours and not Tune's. Workers are reused from unit to unit, which
takes one identical placement-group factory per resource class, a pending window far above 1 and a `reset_config` that
never refuses. What Tune writes is scratch: resuming means planning again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray  # noqa: TID253 - this module is the place for it
from ray import tune  # noqa: TID253
from ray.tune.progress_reporter import TrialProgressCallback  # noqa: TID253
from ray.tune.schedulers import FIFOScheduler  # noqa: TID253
from ray.tune.search import Searcher  # noqa: TID253

from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault, FtsecError
from ftsec_ray.execute.gang import GangOrder
from ftsec_ray.execute.unit import StageVerdict, cpu_threads, gpu_share, imported, run_unit, short_text
from ftsec_ray.plan.stage import Stage, is_data, is_gang, workers_of
from ftsec_ray.redact import clean_logs
from ftsec_ray.schedule.conductor import Conductor
from ftsec_ray.schedule.credentials import no_keys_for_workers
from ftsec_ray.schedule.gang import GangEnded, launch_on_ray, run_gang
from ftsec_ray.schedule.room import Bundles, Pieces, Room, bundles_of, fits, pieces_of, room_ahead, room_beside, share_of, slots_of, together
from ftsec_ray.spec.sweep import ResourceSpec
from ftsec_ray.store import Store

SURPLUS = 16
"""Trials that wait beyond the slots of a given cluster: an autoscaler sees them. A Ray of our own cannot grow and has none."""
BROKEN_LIMIT = 3
"""Workers that may fail to open before any unit ended, until the run is given up."""
STALL_S = 300.0
"""Seconds without an event, with room for a unit and none running, after which the tuner is started anew."""
MAX_RESTARTS = 3
NO_ROOM_S = 600.0
"""Seconds for which units wait without any other at work, where no node can hold them and none is on its way, until the run is given up."""
GROWTH_S = 5.0
"""Between two looks at how large a cluster is that may grow."""
KEPT_TRIALS = 256
"""Trials that have ended and that Tune may remember."""
WINDOW = 4096
"""Pending trials that Tune may have in such a cluster; how many it gets is the searcher's to say."""
_OUT_OF_MEMORY = re.compile("low on memory|memory usage threshold")
"""What Ray says of a worker that it killed itself, before the kernel would."""
_ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
                "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0", "TUNE_GLOBAL_CHECKPOINT_S": "3600",
                "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every worker needs besides its units."""

    store: str
    """URI of the store."""
    runtime: Runtime
    cache_gib: float
    runner: str
    session: str
    bundles: Bundles
    """Resource class -> what one unit of it occupies."""


class StageHost(tune.Trainable):
    """A worker: it lives on from unit to unit, with the models of its session in memory."""

    def setup(self, config: dict[str, Any], work: Work | None = None,
              units: Mapping[str, tuple[Stage, ...]] | None = None) -> None:
        """Take what all units need; a worker that cannot open says so in `step`, where it is heard."""
        assert work is not None, "given by tune.with_parameters"
        assert units is not None, "given by tune.with_parameters"
        logging.getLogger("ray").setLevel(logging.ERROR)
        clean_logs()
        self._work, self._units, self._config = work, units, config
        self._session: Any = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next unit; a refusal would never reach the searcher."""
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Run the unit to its verdicts."""
        rebuilt, unit, on = self._config.get("rebuilt"), self._config["unit"], self._config["on"]
        stages = [Stage.from_json(one) for one in json.loads(rebuilt)] if rebuilt else self._units[unit]
        try:
            if is_gang(on):
                return {"done": True, "verdicts": json.dumps([asdict(verdict) for verdict in self._gang(stages, on)])}
            self._open()
        except GangEnded as ended:
            return {"done": True, "lost": short_text(ended)}
        except (ImportError, FtsecError, OSError) as error:
            return {"done": True, "broken": short_text(error)}
        verdicts = run_unit(stages, self._store, self._session, self._runner, attempt=self._config["attempt"])
        return {"done": True, "verdicts": json.dumps([asdict(verdict) for verdict in verdicts])}

    def _gang(self, stages: Sequence[Stage], on: str) -> list[StageVerdict]:
        """Have a gang run the unit: this process only waits for it."""
        work, share = self._work, share_of(on, self._work.bundles[on])
        order = GangOrder(stages=tuple(stages), store=work.store, runtime=work.runtime, cache_gib=work.cache_gib, runner=work.runner,
                          session=work.session, attempt=self._config["attempt"], threads=max(1, int(share.get("CPU", 1))))
        return run_gang(order, lambda order: launch_on_ray(order, share), Store.open(work.store))

    def _open(self) -> None:
        """Import and open what outlives a unit, once."""
        if self._session is None:
            assigned = ray.get_runtime_context().get_assigned_resources()
            threads, gpus = max(1, int(assigned.get("CPU", 1))), float(assigned.get("GPU", 0.0))
            # A worker without a GPU sees none, whatever the rest of the sweep runs on.
            runtime = self._work.runtime if gpus or not self._work.runtime.device.startswith("cuda") else replace(self._work.runtime, device="cpu")
            cpu_threads(threads)
            self._store = Store.open(self._work.store)
            self._runner = imported(self._work.runner)
            session = imported(self._work.session)(self._store, runtime, self._work.cache_gib)
            cpu_threads(threads)  # again, for what the imports have brought
            gpu_share(gpus)
            self._session = session


class StageSearcher(Searcher):
    """Hands units to Tune as the conductor says, and tells it what became of them."""

    def __init__(self, conductor: Conductor, *, room: Room, limit: int, given: frozenset[str]) -> None:
        super().__init__()
        self.conductor = conductor
        self.room = room
        """Trials of each resource class that may wait or run beside those that do."""
        self.limit = limit
        """The same of all classes together."""
        self.live: dict[str, str] = {}
        """Trial id -> unit."""
        self.is_stopped = False
        self.broken: list[str] = []
        """What workers said that could not open."""
        self.fault: EnvironmentFault | None = None
        """Why the run cannot go on."""
        self._given = given
        self._warm: str | None = None
        self._wide: set[str] = set()
        """Trials of pipelines that wait for all of their cores."""

    @property
    def has_gang(self) -> bool:
        """Whether a gang waits or runs."""
        return any(is_gang(self.conductor.units[unit].resource) for unit in self.live.values())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A unit for a new trial; None only while a trial is live, FINISHED when no unit is left."""
        if self.is_stopped or self.conductor.finished:
            return str(Searcher.FINISHED)
        if len(self.live) >= self.limit or self._wide:
            return None  # what would take one of the cores for which a pipeline waits, one by one, waits as well
        taken: Counter[str] = Counter(self.conductor.units[unit].resource for unit in self.live.values())
        free = {one: max(1, count) if is_data(one) else count for one, count in self.room(taken).items()}
        unit = self.conductor.next(free=free, warm=self._warm)
        if unit is None:  # with nothing live only a budget can be the reason, and then the conductor has finished
            return str(Searcher.FINISHED) if self.conductor.finished else None
        self.live[trial_id] = unit.id
        if is_data(unit.resource):
            self._wide.add(trial_id)
        config = {"unit": unit.id, "on": unit.resource, "attempt": self.conductor.attempt(unit.id)}
        if unit.id not in self._given:  # it was not foreseen when the workers got their units
            config["rebuilt"] = json.dumps([stage.to_json() for stage in unit.stages])
        return config

    def on_trial_start(self, trial_id: str) -> None:
        """A worker took the unit of a trial."""
        self._wide.discard(trial_id)
        if trial_id in self.live:
            self.conductor.started(self.live[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Settle the unit of a trial by its verdicts; one that ended in an error waits for `lost`, which is told why."""
        if error or trial_id not in self.live:
            return
        told = result or {}
        verdicts = told.get("verdicts")
        if verdicts is None:
            if "broken" in told:
                self.broken.append(str(told["broken"]))
                self.is_stopped = self.is_stopped or (self._warm is None and len(self.broken) >= BROKEN_LIMIT)
            self.lost(trial_id, str(told.get("broken") or told.get("lost") or "the trial ended without a verdict"))
        else:
            self._wide.discard(trial_id)
            unit = self.live.pop(trial_id)
            self._warm = self.conductor.units[unit].affinity
            self.conductor.settle(unit, [StageVerdict(**one) for one in json.loads(verdicts)])

    def lost(self, trial_id: str, why: str) -> None:
        """The worker of a trial is gone."""
        self._wide.discard(trial_id)
        unit = self.live.pop(trial_id, None)
        if unit is not None:
            self.conductor.lost(unit, why, code="oom" if _OUT_OF_MEMORY.search(why) else "worker_lost")

    def save(self, checkpoint_path: str) -> None:
        """States of the units, for people; nothing reads them back."""
        with open(checkpoint_path, "w", encoding="utf-8") as stream:  # noqa: PTH123 - the path is Tune's
            json.dump({unit: state.value for unit, state in self.conductor.scheduler.states().items()}, stream)

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: what is done is read from the store."""
        raise EnvironmentFault("a run is resumed by planning again, not by Tuner.restore", checkpoint_path,
                               "ftsec run with the same store")

    def __deepcopy__(self, memo: dict[int, Any]) -> StageSearcher:
        return self

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return (Searcher, ())  # Tune pickles its searcher into scratch that is never read


class InTurn(FIFOScheduler):  # type: ignore[misc]
    """First in, first out, and nothing kept of trials that have ended.

    A worker that has just become free goes to the oldest trial whose own worker is not about to start: first in, first out
    to the letter would throw that one away, and where starting takes longer than a unit a cluster would never be filled.
    Tune keeps one idle worker for trials to come, with its core or its GPU, and does not see that the workers of a gang wait for
    it: while a gang lives, idle workers are let go.
    Tune also keeps every trial to its end, and writes and reads them all once more when it is done: tens of kilobytes and some
    milliseconds for each. Nobody here asks for them, since what became of a unit stands in the store.
    """

    def __init__(self, searcher: StageSearcher) -> None:
        super().__init__()
        self._searcher = searcher
        self._live_trials = 0
        """Trials that had not ended at the last look."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The oldest trial that waits for room, or for a worker that has not been asked for."""
        controller = tune_controller._tune_controller  # of the wrapper, without its warning
        self._forget(controller)
        started, asked = controller._actor_manager._live_actors_to_ray_actors_resources, controller._trial_to_actor
        waiting = [one for one in controller._trials if one.status == "PENDING" and asked.get(one) not in started]
        free = controller._actor_cache
        reusing = (one for one in waiting if free.num_cached_objects and free.has_cached_object(one.placement_group_factory))
        return self._or_release(next(reusing, waiting[0] if waiting else None), controller)

    def _or_release(self, chosen: Any, controller: Any) -> Any:
        """The chosen trial; where there is none and a gang lives, idle workers go."""
        if chosen is None and self._searcher.has_gang:
            controller._cleanup_cached_actors(force_all=True)
        return chosen

    def _forget(self, controller: Any) -> None:
        """Now and then, drop the trials whose end the searcher knows and whose worker has been let go."""
        trials = controller._trials
        if len(trials) < self._live_trials + KEPT_TRIALS:
            return
        ended = {one for one in trials if one.is_finished() and one.trial_id not in self._searcher.live and one not in controller._trial_to_actor}
        for kept in (trials, controller._pending_trials_list):
            kept[:] = [one for one in kept if one not in ended]
        self._live_trials = len(trials)
        for kept in (controller._stopped_trials, controller._failed_trials, controller._live_trials, controller._trials_to_cache):
            kept -= ended
        for one in ended:
            controller._trial_metadata.pop(one.trial_id, None)


class FreshFirst(InTurn):
    """Gives a worker that has just become free to the newest trial.

    First in, first out would give it to the oldest, whose own worker may be about to start, and throw that one away:
    where starting takes longer than a unit, no worker would ever be added. All waiting trials have room (see `room` of the
    searcher), so nothing is overtaken by more than the start of a worker.
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
        self._forget(tune_controller._tune_controller)
        chosen = next((trial for trial in self._fresh if trial.status == "PENDING"), None)
        self._older += self._fresh
        self._fresh.clear()
        if len(self._older) > KEPT_TRIALS:  # the first may wait long for its worker, while those behind it come and go
            self._older = deque(one for one in self._older if one.status == "PENDING")
        while self._older and self._older[0].status != "PENDING":
            self._older.popleft()
        return self._or_release(chosen or (self._older[0] if self._older else None), tune_controller._tune_controller)


class Reconcile(tune.Callback):
    """Tells starts and losses, settles trials of which Tune never told the searcher, follows a cluster's growth, and notices a stall."""

    def __init__(self, searcher: StageSearcher, bundles: Bundles, *, grown: Callable[[], tuple[Room, int]] | None = None,
                 stall_s: float = STALL_S) -> None:
        self._searcher = searcher
        self._bundles = bundles
        self._grown = grown
        """Room and limit of a cluster that may grow."""
        self._stall_s = stall_s
        self._checked = self._looked = self._had_room = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """A worker took the unit of a trial."""
        self._searcher.on_trial_start(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """The worker of a trial died."""
        self._searcher.lost(trial.trial_id, _last_words(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ANN401, ARG002
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
        running = any(trial.status == "RUNNING" for trial in live)
        if live and is_stalled(now - self._searcher.conductor.last_event, is_running=running, limit_s=self._stall_s) \
                and has_room(self._bundles, {trial.config["on"] for trial in live}):
            self._searcher.is_stopped = True
        if self._grown is not None and now - self._looked >= GROWTH_S:
            self._looked = now
            self._searcher.room, self._searcher.limit = self._grown()
            self._look_for_nodes(now, live)

    def _look_for_nodes(self, now: float, live: Sequence[Any]) -> None:
        """Give up when all that is left waits for nodes of which there are none and none are coming."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        waiting = {trial.config["on"] for trial in live}
        # The trial of a gang runs while its workers wait.
        homeless = {one for one in waiting if not self._has_nodes(one, nodes)}
        is_running = any(trial.status == "RUNNING" and not (is_gang(trial.config["on"]) and trial.config["on"] in homeless) for trial in live)
        if is_running or not waiting or waiting != homeless or is_growing():
            self._had_room = now
        elif now - max(self._had_room, self._searcher.conductor.last_event) > NO_ROOM_S:
            self._searcher.fault = EnvironmentFault(
                f"no node of the cluster has room for a unit of class {' or '.join(map(repr, sorted(waiting)))}, and none is on its way",
                sorted({_shape(node) for node in nodes}), " or ".join(self._asked(one) for one in sorted(waiting)),
                "lower `resources` in the sweep, or add a node type with room for it to the cluster, then run again: what is done stays done")
            self._searcher.is_stopped = True

    def _has_nodes(self, one: str, nodes: Sequence[Mapping[str, float]]) -> bool:
        """Whether the nodes, were nothing else at work, could run a unit of a class: workers of one unit may be on several."""
        return sum(slots_of({one: share_of(one, self._bundles[one])}, node)[one] for node in nodes) >= (workers_of(one) if is_gang(one) else 1)

    def _asked(self, one: str) -> str:
        each = _shape(share_of(one, self._bundles[one])) + " on one node"
        return f"{workers_of(one)} x {each}" if is_gang(one) else each


class Silent(TrialProgressCallback):  # type: ignore[misc]
    """Prints nothing and remembers nothing of any trial: Tune adds one that does both unless it is given one."""

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:  # noqa: ANN401, FBT001, FBT002
        """Say nothing."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401
        """Say nothing."""


def is_stalled(quiet_s: float, *, is_running: bool, limit_s: float = STALL_S) -> bool:
    """Whether units wait for workers that do not come."""
    return not is_running and quiet_s > limit_s


def has_room(bundles: Bundles, classes: set[str]) -> bool:
    """Whether the cluster could start a unit of one of the classes right now."""
    free = ray.available_resources()
    return any(fits(bundles[one], free) for one in classes)


def is_growing() -> bool:
    """Whether an autoscaler has nodes on their way."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_launches or status.pending_nodes)


def _shape(resources: Mapping[str, float]) -> str:
    """Cores and GPUs in words."""
    return " + ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or name in resources)


def _last_words(trial: Any) -> str:  # noqa: ANN401
    """What Ray says of the death of a trial's worker."""
    path = trial.error_file
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).is_file() else []
    told = " ".join(line.strip() for line in lines if not re.match(r"Failure # |\s*(class_name|actor_id|pid|name|namespace|ip): ", line))
    return told or "the trial ended without a verdict"


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


def run_tune(conductor: Conductor, work: Work, resources: ResourceSpec, *, address: str | None, workers: int | None) -> None:
    """Run the units of a conductor as trials, until none is left."""
    used = {unit.resource for unit in conductor.units.values()}
    bundles = bundles_of(conductor.plan.spec, {stage.resource for stage in conductor.plan.stages.values()})
    address = address or os.environ.get("RAY_ADDRESS")
    need = max((bundles[one].get("CPU", 0.0) for one in used if is_gang(one)), default=0.0)
    with _environment(), no_keys_for_workers(), _ray(address, workers, resources, need), tempfile.TemporaryDirectory(prefix="ftsec-tune-") as scratch:
        pieces = {one: pieces_of(one, bundle, ray.cluster_resources()) for one, bundle in bundles.items()}
        bundles |= {one: together(group) for one, group in pieces.items() if is_data(one)}
        if address is None:
            _check_room(pieces, bundles, used)
        for restart in range(MAX_RESTARTS + 1):
            stuck = _run_tuner(conductor, work, pieces, bundles, used, workers, f"{scratch}/{restart}", can_grow=address is not None)
            for unit in stuck:
                conductor.abandon(unit)
            if conductor.finished:
                return
        raise EnvironmentFault(f"Ray started none of {len(stuck)} waiting units, {MAX_RESTARTS + 1} times over",
                               ray.available_resources(), f"room for one of {bundles}",
                               "look at `ray status` and at the cluster's log, then run again")


def _run_tuner(conductor: Conductor, work: Work, pieces: Pieces, bundles: Bundles, used: Collection[str], workers: int | None,
               scratch: str, *, can_grow: bool) -> list[str]:
    """One tuner over what is left; returns the units that it left without an answer."""
    given = {unit.id: unit.stages for unit in conductor.units.values()}

    def room_and_limit() -> tuple[Room, int]:
        have = ray.cluster_resources()
        slots = {one: max(1, count) for one, count in slots_of({one: bundles[one] for one in used}, have).items()}
        if can_grow:
            slots = {one: count if is_gang(one) else max(count, workers or 0) + SURPLUS for one, count in slots.items()}
        limit = min(sum(slots.values()), max(workers or 2**31, len(slots)))
        return room_ahead(slots, bundles, ray.cluster_resources) if can_grow else room_beside(bundles, have), limit

    room, limit = room_and_limit()
    searcher = StageSearcher(conductor, room=room, limit=limit, given=frozenset(given))
    factories = {name: tune.PlacementGroupFactory(group) for name, group in pieces.items()}
    host = tune.with_resources(tune.with_parameters(StageHost, work=work, units=given), lambda config: factories[config["on"]])
    callbacks = [Reconcile(searcher, bundles, grown=room_and_limit if can_grow else None), Silent()]
    window = WINDOW if can_grow else max(2, limit)  # a window of 1 hangs where there is more than one resource class
    tuner = tune.Tuner(
        host,
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, max_concurrent_trials=window, reuse_actors=True,
                                    scheduler=(InTurn if can_grow else FreshFirst)(searcher),
                                    trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=tune.RunConfig(
            name="units", storage_path=scratch, stop=StopWhenStalled(searcher), verbose=0,
            callbacks=callbacks, failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0)))
    with _setting("TUNE_MAX_PENDING_TRIALS_PG", str(window)):
        tuner.fit()
    if searcher.fault is not None:
        raise searcher.fault
    if searcher.is_stopped and len(searcher.broken) >= BROKEN_LIMIT:
        raise EnvironmentFault(f"workers cannot open: {searcher.broken[-1]}", work.runner, "workers that have ftsec_ray installed "
                               "and can reach the store", "install the same version on all nodes, or look at the text above")
    return list(searcher.live.values())


def _check_room(pieces: Pieces, bundles: Bundles, used: Collection[str]) -> None:
    """EnvironmentFault when a class fits on no node: a Ray of our own will not grow, and Tune would wait for ever."""
    for one in used:
        least = bundles[one] if is_gang(one) else pieces[one][-1]
        if not any(fits(least, node["Resources"]) for node in ray.nodes() if node["Alive"]):
            raise EnvironmentFault(f"no room on this machine for a unit of class {one!r}", ray.cluster_resources(), f"at least {least}",
                                   "lower `resources` in the sweep, or give --address of a cluster")


@contextmanager
def _ray(address: str | None, workers: int | None, resources: ResourceSpec, need: float) -> Iterator[None]:
    """A Ray cluster: the one at hand, the one at an address, or one of this process, with so many cores as a gang needs."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            count = (workers or 0) * resources.cpus_per_stage or os.cpu_count() or 1
            ray.init(address="local", num_cpus=max(1, round(max(count, need) + 0.499)), include_dashboard=False, **quiet)
    except Exception as error:  # Ray has no class of its own for a start that takes too long
        raise EnvironmentFault(f"cannot reach or start Ray: {error}", address or "this machine", "a running cluster",
                               "--address HOST:6379 of a Ray head, or --executor local") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _environment() -> Iterator[None]:
    """Tune's own switches, and its loggers kept to errors, for the time of a run."""
    loggers = {name: logging.getLogger(name) for name in ("ray", "ray.tune", "ray.data", "ray.train")}
    levels = {name: logger.level for name, logger in loggers.items()}
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
