"""A local Ray of this process: it listens only on the loopback interface and requires a token.

By default, Ray listens on the machine's network address, and before 2.60 without a token: anyone
who can reach one of its ports could run code as this user. `PRIVATE` lists the private names of Ray
that this module uses; a test checks that the installed Ray has them.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from ftsec_ray.errors import EnvironmentFault

PRIVATE: Mapping[str, tuple[str, ...]] = {
    "ray._raylet:Config": ("initialize",),
    "ray._raylet:AuthenticationTokenLoader": ("instance", "reset_cache"),
    "ray._private.ray_constants:": ("ENABLE_RAY_CLUSTER", "ENABLE_RAY_CLUSTERS_ENV_VAR"),
    "ray._private.authentication.authentication_utils:": ("is_token_auth_enabled",),
}
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def own_ray(cores: int, **how: Any) -> Iterator[None]:
    """Run a local Ray inside a `with` block; EnvironmentFault if it would listen on another
    interface or accept requests without a token.

    Args:
        cores: CPU cores of the local Ray.
        how: Further arguments of `ray.init`.
    """
    with ExitStack() as stack:
        stack.callback(_read_environment)  # runs last, when the variables are restored
        for name, value in _variables().items():
            stack.enter_context(setting(name, value))
        import ray

        _read_environment()
        stack.callback(ray.shutdown)
        with _loopback_only():
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **how)
        _check()
        yield


def _variables() -> dict[str, str]:
    """Environment variables of this process and its children while Ray runs. A token set by the
    user is kept. Otherwise a new one is made, because Ray would write its own into a file that all
    users can read.
    """
    from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR

    variables = {_MODE: "token", ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if not os.environ.get(_TOKEN) and not os.environ.get(_TOKEN_PATH):
        variables[_TOKEN] = secrets.token_hex(32)
    return variables


def _read_environment() -> None:
    """Make Ray read the environment variables again, which it does only once per process. The mode
    comes first, so that a thread that is still ending does not ask for a removed token.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Make nodes that start in this block use the loopback address. This sets a private constant,
    since Ray replaces a loopback address that is passed as an argument.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check() -> None:
    import ray
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    address = ray.util.get_node_ip_address()
    if ipaddress.ip_address(address).is_loopback and is_token_auth_enabled():
        return
    raise EnvironmentFault(
        "the local Ray would accept connections of other users",
        f"Ray {ray.__version__} at {address}, token required: {is_token_auth_enabled()}",
        "the loopback address, and a required token",
        "install a Ray version that pyproject.toml allows, or use --executor local",
    )


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process inside a `with` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
