"""What the head's start command opens, on a real head."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.files import LAUNCHERS, launcher


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listening(port):
    """Addresses on which somebody of this machine listens at a port."""
    import psutil

    return {
        one.laddr.ip
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }


def test_both_clouds_start_the_head_alike():
    aws, gcp = (launcher(name)["head_start_ray_commands"] for name in LAUNCHERS)
    assert aws == gcp


@pytest.mark.ray
def test_the_dashboard_and_the_job_port_listen_on_loopback_only(tmp_path):
    """The very flags of the files, with free ports, without the cloud's configuration, and in the
    foreground.
    """
    command = launcher("aws")["head_start_ray_commands"][-1].partition(";")[2]
    port, dashboard = free_port(), free_port()
    changed = {"--port": port, "--object-manager-port": 0, "--dashboard-port": dashboard}
    flags = [flag for flag in shlex.split(command) if not flag.startswith("--autoscaling-config")]
    flags = [
        f"{name}={changed[name]}" if (name := flag.partition("=")[0]) in changed else flag
        for flag in flags
    ]
    assert "--dashboard-host=127.0.0.1" in flags
    log = tmp_path / "log"
    with log.open("w") as out:
        head = subprocess.Popen(
            [
                *flags,
                "--block",
                "--node-ip-address=127.0.0.1",
                "--disable-usage-stats",
                "--object-store-memory=100000000",
            ],
            stdout=out,
            stderr=out,
            start_new_session=True,
            # A token of this machine's user, if there is one, is not on a new node.
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "RAY_AUTH_MODE": "disabled",
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            },
        )
    try:
        from ray.job_submission import JobSubmissionClient

        end = time.monotonic() + 120
        while not listening(dashboard):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        assert listening(dashboard) == {"127.0.0.1"}
        assert JobSubmissionClient(f"http://127.0.0.1:{dashboard}").list_jobs() == []
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait(10)
