"""Run units as Ray Tune trials; imported on demand only, and with `trials` the only module that
imports `ray.tune`.

A trial carries the id of a unit and nothing else; what the units are travels once per worker
through the object store. A worker that reached a verdict returns it as an ordinary result, so a
trial that ends without one has lost its worker,
and the dispatcher puts its unit back: retries are ours and not Tune's. Workers are reused from unit
to unit, which takes one identical placement-group factory per resource class, a pending window far
above 1 and a `reset_config` that never refuses. What Tune writes is scratch: resuming means
planning again.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray  # noqa: TID253 - this module is the place for it
from ray import tune  # noqa: TID253

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.context import Runtime
from ftsec_ray.errors import EnvironmentFault, FtsecError
from ftsec_ray.execute.dist_worker import GroupOrder
from ftsec_ray.execute.unit import (
    StageResult,
    gpu_share,
    imported,
    run_unit,
    set_up_numerics,
    short_text,
)
from ftsec_ray.numerics import environment_of
from ftsec_ray.plan.stage import Stage, is_data, is_group
from ftsec_ray.redact import clean_logs
from ftsec_ray.schedule.capacity import (
    Bundles,
    Pieces,
    Room,
    bundles_of,
    fits,
    pieces_of,
    room_ahead,
    room_beside,
    share_of,
    slots_of,
    together,
)
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.dist_launch import GroupEnded, launch_on_ray, run_worker_group
from ftsec_ray.schedule.trials import (
    BROKEN_LIMIT,
    NewestFirst,
    NoProgress,
    OldestFirst,
    StageSearcher,
    StopWhenStalled,
    TrialMonitor,
)
from ftsec_ray.schedule.tune_environment import worker_environment
from ftsec_ray.store import Store

SURPLUS = 16
"""Trials that wait beyond the slots of a given cluster: an autoscaler sees them. A Ray of our own
cannot grow and has none.
"""
MAX_RESTARTS = 3
WINDOW = 4096
"""Pending trials that Tune may have in such a cluster; how many it gets is the searcher's to say.
"""
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


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


class UnitTrainable(tune.Trainable):
    """A worker: it lives on from unit to unit, with the models of its session in memory."""

    def setup(
        self,
        config: dict[str, Any],
        work: Work | None = None,
        units: Mapping[str, tuple[Stage, ...]] | None = None,
    ) -> None:
        """Take what all units need; a worker that cannot open says so in `step`, where it
        is heard.
        """
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
        stages = (
            [Stage.from_json(one) for one in json.loads(rebuilt)] if rebuilt else self._units[unit]
        )
        try:
            if is_group(on):
                return {
                    "done": True,
                    "verdicts": json.dumps(
                        [asdict(verdict) for verdict in self._worker_group(stages, on)]
                    ),
                }
            self._open()
        except GroupEnded as ended:
            return {"done": True, "lost": short_text(ended)}
        except (ImportError, FtsecError, OSError) as error:
            return {"done": True, "broken": short_text(error)}
        verdicts = run_unit(
            stages, self._store, self._session, self._runner, attempt=self._config["attempt"]
        )
        return {"done": True, "verdicts": json.dumps([asdict(verdict) for verdict in verdicts])}

    def _worker_group(self, stages: Sequence[Stage], on: str) -> list[StageResult]:
        """Have a worker group run the unit: this process only waits for it."""
        work, share = self._work, share_of(on, self._work.bundles[on])
        order = GroupOrder(
            stages=tuple(stages),
            store=work.store,
            runtime=work.runtime,
            cache_gib=work.cache_gib,
            runner=work.runner,
            session=work.session,
            attempt=self._config["attempt"],
            threads=max(1, int(share.get("CPU", 1))),
        )
        return run_worker_group(
            order, lambda order: launch_on_ray(order, share), Store.open(work.store)
        )

    def _open(self) -> None:
        """Import and open what outlives a unit, once."""
        if self._session is None:
            assigned = ray.get_runtime_context().get_assigned_resources()
            threads, gpus = max(1, int(assigned.get("CPU", 1))), float(assigned.get("GPU", 0.0))
            # A worker without a GPU sees none, whatever the rest of the sweep runs on.
            runtime = (
                self._work.runtime
                if gpus or not self._work.runtime.device.startswith("cuda")
                else replace(self._work.runtime, device="cpu")
            )
            set_up_numerics(runtime.numerics, threads)
            self._store = Store.open(self._work.store)
            self._runner = imported(self._work.runner)
            session = imported(self._work.session)(self._store, runtime, self._work.cache_gib)
            set_up_numerics(runtime.numerics, threads)  # again, for what the imports brought
            gpu_share(gpus)
            self._session = session


def run_tune(
    dispatcher: Dispatcher,
    work: Work,
    resources: ResourceSpec,
    *,
    address: str | None,
    workers: int | None,
) -> None:
    """Run the units of a dispatcher as trials, until none is left."""
    used = {unit.resource for unit in dispatcher.units.values()}
    bundles = bundles_of(
        dispatcher.plan.spec, {stage.resource for stage in dispatcher.plan.stages.values()}
    )
    address = address or os.environ.get("RAY_ADDRESS")
    need = max((bundles[one].get("CPU", 0.0) for one in used if is_group(one)), default=0.0)
    with (
        _environment(),
        worker_environment(environment_of(work.runtime.numerics)),
        _ray(address, workers, resources, need),
        tempfile.TemporaryDirectory(prefix="ftsec-tune-") as scratch,
    ):
        pieces = {
            one: pieces_of(one, bundle, ray.cluster_resources()) for one, bundle in bundles.items()
        }
        bundles |= {one: together(group) for one, group in pieces.items() if is_data(one)}
        if address is None:
            _check_room(pieces, bundles, used)
        for restart in range(MAX_RESTARTS + 1):
            stuck = _run_tuner(
                dispatcher,
                work,
                pieces,
                bundles,
                used,
                workers,
                f"{scratch}/{restart}",
                can_grow=address is not None,
            )
            for unit in stuck:
                dispatcher.abandon(unit)
            if dispatcher.finished:
                return
        raise EnvironmentFault(
            f"Ray started none of {len(stuck)} waiting units, {MAX_RESTARTS + 1} times over",
            ray.available_resources(),
            f"room for one of {bundles}",
            "look at `ray status` and at the cluster's log, then run again",
        )


def _run_tuner(
    dispatcher: Dispatcher,
    work: Work,
    pieces: Pieces,
    bundles: Bundles,
    used: Collection[str],
    workers: int | None,
    scratch: str,
    *,
    can_grow: bool,
) -> list[str]:
    """One tuner over what is left; returns the units that it left without an answer."""
    given = {unit.id: unit.stages for unit in dispatcher.units.values()}

    def room_and_limit() -> tuple[Room, int]:
        have = ray.cluster_resources()
        slots = {
            one: max(1, count)
            for one, count in slots_of({one: bundles[one] for one in used}, have).items()
        }
        if can_grow:
            slots = {
                one: count if is_group(one) else max(count, workers or 0) + SURPLUS
                for one, count in slots.items()
            }
        limit = min(sum(slots.values()), max(workers or 2**31, len(slots)))
        return (
            room_ahead(slots, bundles, ray.cluster_resources)
            if can_grow
            else room_beside(bundles, have)
        ), limit

    room, limit = room_and_limit()
    searcher = StageSearcher(dispatcher, room=room, limit=limit, given=frozenset(given))
    factories = {name: tune.PlacementGroupFactory(group) for name, group in pieces.items()}
    host = tune.with_resources(
        tune.with_parameters(UnitTrainable, work=work, units=given),
        lambda config: factories[config["on"]],
    )
    callbacks = [
        TrialMonitor(searcher, bundles, grown=room_and_limit if can_grow else None),
        NoProgress(),
    ]
    window = (
        WINDOW if can_grow else max(2, limit)
    )  # a window of 1 hangs where there is more than one resource class
    tuner = tune.Tuner(
        host,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=window,
            reuse_actors=True,
            scheduler=(OldestFirst if can_grow else NewestFirst)(searcher),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="units",
            storage_path=scratch,
            stop=StopWhenStalled(searcher),
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False, checkpoint_frequency=0
            ),
        ),
    )
    with _setting("TUNE_MAX_PENDING_TRIALS_PG", str(window)):
        tuner.fit()
    if searcher.fault is not None:
        raise searcher.fault
    if searcher.is_stopped and len(searcher.broken) >= BROKEN_LIMIT:
        raise EnvironmentFault(
            f"workers cannot open: {searcher.broken[-1]}",
            work.runner,
            "workers that have ftsec_ray installed and can reach the store",
            "install the same version on all nodes, or look at the text above",
        )
    return list(searcher.live.values())


def _check_room(pieces: Pieces, bundles: Bundles, used: Collection[str]) -> None:
    """EnvironmentFault when a class fits on no node: a Ray of our own will not grow, and Tune would
    wait for ever.
    """
    for one in used:
        least = bundles[one] if is_group(one) else pieces[one][-1]
        if not any(fits(least, node["Resources"]) for node in ray.nodes() if node["Alive"]):
            raise EnvironmentFault(
                f"no room on this machine for a unit of class {one!r}",
                ray.cluster_resources(),
                f"at least {least}",
                "lower `resources` in the sweep, or give --address of a cluster",
            )


@contextmanager
def _ray(
    address: str | None, workers: int | None, resources: ResourceSpec, need: float
) -> Iterator[None]:
    """A Ray cluster: the one at hand, the one at an address, or one of this process, with so many
    cores as a worker group needs.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            count = (workers or 0) * resources.cpus_per_stage or os.cpu_count() or 1
            ray.init(
                address="local",
                num_cpus=max(1, round(max(count, need) + 0.499)),
                include_dashboard=False,
                **quiet,
            )
    except Exception as error:  # Ray has no class of its own for a start that takes too long
        raise EnvironmentFault(
            f"cannot reach or start Ray: {error}",
            address or "this machine",
            "a running cluster",
            "--address HOST:6379 of a Ray head, or --executor local",
        ) from error
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
    loggers = {
        name: logging.getLogger(name) for name in ("ray", "ray.tune", "ray.data", "ray.train")
    }
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
