"""What every executor on Ray does around a run: it starts or joins Ray, keeps it quiet, and says
which environment variables its workers have.
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
"""Environment variables of the driver while Ray runs, where the user sets no others."""


def worker_environment() -> dict[str, str]:
    """Environment variables with which every worker process of a run on Ray starts, and with it
    the processes that it starts on Ray.
    """
    # Ray Train would give a worker group up after a minute and try anew without end; a node may
    # take longer to boot than that.
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
    """A Ray cluster: the one at hand, the one at an address, or one of this process.

    Args:
        address: of a running cluster; None starts one, or joins that of `RAY_ADDRESS`.
        workers: units at a time, for the cores of a Ray of this process.
        resources: of the sweep.
        least_cpus: cores that it has at least.
        switches: more environment variables of this process for the time of the run.
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
        except Exception as error:  # Ray has no class of its own for a start that takes too long
            raise EnvironmentFault(
                f"cannot reach or start Ray: {error}",
                as_given(None if address == cluster_address(None) else address),
                "a running cluster",
                f"--address HOST:6379 of a Ray head, no {VARIABLE} in the environment, or"
                " --executor local",
            ) from error
        yield


@contextmanager
def _quiet(switches: Mapping[str, str]) -> Iterator[None]:
    """Environment variables where the user sets no others, and Ray's loggers kept to errors."""
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
