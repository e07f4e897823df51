"""Run units as Ray Tune trials; imported on demand only.

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
"""Pending trials that Tune may have in a cluster that may grow; how many it gets is the searcher's
to say.
"""
_SWITCHES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}


class UnitTrainable(tune.Trainable):
    """A worker: it lives on from unit to unit, with the models of its session in memory."""

    def setup(
        self,
        config: dict[str, Any],
        spec: WorkerSpec | None = None,
        bundles: Bundles | None = None,
        units: Mapping[str, tuple[Stage, ...]] | None = None,
    ) -> None:
        """Take what all units need."""
        assert spec is not None, "given by tune.with_parameters"
        assert bundles is not None, "given by tune.with_parameters"
        assert units is not None, "given by tune.with_parameters"
        self._worker, self._units, self._config = RayWorker(spec, bundles), units, config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next unit; a refusal would never reach the searcher."""
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Run the unit to its verdicts."""
        rebuilt, unit = self._config.get("rebuilt"), self._config["unit"]
        stages = (
            [Stage.from_json(one) for one in json.loads(rebuilt)] if rebuilt else self._units[unit]
        )
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
    """Run the units of a dispatcher as trials, until none is left."""
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
    """One tuner over what is left; returns the leases, with the units that it left without an
    answer.
    """
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
    # A window of 1 hangs where there is more than one resource class.
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
