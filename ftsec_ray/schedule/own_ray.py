"""A Ray that this process starts for itself: it listens on the loopback interface alone, and runs
nothing for whoever does not have the token of this run.

By default Ray would listen on the machine's own address, and before 2.60 without a token: anybody
who reaches one of its ports could run code as this user. What is used here of Ray's own modules is
in `PRIVATE`; a test looks whether the installed Ray has it.
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
    """A Ray on this machine while open; EnvironmentFault where it would listen elsewhere or ask for
    no token.

    Args:
        cores: that it has.
        how: more for `ray.init`.
    """
    with ExitStack() as stack:
        stack.callback(_read_environment)  # last of all, when the variables are as they were
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
    """Environment variables of this process and all that it starts while its Ray runs. A token that
    the user gives stays; a file in the home folder, which Ray would make for all to read, is not
    asked.
    """
    from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR

    found = {_MODE: "token", ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if not os.environ.get(_TOKEN) and not os.environ.get(_TOKEN_PATH):
        found[_TOKEN] = secrets.token_hex(32)
    return found


def _read_environment() -> None:
    """Have Ray look at the variables again: it reads them once per process. The mode goes first: a
    thread that still ends must not ask for a token that is no more.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Nodes that start meanwhile take the loopback address, as on systems where Ray knows no
    clusters; an address that is given it would replace.
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
        "the Ray of this run would be open to others",
        f"Ray {ray.__version__} at {address}, token {is_token_auth_enabled()}",
        "the loopback address, and a token",
        "install a Ray of the versions in pyproject.toml, or use --executor local",
    )


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """An environment variable of this process for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
