"""Runs units as Ray Tune trials; imported only on demand.

The config of a trial holds only the id of a unit; each worker gets the stages of all units once,
through Ray's object store. A worker returns the results of its stages, failed ones included, as an
ordinary trial result. So a trial without a result means that its worker died, and the dispatcher
(not Tune) retries its unit. Workers are reused for many units: this needs the same placement-group
factory object for each resource class, a pending window far above 1, and a `reset_config` that
always succeeds. Tune's files are temporary: a run is resumed by planning again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from ray import tune  # noqa: TID253 - this module is the place for it

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.plan.stage import Stage
from ftsec_ray.schedule.capacity import Bundles
from ftsec_ray.schedule.cluster_capacity import (
    MAX_RESTARTS,
    ClusterCapacity,
    connected_capacity,
    stall_fault,
)
from ftsec_ray.schedule.dispatcher import Dispatcher
from ftsec_ray.schedule.own_ray import setting
from ftsec_ray.schedule.ray_worker import RayWorker
from ftsec_ray.schedule.trials import (
    NewestFirst,
    NoProgress,
    OldestFirst,
    StageSearcher,
    StopWhenStalled,
    TrialMonitor,
)
from ftsec_ray.schedule.tune_internals import check_tune, memory_kills_are_deaths, workers_with
from ftsec_ray.schedule.unit_leases import UnitLeases

WINDOW = 4096
"""Pending trials that Tune may have in a cluster that can grow; the searcher limits their number.
"""
_SWITCHES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}


class UnitTrainable(tune.Trainable):
    """A worker that runs many units and keeps the models of its session in memory."""

    def setup(
        self,
        config: dict[str, Any],
        spec: WorkerSpec | None = None,
        bundles: Bundles | None = None,
        units: Mapping[str, tuple[Stage, ...]] | None = None,
    ) -> None:
        """Prepare the worker for all units."""
        assert spec is not None, "given by tune.with_parameters"
        assert bundles is not None, "given by tune.with_parameters"
        assert units is not None, "given by tune.with_parameters"
        self._worker, self._units, self._config = RayWorker(spec, bundles), units, config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Set the next unit; always True, because the searcher would not see a refusal."""
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Run the unit and return the results of its stages."""
        rebuilt, unit = self._config.get("rebuilt"), self._config["unit"]
        stages = [Stage.from_json(s) for s in json.loads(rebuilt)] if rebuilt else self._units[unit]
        answer = self._worker.run(stages, self._config["on"], self._config["attempt"])
        return {"done": True, **answer}


def run_tune(
    dispatcher: Dispatcher,
    spec: WorkerSpec,
    resources: ResourceSpec,
    *,
    address: str | None,
    workers: int | None,
) -> None:
    """Run all units of a dispatcher as trials of Ray Tune; see `executors.Executor`."""
    check_tune()
    with (
        workers_with(spec.environment),
        connected_capacity(
            dispatcher, resources, address=address, workers=workers, switches=_SWITCHES
        ) as capacity,
        tempfile.TemporaryDirectory(prefix="ftsec-tune-") as scratch,
    ):
        for restart in range(MAX_RESTARTS + 1):
            leases = _run_tuner(dispatcher, spec, capacity, f"{scratch}/{restart}")
            stuck = len(leases.live)
            leases.abandon()
            if dispatcher.finished:
                return
        raise stall_fault(stuck, capacity.bundles)


def _run_tuner(
    dispatcher: Dispatcher, spec: WorkerSpec, capacity: ClusterCapacity, scratch: str
) -> UnitLeases:
    """Run one tuner over the remaining units; returns its leases; live ones got no answer."""
    units = {unit.id: unit.stages for unit in dispatcher.units.values()}
    free_slots, limit = capacity.free_slots_and_limit(least=len(capacity.used))
    leases = UnitLeases(dispatcher, free_slots=free_slots, limit=limit)
    searcher = StageSearcher(leases, given=frozenset(units))
    factories = {
        name: tune.PlacementGroupFactory(group) for name, group in capacity.requests.items()
    }
    host = tune.with_resources(
        tune.with_parameters(UnitTrainable, spec=spec, bundles=capacity.bundles, units=units),
        lambda config: factories[config["on"]],
    )
    # A window of 1 hangs if there is more than one resource class.
    window = WINDOW if capacity.can_grow else max(2, limit)
    tuner = tune.Tuner(
        host,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=window,
            reuse_actors=True,
            scheduler=(OldestFirst if capacity.can_grow else NewestFirst)(searcher),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="units",
            storage_path=scratch,
            stop=StopWhenStalled(searcher),
            verbose=0,
            callbacks=[TrialMonitor(searcher, capacity), NoProgress()],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False, checkpoint_frequency=0
            ),
        ),
    )
    with setting("TUNE_MAX_PENDING_TRIALS_PG", str(window)), memory_kills_are_deaths():
        tuner.fit()
    if searcher.fault is not None:
        raise searcher.fault
    if leases.is_broken:
        raise leases.broken_fault(spec.runner)
    return leases
