"""The Ray session of a run: starts or joins Ray, suppresses its log messages, and sets the
environment variables of workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule.cluster_address import VARIABLE, as_given, cluster_address
from ftsec_ray.schedule.own_ray import own_ray, setting

_LOGGERS = ("ray", "ray.tune", "ray.data", "ray.train")
_SWITCHES = {
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables of the driver while Ray runs, unless the user sets them."""


def worker_environment() -> dict[str, str]:
    """Environment variables of every worker process on Ray and of its child processes."""
    # By default, Ray Train stops waiting for a worker group after a minute and retries forever; a
    # node may need longer to boot.
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    return {name: os.environ.get(name, "1800")}


@contextmanager
def ray_session(
    address: str | None,
    workers: int | None,
    resources: ResourceSpec,
    least_cpus: float = 0.0,
    *,
    switches: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Connect to Ray inside a `with` block: to the initialized one, to the cluster at an address,
    or to a local Ray that is started here.

    Args:
        address: Address of a running cluster; None starts a local Ray.
        workers: Units to run at once; decides the cores of a local Ray.
        resources: The `resources` of the sweep.
        least_cpus: Smallest number of cores of a local Ray.
        switches: Further environment variables of this process during the run.
    """
    with (
        _quiet({**_SWITCHES, **(switches or {})}),
        _connected(address, workers, resources, least_cpus),
    ):
        yield


@contextmanager
def _connected(
    address: str | None, workers: int | None, resources: ResourceSpec, least_cpus: float
) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as stack:
        try:
            if address:
                ray.init(address=address, **quiet)
                stack.callback(ray.shutdown)
            else:
                count = (workers or 0) * resources.cpus_per_stage or os.cpu_count() or 1
                cores = max(1, round(max(count, least_cpus) + 0.499))
                stack.enter_context(own_ray(cores, **quiet))
        except EnvironmentFault:
            raise
        except Exception as error:  # Ray has no error class for a start that takes too long
            raise EnvironmentFault(
                f"cannot connect to Ray or start it: {error}",
                as_given(None if address == cluster_address(None) else address),
                "a running cluster",
                f"give --address HOST:6379 of a Ray head, unset {VARIABLE}, or use"
                " --executor local",
            ) from error
        yield


@contextmanager
def _quiet(switches: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user does not set, and limit Ray's loggers to errors."""
    loggers = {name: logging.getLogger(name) for name in _LOGGERS}
    levels = {name: logger.level for name, logger in loggers.items()}
    with ExitStack() as put_back:
        for name, value in switches.items():
            put_back.enter_context(setting(name, os.environ.get(name, value)))
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, logger in loggers.items():
                logger.setLevel(levels[name])
