"""Private names of Ray Tune that this package uses: attributes of Tune's controller, and two
variables of a module. The only other module with private names of Ray is `own_ray`.

If the installed Ray lacks one of them, the executor `tune` reports this before it starts anything;
the other executors do not need them.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ftsec_ray.errors import EnvironmentFault

_CONTROLLER = "ray.tune.execution.tune_controller"
PRIVATE: Mapping[str, tuple[str, ...]] = {
    f"{_CONTROLLER}:TrialRunnerWrapper": ("_tune_controller",),
    f"{_CONTROLLER}:TuneController": (
        "_actor_manager",
        "_trial_to_actor",
        "_trials",
        "_actor_cache",
        "_cleanup_cached_actors",
        "_pending_trials_list",
        "_stopped_trials",
        "_failed_trials",
        "_live_trials",
        "_trials_to_cache",
        "_trial_metadata",
    ),
    "ray.air.execution._internal.actor_manager:RayActorManager": (
        "_live_actors_to_ray_actors_resources",
        "_actor_task_failed",
    ),
    "ray.tune.utils.object_cache:_ObjectCache": ("num_cached_objects", "has_cached_object"),
    "ray.tune.execution.class_cache:": ("ENV_VARS_TO_PROPAGATE", "DEFAULT_ENV_VARS"),
}
"""Import path of a class (or of a module, with nothing after the colon) -> private names in use."""


def check_tune() -> None:
    """Raise EnvironmentFault if the installed Ray lacks one of the private names."""
    missing = [
        name for path, names in PRIVATE.items() for name in names if not has_private(path, name)
    ]
    if missing:
        raise _lacks(", ".join(missing))


def has_private(path: str, name: str) -> bool:
    """Whether a class or module of Ray has a name: an attribute, or one that its methods set."""
    module_name, _, class_name = path.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
        if not class_name:
            return hasattr(owner, name)
        owner = getattr(owner, class_name)
    except (ImportError, AttributeError):
        return False
    return hasattr(owner, name) or bool(
        re.search(rf"\bself\.{name}\b\s*(:[^=\n]|=[^=])", inspect.getsource(owner))
    )


def _lacks(names: str, owner: str = "Tune") -> EnvironmentFault:
    import ray

    return EnvironmentFault(
        f"the executor `tune` does not support Ray {ray.__version__}: {owner} lacks {names}",
        ray.__version__,
        "a Ray version that the executor `tune` supports",
        "run with --executor actors, or install an older Ray",
    )


def _of(owner: Any, name: str) -> Any:
    """A private attribute; EnvironmentFault if it does not exist."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _lacks(name, type(owner).__name__) from error


@contextmanager
def memory_kills_are_deaths() -> Iterator[None]:
    """Treat a worker that Ray kills for its memory during a unit as a dead worker. Without this,
    Tune would end the whole run.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError

    owner = importlib.import_module("ray.air.execution._internal.actor_manager").RayActorManager
    failed = owner._actor_task_failed  # noqa: SLF001

    def as_actor_error(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        failed(self, tracked_actor_task=tracked_actor_task, exception=exception)

    owner._actor_task_failed = as_actor_error  # noqa: SLF001
    try:
        yield
    finally:
        owner._actor_task_failed = failed  # noqa: SLF001


# Tune's controller and its trials.


def controller_of(wrapper: Any) -> Any:
    """Tune's controller, from the wrapper that a scheduler gets; the wrapper itself would warn."""
    return _of(wrapper, "_tune_controller")


def trials_without_start(controller: Any) -> list[Any]:
    """Waiting trials whose own worker is not about to start, oldest first."""
    starting = _of(_of(controller, "_actor_manager"), "_live_actors_to_ray_actors_resources")
    actors = _of(controller, "_trial_to_actor")
    return [
        trial
        for trial in _of(controller, "_trials")
        if trial.status == "PENDING" and actors.get(trial) not in starting
    ]


def has_idle_worker(controller: Any, trial: Any) -> bool:
    """Whether a worker of a trial's resource class is idle."""
    idle = _of(controller, "_actor_cache")
    return bool(
        _of(idle, "num_cached_objects")
        and _of(idle, "has_cached_object")(trial.placement_group_factory)
    )


def release_idle_workers(controller: Any) -> None:
    """Stop all idle workers."""
    _of(controller, "_cleanup_cached_actors")(force_all=True)


def count_trials(controller: Any) -> int:
    """Number of trials that Tune keeps, ended ones included."""
    return len(_of(controller, "_trials"))


def forget_trials(controller: Any, is_settled: Callable[[Any], bool]) -> None:
    """Drop trials that have ended, that are settled, and that hold no worker."""
    trials, actors = _of(controller, "_trials"), _of(controller, "_trial_to_actor")
    ended = {
        trial
        for trial in trials
        if trial.is_finished() and is_settled(trial) and trial not in actors
    }
    for kept in (trials, _of(controller, "_pending_trials_list")):
        kept[:] = [trial for trial in kept if trial not in ended]
    for name in ("_stopped_trials", "_failed_trials", "_live_trials", "_trials_to_cache"):
        _of(controller, name).difference_update(ended)
    metadata = _of(controller, "_trial_metadata")
    for trial in ended:
        metadata.pop(trial.trial_id, None)


# The environment of workers.


@contextmanager
def workers_with(environment: Mapping[str, str]) -> Iterator[None]:
    """Make Tune start its workers with these environment variables, and without the driver's cloud
    keys, inside a `with` block.

    By default, Tune copies the AWS keys of the driver into the runtime environment of every worker.
    Ray writes this environment into the logs of each node, and shows it to everyone who can list
    the cluster's actors. Workers use the credentials of their node instead. Variables that numeric
    libraries read on import must be set here too, because a reused Ray worker may have imported
    them already.
    """
    from ray.tune.execution import class_cache

    names, defaults = class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
    class_cache.DEFAULT_ENV_VARS = {**defaults, **environment}
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS = names, defaults
