"""The environment with which Ray Tune starts its workers.

Tune copies the AWS keys of the driver into the runtime environment of every worker. Ray writes that
into the logs of each node and shows it to everybody who may ask the cluster for its actors. Workers
have the credentials of their node.

Variables that numeric libraries read when they are loaded take the same way, since a worker that
Ray has at hand may have loaded them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def worker_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have Tune start its workers with these variables and without cloud keys, for the time of a
    run.
    """
    from ray.tune.execution import class_cache

    names, defaults = class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
    class_cache.DEFAULT_ENV_VARS = {**defaults, **variables}
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS = names, defaults
