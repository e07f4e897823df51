"""The address of a Ray cluster (an option, or `RAY_ADDRESS`), and a check that Ray answers there.

Ray itself would retry an unreachable address for 15 minutes.
"""

from __future__ import annotations

import os
import re
import socket

from ftsec_ray.errors import EnvironmentFault

VARIABLE = "RAY_ADDRESS"
"""Environment variable with the address of a cluster; Ray reads it too."""
CONNECT_S = 5.0
"""Seconds within which a cluster must answer."""
CLIENT_PORT = "10001"
"""Default port of `ray://HOST`."""
_HERE = "local"
"""Address that makes Ray start on this machine."""
_ANY = "auto"
"""Address of the cluster that runs on this machine; if there is none, Ray fails at once."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of a gRPC client; the server answers with a frame of type 4 (SETTINGS)."""
_SETTINGS = 4
_FIX = "start it with `ray start --head`, check the address, or use --executor local"


def cluster_address(address: str | None) -> str | None:
    """The given address, else that of `RAY_ADDRESS`; None if neither names a cluster."""
    chosen = (address or os.environ.get(VARIABLE) or "").strip()
    return None if chosen in ("", _HERE) else chosen


def as_given(address: str | None) -> str:
    """The address for a message, with the name of the environment variable if it comes from it."""
    chosen = cluster_address(address)
    if chosen is None:
        return "this machine"
    return chosen if address and address.strip() else f"{VARIABLE}={chosen}"


def check_address(address: str | None) -> None:
    """Raise EnvironmentFault if the address (given, or of `RAY_ADDRESS`) is not valid, or if no Ray
    cluster answers there within CONNECT_S.
    """
    chosen = cluster_address(address)
    if chosen is None or chosen == _ANY:
        return
    scheme, mark, rest = chosen.rpartition("://")
    if scheme in ("http", "https"):
        raise _fault(
            address, "this is the address of a Ray dashboard", "to send a job to the dashboard, use"
        )
    if mark and scheme != "ray":
        return  # a scheme of a provider, which the provider's package resolves
    host, _, port = rest.partition("/")[0].rpartition(":")
    if mark and not host:
        host, port = port, CLIENT_PORT
    if not re.fullmatch(r"\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+", host) or not port.isdecimal():
        raise _fault(address, "this is not the address of a Ray cluster", "")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S) as line:
            if not _speaks_grpc(line):
                raise _fault(address, "the server at this address is not a Ray cluster", "")
    except (OSError, OverflowError, UnicodeError) as error:
        raise _fault(address, f"no Ray cluster answers at this address: {error}", "") from error


def _speaks_grpc(line: socket.socket) -> bool:
    """Whether a server speaks gRPC, as Ray does; with RAY_USE_TLS it is not checked."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    line.settimeout(CONNECT_S)
    line.sendall(_HELLO)
    head = b""
    while len(head) < 4:
        piece = line.recv(4 - len(head))
        if not piece:
            return False
        head += piece
    return head[3] == _SETTINGS


def _fault(address: str | None, what: str, why: str) -> EnvironmentFault:
    is_variable = not (address and address.strip())
    unset = f"unset {VARIABLE}, or " if is_variable else ""
    return EnvironmentFault(
        f"{VARIABLE}: {what}" if is_variable else what,
        as_given(address),
        "HOST:PORT of a running Ray head (its port 6379), ray://HOST:PORT, or auto",
        (f"{why} `ftsec submit`; or " if why else "") + unset + _FIX,
    )
