"""Ray clusters of several nodes on this machine, whose processes are known one by one, so that a
test can kill the one that it means.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

FAST = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""A node that answers nothing for five seconds is lost; by default that takes half a minute."""


class Nodes:
    """A cluster whose head runs no unit, and its worker nodes."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": FAST},
        )
        self.address = self._cluster.address
        self.nodes: list[Any] = []

    def add(self, count: int = 1, **resources: Any) -> None:
        """More nodes, each with a cache folder of its own, as machines have."""
        for _ in range(count):
            cache = self._folder / f"cache{len(self.nodes)}"
            self.nodes.append(
                self._cluster.add_node(
                    **{"num_cpus": 1, **resources}, env_vars={"XDG_CACHE_HOME": str(cache)}
                )
            )

    def at_work(self, digest: str) -> tuple[Any, psutil.Process] | None:
        """The node and the worker that hold the work folder of a stage."""
        for node in self.nodes:
            for worker in psutil.Process(self.raylet(node)).children():
                try:
                    if any(file.path.endswith(f"/.{digest}.lock") for file in worker.open_files()):
                        return node, worker
                except psutil.Error:
                    continue
        return None

    @staticmethod
    def raylet(node: Any) -> int:
        """Process id of a node's raylet."""
        return int(node.all_processes["raylet"][0].process.pid)

    def kill(self, node: Any) -> None:
        """SIGKILL to the raylet and to the workers that it has: the node is lost without notice, as
        a machine is.
        """
        workers = psutil.Process(self.raylet(node)).children()
        os.kill(self.raylet(node), signal.SIGKILL)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self.nodes.remove(node)

    def behead(self, node: Any) -> None:
        """SIGKILL to the raylet alone: its workers live on until they notice."""
        os.kill(self.raylet(node), signal.SIGKILL)
        self.nodes.remove(node)

    def remove(self, node: Any) -> None:
        """End a node as it should be ended."""
        self._cluster.remove_node(node)
        self.nodes.remove(node)

    def stop(self) -> None:
        """End all processes of this cluster."""
        self._cluster.shutdown()


@contextmanager
def cluster(folder: Path) -> Iterator[Nodes]:
    """A head without room, while open."""
    found = Nodes(folder)
    try:
        yield found
    finally:
        found.stop()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@contextmanager
def autoscaling_cluster(
    folder: Path, node_types: dict[str, dict[str, Any]], *, idle_s: float
) -> Iterator[str]:
    """The address of a head without room and with an autoscaler, whose machines are processes of
    this one.

    `ray.cluster_utils.AutoscalingCluster` reads a file that no wheel holds, and stops every Ray of
    the machine.
    """
    import ray
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    gcs, agent, client, metrics = free_ports(4)
    address = f"{ray.util.get_node_ip_address()}:{gcs}"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {name: {"node_config": {}, "min_workers": 0, **one} for name, one in node_types.items()}
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    config = {
        "cluster_name": "test",
        "max_workers": 4,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": provider,
        "auth": {},
        "docker": {},
        "available_node_types": {"ray.head.default": head, **types},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{
            f"{kind}_commands": []
            for kind in (
                "initialization",
                "setup",
                "head_setup",
                "worker_setup",
                "head_start_ray",
                "worker_start_ray",
            )
        },
    }
    (folder / "autoscaler.json").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_AUTH_MODE": "disabled",
    }  # this process may have read the mode already
    with (folder / "head.log").open("w") as log:
        process = psutil.Popen(
            [
                Path(sys.executable).with_name("ray"),
                "start",
                "--head",
                "--block",
                f"--port={gcs}",
                f"--autoscaling-config={folder}/autoscaler.json",
                f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}",
                f"--metrics-export-port={metrics}",
                "--include-dashboard=false",
                "--num-cpus=0",
                "--disable-usage-stats",
                f"--temp-dir={folder}",
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        family = [
            *process.children(recursive=True),
            process,
        ]  # the autoscaler's machines are children of its own
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=20)
