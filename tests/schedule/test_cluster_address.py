"""The address of a cluster, as an option and as RAY_ADDRESS: what cannot be one or does not answer
is told within seconds, with the name of the variable.
"""

from __future__ import annotations

import socket
import threading
import time

import pytest

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import cluster_address as module
from ftsec_ray.schedule.cluster_address import as_given, check_address, cluster_address

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)


@pytest.fixture
def server():
    """A function: a server that sends these bytes to whoever connects; its port."""
    listening = []

    def serve(answer: bytes | None) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listening.append(listener)

        def work() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                if answer is not None:
                    line.recv(64)
                    line.sendall(answer)
                    line.close()
                else:
                    listening.append(line)  # open and silent

        threading.Thread(target=work, daemon=True).start()
        return listener.getsockname()[1]

    yield serve
    for one in listening:
        one.close()


BAD = [
    ("127.0.0.1:1", "no Ray cluster answers"),
    ("ray://127.0.0.1:1", "no Ray cluster answers"),
    ("ray://127.0.0.1", "no Ray cluster answers"),
    ("[::1]:1", "no Ray cluster answers"),
    ("127.0.0.1:99999", "no Ray cluster answers"),
    ("no-such-host.invalid:6379", "no Ray cluster answers"),
    ("garbage", "not the address"),
    ("127.0.0.1", "not the address"),
    ("a b:6379", "not the address"),
    (":6379", "not the address"),
    ("ray://", "not the address"),
    ("host:port", "not the address"),
    ("http://127.0.0.1:8265", "address of a Ray dashboard"),
    ("https://x", "address of a Ray dashboard"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("address", "told"), BAD, ids=[address for address, _ in BAD])
def test_a_wrong_or_dead_address_is_told_alike_as_an_option_and_as_the_variable(
    address, told, monkeypatch
):
    with pytest.raises(EnvironmentFault, match=told) as option:
        check_address(address)
    assert "RAY_ADDRESS" not in str(option.value)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(EnvironmentFault, match=rf"RAY_ADDRESS: .*{told}") as variable:
        check_address(None)
    assert variable.value.got == f"RAY_ADDRESS={address}"
    assert "unset RAY_ADDRESS" in variable.value.fix


def test_what_ray_resolves_by_itself_and_no_address_are_left_to_it(monkeypatch):
    for address in (None, "", " ", "auto", "local", "provider://cluster"):
        check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    check_address(None)
    assert cluster_address(None) is None
    assert as_given(None) == "this machine"
    assert cluster_address("a:1") == as_given("a:1") == "a:1"


@pytest.mark.timeout(30)
def test_a_server_that_is_no_ray_is_told_and_one_that_speaks_its_protocol_is_taken(
    server, monkeypatch
):
    monkeypatch.setattr(module, "CONNECT_S", 0.5)
    check_address(f"127.0.0.1:{server(SETTINGS)}")
    check_address(f"ray://127.0.0.1:{server(SETTINGS)}")
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH"):
        with pytest.raises(EnvironmentFault, match="not a Ray cluster"):
            check_address(f"127.0.0.1:{server(answer)}")
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match="timed out"):
        check_address(f"127.0.0.1:{server(None)}")
    assert time.monotonic() - start < 5
    monkeypatch.setenv("RAY_USE_TLS", "1")
    check_address(f"127.0.0.1:{server(None)}")


@pytest.mark.ray
def test_the_head_of_a_real_cluster_answers():
    from tests.schedule.engine_runners import local_ray

    with local_ray(num_cpus=1):
        import ray

        address = ray.get_runtime_context().gcs_address
        check_address(address)
        check_address(f" {address} ")
