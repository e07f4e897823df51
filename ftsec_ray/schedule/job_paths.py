"""Checks where a job on a cluster may keep its store and its results: every node must reach it.

A path is allowed only if all nodes are this machine, or if the user confirms that all nodes mount
it. Otherwise the run would seem to succeed, but leave its artifacts on local disks that disappear
with their nodes. Everyone who can see the cluster's dashboard can read the command of a job, so a
location that contains a password is refused.
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
    """Whether a location is a URI of an object store; otherwise it is a path."""
    return len(urlparse(place).scheme) > 1 and not place.startswith("file:")


def is_this_machine(addresses: Sequence[str]) -> bool:
    """Whether all nodes of a cluster, given by IP address, are this machine."""
    return bool(addresses) and all(map(_is_ours, addresses))


def _is_ours(address: str) -> bool:
    # A socket can bind only addresses of this machine.
    with socket.socket(
        socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def checked_place(place: str, what: str, *, here: bool, shared_disk: bool) -> str:
    """The location to pass to a job; EnvironmentFault if the nodes cannot use it or it contains a
    password.

    Args:
        place: A path or a URI.
        what: Name of the option, without dashes.
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
            f"--{what} is a relative path, and the job runs on another machine",
            place,
            f"an absolute path that all nodes mount, or {_WANT}",
            "use an absolute path: Ray deletes the working directory of a job",
        )
    raise EnvironmentFault(
        f"--{what} is a path of this machine, and the nodes of the cluster are other machines",
        place,
        _WANT,
        f"set --{what} to a URI that all nodes can reach; if all nodes mount this path at the same"
        " place, add --shared-disk",
    )


def below(place: str, name: str) -> str:
    """The location of `name` inside a folder or URI prefix."""
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
            f"--{what} contains credentials, which everyone who can see the cluster's jobs could"
            " read",
            f"{urlparse(place).scheme}://...",
            f"{_WANT}, without credentials",
            "configure the credentials on the nodes: by the role of the machine, a mounted secret,"
            " or environment variables",
        )
    return place


def checked_files(left_out: Sequence[str], *, here: bool, shared_disk: bool) -> None:
    """Raise EnvironmentFault if the nodes lack files that the sweep names."""
    relative = [path for path in left_out if not Path(path).is_absolute()]
    if relative:
        raise EnvironmentFault(
            "a judge is given by a relative path, which does not exist in the job's working"
            " directory",
            ", ".join(relative),
            "classifier:<id>@<commit>, or an absolute path that exists on all nodes",
            "change the path of the judge in the sweep file",
        )
    if left_out and not here and not shared_disk:
        raise EnvironmentFault(
            "the sweep names files by absolute path, and the nodes of the cluster are other"
            " machines",
            ", ".join(left_out),
            "paths relative to the sweep file, which are uploaded, or a Hugging Face id",
            "if all nodes mount these paths at the same place, add --shared-disk",
        )
