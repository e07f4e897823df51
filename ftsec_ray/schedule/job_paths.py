"""Where a job on a cluster may keep its store and its results: a place that the driver and every
worker reach.

A path is such a place only where all nodes are this machine, or where its owner says that all of
them mount it. Anything else would look like success and leave artifacts scattered over disks that
go away with their nodes. What a job is told can be read by everybody who sees the cluster's
dashboard, so a place that carries a password is refused.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlparse

from ftsec_ray.errors import EnvironmentFault

_SECRET = re.compile(r"key|secret|token|passw|credential|sig", re.IGNORECASE)
_LOGIN = re.compile(r"//[^/@\s]*:[^/@\s]*@")
_WANT = "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"


def is_uri(place: str) -> bool:
    """Whether a place is a URI of an object store and not a path."""
    return len(urlparse(place).scheme) > 1 and not place.startswith("file:")


def is_this_machine(addresses: Sequence[str]) -> bool:
    """Whether all nodes of a cluster, by their IP addresses, are the machine of this process."""
    return bool(addresses) and all(map(_is_ours, addresses))


def _is_ours(address: str) -> bool:
    # Only an address of an interface of this machine can be bound.
    with socket.socket(
        socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def checked_place(place: str, what: str, *, here: bool, shared_disk: bool) -> str:
    """The place as a job is told it; EnvironmentFault when the nodes could not use it or it carries
    a password.

    Args:
        place: A path or a URI.
        what: The option that gave it, without dashes.
        here: Whether all nodes of the cluster are this machine.
        shared_disk: Whether all nodes mount this machine's paths at the same place.
    """
    if is_uri(place):
        return _without_secrets(place, what)
    path = Path(urlparse(place).path if place.startswith("file:") else place).expanduser()
    if here:
        return str(path.absolute())
    if shared_disk and path.is_absolute():
        return str(path)
    if shared_disk:
        raise EnvironmentFault(
            f"a relative path for --{what} of a job on another machine",
            place,
            f"an absolute path that all nodes mount, or {_WANT}",
            "a job has a working folder of its own, which Ray removes",
        )
    raise EnvironmentFault(
        f"a path of one machine for --{what}, and a cluster whose nodes are not this machine",
        place,
        _WANT,
        f"give --{what} a URI that all nodes reach; if they all mount this path at the same place,"
        " say so with --shared-disk",
    )


def below(place: str, name: str) -> str:
    """The place of a name inside a place."""
    parts = urlparse(place)
    return (
        parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()
        if is_uri(place)
        else str(Path(place) / name)
    )


def _without_secrets(place: str, what: str) -> str:
    options = parse_qsl(urlparse(place).query, keep_blank_values=True)
    if _LOGIN.search(unquote(place)) or any(_SECRET.search(name) for name, _ in options):
        raise EnvironmentFault(
            f"credentials inside --{what}, which everybody who sees the cluster's jobs could read",
            f"{urlparse(place).scheme}://...",
            f"{_WANT} alone",
            "give the nodes their credentials themselves: a role of the machine, a mounted secret,"
            " or their environment",
        )
    return place


def checked_files(left_out: Sequence[str], *, here: bool, shared_disk: bool) -> None:
    """EnvironmentFault when a sweep names files that stay behind and that the nodes do not have."""
    relative = [path for path in left_out if not Path(path).is_absolute()]
    if relative:
        raise EnvironmentFault(
            "a judge by relative path, which a job does not find in its own working folder",
            ", ".join(relative),
            "classifier:<id>@<revision>, or an absolute path that all nodes have",
        )
    if left_out and not here and not shared_disk:
        raise EnvironmentFault(
            "the sweep names files by absolute path, and the cluster's nodes are not this machine",
            ", ".join(left_out),
            "paths relative to the sweep file, which are sent along, or a Hugging Face id",
            "if all nodes mount these paths at the same place, say so with --shared-disk",
        )
