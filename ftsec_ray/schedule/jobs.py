"""A sweep as a job of a running Ray cluster: find its head, hand the job over, follow it to its
exit code.

A job is told where its store is and nothing that is secret: neither its command nor its runtime
environment holds a variable of this machine but the limits that are set here (`FTSEC_MAX_...`),
since both can be read by everybody who sees the cluster's dashboard. Credentials come from the
nodes' own environment.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ftsec_ray.config.limits import limits_set
from ftsec_ray.errors import EnvironmentFault

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
MIN_RAY = "2.58.1"
"""The oldest Ray of a cluster that runs a sweep; pyproject.toml asks for the same."""
ANSWER_S = 10.0
"""Seconds that a head has to answer."""
PATIENCE_S = 300.0
"""Seconds without an answer after which following a job is given up."""
POLL_S = 1.0
_WANT = "http://HOST:8265, the dashboard of a running Ray head"
_NOT_FOUND = (126, 127)
"""Exit codes of a shell that has no such command, or cannot run it."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head that takes jobs."""

    address: str
    ray_version: str
    nodes: tuple[str, ...]
    """IP addresses of the nodes that are alive."""
    headers: Mapping[str, str] = field(repr=False)
    """What it wants to see in a request: its token, where it asks for one."""

    @cached_property
    def client(self) -> JobSubmissionClient:
        """Ray's own client of this head."""
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address, headers=dict(self.headers))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that a head has taken."""

    id: str
    head: Head
    store: str
    """Where the job keeps its artifacts."""
    results: str
    """Tables and report go below this."""
    sent_bytes: int
    has_package: bool
    """Whether this machine's ftsec_ray went along."""

    def commands(self) -> dict[str, str]:
        """Commands that follow and stop it, for people."""
        needs_token = "RAY_AUTH_MODE=token " if self.head.headers else ""
        return {
            "follow": f"{needs_token}ray job logs -f {self.id} --address {self.head.address}",
            "stop": f"{needs_token}ray job stop {self.id} --address {self.head.address}",
        }

    def wait(self, on_text: Callable[[str], None]) -> int:
        """Hand over the job's log as it grows, and return the exit code of its command;
        EnvironmentFault when it has none.
        """
        from ray.exceptions import RayError

        client, told, heard = self.head.client, 0, time.monotonic()
        while True:
            try:
                details = client.get_job_info(
                    self.id
                )  # before the log, so that the log of a finished job is whole
                log = client.get_job_logs(self.id)
            except (OSError, RuntimeError, RayError) as error:
                self._check_hope(error, time.monotonic() - heard)
                time.sleep(POLL_S)
                continue
            heard = time.monotonic()
            if len(log) > told:
                on_text(log[told:])
                told = len(log)
            if details.status.is_terminal():
                return self._code(details)
            # The whole log comes every time: ask less often for a long one.
            time.sleep(POLL_S * (1.0 + len(log) / 2**20))

    def _check_hope(self, error: Exception, silent_s: float) -> None:
        if "status code 404" in str(error):
            raise EnvironmentFault(
                "the cluster knows this job no more",
                self.id,
                "a job of a running head",
                "was the head started anew? Submit again: what is in the store is not repeated",
            ) from error
        if silent_s > PATIENCE_S:
            raise EnvironmentFault(
                f"the head has not answered for {silent_s:.0f} s; the job may still run",
                self.head.address,
                _WANT,
                f"follow it later with: {self.commands()['follow']}",
            ) from error

    def _code(self, details: JobDetails) -> int:
        code = details.driver_exit_code
        if details.status == "STOPPED":
            raise EnvironmentFault(
                "the job was stopped before its end",
                self.id,
                "a job that runs to its end",
                "submit it again: what is in the store is not repeated",
            )
        if code in _NOT_FOUND:
            raise EnvironmentFault(
                "the cluster's head has no such command",
                details.entrypoint.split()[0],
                "an image with ftsec_ray, or with Python",
                "install ftsec_ray on all nodes, or send this machine's with --package",
            )
        if code is None and details.status != "SUCCEEDED":
            raise EnvironmentFault(
                f"the job could not be started or was lost: {_last_line(details.message)}",
                self.id,
                "a job that ends by itself",
                "look at the cluster's dashboard, then submit again: what is in the store is not"
                " repeated",
            )
        return 128 - code if code is not None and code < 0 else code or 0


def connect(address: str | None) -> Head:
    """The head at the address of its dashboard; EnvironmentFault says what answers there instead,
    or what it lacks.
    """
    address = _dashboard(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    for package in ("ray", "requests", "aiohttp"):
        if find_spec(package) is None:
            raise EnvironmentFault(
                "this machine lacks what talks to a cluster",
                package,
                "an installed ray[default]",
                'pip install "ray[default]"',
            )
    answer, headers = _version(address)
    try:
        found = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise _no_dashboard(address, f"it answers {answer.status_code} {answer.reason}") from None
    _check_version(found)
    return Head(address=address, ray_version=found, nodes=_nodes(address, headers), headers=headers)


def hand_over(
    head: Head, command: Sequence[str], archive: Path, *, submission_id: str, name: str
) -> None:
    """Hand a command and its working folder over to a head; EnvironmentFault when it refuses."""
    from ray.exceptions import RayError

    try:
        with _quiet():
            head.client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=submission_id,
                metadata={"job_name": name},
                runtime_env={"working_dir": str(archive), "env_vars": limits_set()},
            )
    except (OSError, RuntimeError, RayError) as error:
        if "already exists" in str(error):
            raise EnvironmentFault(
                "the cluster has a job of this id",
                submission_id,
                "an id that no job of this cluster has had",
                "choose another --submission-id, or leave it out",
            ) from error
        raise EnvironmentFault(
            f"the cluster did not take the job: {_last_line(str(error))}",
            head.address,
            _WANT,
            "look at the dashboard and at the head's log",
        ) from error


def _dashboard(given: str) -> str:
    """The address as a URL; EnvironmentFault for addresses of Ray's other servers."""
    url = given.strip().rstrip("/")
    url = url if "://" in url else f"http://{url}"
    parts = urlparse(url)
    try:
        is_good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # a port that is none
        is_good = False
    if not is_good or (parts.port is None and parts.hostname == "auto"):
        raise EnvironmentFault(
            "not the address of a Ray dashboard",
            given,
            _WANT,
            "`ray start --head` prints it; ray:// and HOST:6379 are doors of other servers",
        )
    return url


def _version(address: str) -> tuple[Any, Mapping[str, str]]:
    """The head's answer to who it is, and the headers that it wants to see."""
    answer = _get(address, {})
    if answer.status_code not in (401, 403):
        return answer, {}
    token = _token()
    if token is not None:
        headers = {"Authorization": f"Bearer {token}"}
        answer = _get(address, headers)
        if answer.status_code not in (401, 403):
            return answer, headers
    what = (
        "the cluster asks for a token, and there is none here"
        if token is None
        else "the cluster does not take this machine's token"
    )
    raise EnvironmentFault(
        what,
        address,
        "the cluster's token in ~/.ray/auth_token, or in the file that RAY_AUTH_TOKEN_PATH names",
        "copy it from the head: `ray get-auth-token` prints it there",
    )


def _get(address: str, headers: Mapping[str, str]) -> Any:
    import requests
    from urllib3.exceptions import ProtocolError

    try:
        return requests.get(f"{address}/api/version", headers=dict(headers), timeout=ANSWER_S)
    except requests.ReadTimeout as error:
        raise _no_dashboard(address, f"it is silent for {ANSWER_S:g} s") from error
    except requests.RequestException as error:
        if error.args and isinstance(error.args[0], ProtocolError):
            raise _no_dashboard(address, "it does not speak HTTP") from error
        raise EnvironmentFault(
            "no Ray head answers",
            address,
            _WANT,
            "start one with `ray start --head`, check host and port, or make the tunnel: "
            "`ray dashboard CLUSTER.yaml`, `kubectl port-forward service/HEAD 8265:8265`",
        ) from error


def _no_dashboard(address: str, what: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"something answers, but it is no Ray dashboard: {what}",
        address,
        _WANT,
        "jobs go to the dashboard's port, 8265 unless changed; 6379 is the port that nodes join,"
        " 10001 that of Ray Client",
    )


def _token() -> str | None:
    """Ray's token of this machine, from where Ray itself looks for it."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    given = os.environ.get("RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not given and path.is_file():
        given = path.read_text(encoding="utf-8")
    return (given or "").strip() or None


def _check_version(found: str) -> None:
    from packaging.version import Version

    if Version(found) < Version(MIN_RAY):
        from importlib.metadata import version

        raise EnvironmentFault(
            "the cluster's Ray is too old for a sweep",
            f"Ray {found} there, {version('ray')} here",
            f"Ray {MIN_RAY} or newer on all nodes",
            "start the cluster with a newer image",
        )


def _nodes(address: str, headers: Mapping[str, str]) -> tuple[str, ...]:
    """IP addresses of the nodes that are alive."""
    from ray.exceptions import RayError
    from ray.util.state import StateApiClient
    from ray.util.state.common import ListApiOptions, StateResource
    from ray.util.state.exception import RayStateApiException

    try:
        with _quiet():
            found = StateApiClient(address=address, headers=dict(headers)).list(
                StateResource.NODES,
                ListApiOptions(timeout=int(ANSWER_S)),
                raise_on_missing_output=False,
            )
    except (OSError, RuntimeError, RayError, RayStateApiException) as error:
        raise EnvironmentFault(
            f"the head does not tell its nodes: {_last_line(str(error))}",
            address,
            _WANT,
            "look at the head's log",
        ) from error
    return tuple(node.node_ip for node in found if node.state == "ALIVE")


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's own talk kept to warnings."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip(" .")]
    return lines[-1] if lines else "no reason given"
