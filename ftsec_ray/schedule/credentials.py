"""Cloud keys stay in the environment of the process that has them.

Ray Tune copies the AWS keys of the driver into the runtime environment of every worker. Ray writes
that into the logs of each node and shows it to everybody who may ask the cluster for its actors.
Workers have the credentials of their node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_keys_for_workers() -> Iterator[None]:
    """Keep Tune from copying cloud keys to its workers, for the time of a run."""
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = names
