"""The address of a Ray cluster, as an option or in `RAY_ADDRESS`, and whether one answers there.

Ray itself would try a dead address for a quarter of an hour.
"""

from __future__ import annotations

import os
import re
import socket

from ftsec_ray.errors import EnvironmentFault

VARIABLE = "RAY_ADDRESS"
"""Environment variable in which Ray looks for a cluster."""
CONNECT_S = 5.0
"""Seconds that a cluster has to answer."""
CLIENT_PORT = "10001"
"""Port of `ray://HOST` where it names none."""
_HERE = "local"
"""What asks Ray to start on this machine."""
_ANY = "auto"
"""What asks Ray for the cluster that runs on this machine; where none does, it says so at once."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With this a client of gRPC begins; the server's first frame is of type 4 (SETTINGS) too."""
_SETTINGS = 4
_FIX = "start it with `ray start --head`, check the address, or use --executor local"


def cluster_address(address: str | None) -> str | None:
    """The address given, else that of `RAY_ADDRESS`; None where neither names a cluster."""
    found = (address or os.environ.get(VARIABLE) or "").strip()
    return None if found in ("", _HERE) else found


def as_given(address: str | None) -> str:
    """The address for a message, with the variable where it comes from there."""
    found = cluster_address(address)
    if found is None:
        return "this machine"
    return found if address and address.strip() else f"{VARIABLE}={found}"


def check_address(address: str | None) -> None:
    """EnvironmentFault when the address, or that of `RAY_ADDRESS`, is none or no Ray answers there
    within seconds.
    """
    found = cluster_address(address)
    if found is None or found == _ANY:
        return
    scheme, mark, rest = found.rpartition("://")
    if scheme in ("http", "https"):
        raise _fault(address, "that is the address of a Ray dashboard", "the dashboard takes jobs")
    if mark and scheme != "ray":
        return  # a provider's own, which a package of it resolves
    host, _, port = rest.partition("/")[0].rpartition(":")
    if mark and not host:
        host, port = port, CLIENT_PORT
    if not re.fullmatch(r"\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+", host) or not port.isdecimal():
        raise _fault(address, "that is not the address of a Ray cluster", "")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S) as line:
            if not _speaks_grpc(line):
                raise _fault(address, "what answers is no Ray cluster", "")
    except (OSError, OverflowError, UnicodeError) as error:
        raise _fault(address, f"no Ray cluster answers: {error}", "") from error


def _speaks_grpc(line: socket.socket) -> bool:
    """Whether a server answers as those of Ray do; one that wants TLS is taken at its word."""
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
        (f"{why}: `ftsec submit`; " if why else "") + unset + _FIX,
    )
