"""The Ray that a local run starts: what its processes listen on, and whom it lets in."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys

import pytest

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import own_ray as module
from ftsec_ray.schedule.own_ray import PRIVATE, own_ray
from ftsec_ray.schedule.tune_internals import has_private

MARK = "FTSEC_TEST_OF_OWN_RAY"
RUN = f"""
import json, os, sys
import psutil
from ftsec_ray.config.sweep import ResourceSpec
from ftsec_ray.schedule.ray_session import ray_session

def is_ours(process):
    try:
        return process.environ().get({MARK!r}) == os.environ[{MARK!r}]
    except psutil.Error:
        return False

def ours():  # a process that names itself anew has no environment to be known by
    me = psutil.Process()
    marked = (one for one in psutil.process_iter() if is_ours(one))
    return {{one.pid: one for one in (me, *me.children(recursive=True), *marked)}}.values()

def listening(process):
    try:
        return [
            (process.name(), one.laddr.ip)
            for one in process.net_connections("inet")
            if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
        ]
    except psutil.Error:
        return []

with ray_session(None, 1, ResourceSpec()):
    import ray

    here = ray.remote(lambda: os.environ["RAY_AUTH_MODE"])
    found = {{
        "worker": ray.get(here.remote()),
        "sockets": [one for process in ours() for one in listening(process)],
        "address": ray.get_runtime_context().gcs_address,
        "token": os.environ["RAY_AUTH_TOKEN"],
    }}
    print(json.dumps(found), flush=True)
    sys.stdin.readline()
left = {{name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}}
print(json.dumps(left), flush=True)
"""
ATTACH = """
import os, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
run = ray.remote(num_cpus=0)(lambda: os.getpid())
print("in", ray.get(run.remote(), timeout=40))
os._exit(0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose user asked Ray for no token, as the oldest Ray allowed does by itself."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if "RAY" not in name} | {
        "HOME": str(home),
        "RAY_AUTH_MODE": "disabled",
        MARK: str(home),
    }
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        found = json.loads(process.stdout.readline())
        yield {**found, "home": home, "environment": environment}
        process.stdin.write("\n")
        process.stdin.flush()
        left = json.loads(process.stdout.readline())
        assert left == {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}
        assert process.wait(timeout=120) == 0


def attach(run, **variables):
    done = subprocess.run(
        [sys.executable, "-c", ATTACH, run["address"]],
        # A client on this machine would replace the loopback address by another one of it.
        env={**run["environment"], "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def is_loopback(address):
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_the_check_tells_loopback_from_everything_else():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "::ffff:127.0.0.1", "127.3.2.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.2", "::ffff:192.0.2.2")))


@pytest.mark.ray
def test_all_processes_of_a_local_run_listen_on_loopback_alone(run):
    names = {name for name, _ in run["sockets"]}
    assert {"gcs_server", "raylet"} <= names, "the test sees the processes that it is about"
    assert len(run["sockets"]) > 6
    assert [one for one in run["sockets"] if not is_loopback(one[1])] == []
    assert is_loopback(run["address"].rpartition(":")[0])


@pytest.mark.ray
def test_a_local_run_asks_for_a_token_of_its_own_whatever_the_variables_say(run):
    assert run["worker"] == "token"
    assert len(run["token"]) == 64
    assert not (run["home"] / ".ray" / "auth_token").exists(), "nothing for others to read"
    code, out, _ = attach(run, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=run["token"])
    assert (code, out[:2]) == (0, "in"), "whoever has the token gets in: the others fail for it"
    for strange in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        code, out, err = attach(run, **strange)
        assert code != 0
        assert "in" not in out.split()
        assert "ConnectionError" in err or "Authentication" in err


@pytest.mark.parametrize("place", PRIVATE)
def test_the_installed_ray_has_what_is_used_of_its_own_modules(place):
    assert [name for name in PRIVATE[place] if not has_private(place, name)] == []


def test_a_ray_that_would_listen_elsewhere_is_not_used(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.7")
    with (
        pytest.raises(
            EnvironmentFault, match=r"accept connections of other users(.|\n)*192\.0\.2\.7"
        ),
        own_ray(1),
    ):
        pytest.fail("it was used")
    assert module._variables().keys() >= {"RAY_AUTH_MODE"}
