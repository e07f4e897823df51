"""Submits a sweep as a job to a running Ray cluster, and follows it until it ends.

Everyone who can see the cluster's dashboard can read the command and the runtime environment of a
job. So they contain no secrets: of this machine's environment variables, only the limits
(`FTSEC_MAX_...`) are passed. Credentials must be configured on the nodes.
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
"""The oldest supported Ray version of a cluster; the same as in pyproject.toml."""
ANSWER_S = 10.0
"""Seconds within which the head must answer."""
PATIENCE_S = 300.0
"""Seconds without an answer after which `wait` stops following a job."""
START_S = 60.0
"""Seconds for which a head may still be starting: its dashboard answers before its node is listed
and before its agent accepts jobs."""
POLL_S = 1.0
_WANT = "http://HOST:8265, the dashboard of a running Ray head"
_NOT_FOUND = (126, 127)
"""Exit codes of a shell for a command that does not exist or cannot run."""
_NO_AGENT = "No available agent"
"""What a head says whose agents have not registered yet."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head that accepts jobs."""

    address: str
    ray_version: str
    nodes: tuple[str, ...]
    """IP addresses of the nodes that are alive."""
    headers: Mapping[str, str] = field(repr=False)
    """HTTP headers of requests: the token, if the head requires one."""

    @cached_property
    def client(self) -> JobSubmissionClient:
        """Ray's own client of this head."""
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address, headers=dict(self.headers))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that a head has accepted."""

    id: str
    head: Head
    store: str
    """Location of the job's artifacts."""
    results: str
    """Folder or URI prefix of the tables and the report."""
    sent_bytes: int
    has_package: bool
    """Whether this machine's ftsec_ray was uploaded with it."""

    def commands(self) -> dict[str, str]:
        """Shell commands to follow and to stop the job."""
        needs_token = "RAY_AUTH_MODE=token " if self.head.headers else ""
        return {
            "follow": f"{needs_token}ray job logs -f {self.id} --address {self.head.address}",
            "stop": f"{needs_token}ray job stop {self.id} --address {self.head.address}",
        }

    def wait(self, on_text: Callable[[str], None]) -> int:
        """Wait until the job ends, and return the exit code of its command; EnvironmentFault if it
        has none.

        Args:
            on_text: Called with each new part of the job's log.
        """
        from ray.exceptions import RayError

        client, shown, answered = self.head.client, 0, time.monotonic()
        while True:
            try:
                # Status before log, so that the log of a finished job is complete.
                details = client.get_job_info(self.id)
                log = client.get_job_logs(self.id)
            except (OSError, RuntimeError, RayError) as error:
                self._check_reachable(error, time.monotonic() - answered)
                time.sleep(POLL_S)
                continue
            answered = time.monotonic()
            if len(log) > shown:
                on_text(log[shown:])
                shown = len(log)
            if details.status.is_terminal():
                return self._code(details)
            # Each request returns the whole log, so poll less often if it is long.
            time.sleep(POLL_S * (1.0 + len(log) / 2**20))

    def _check_reachable(self, error: Exception, silent_s: float) -> None:
        if "status code 404" in str(error):
            raise EnvironmentFault(
                "the cluster no longer has this job",
                self.id,
                "a job of a running head",
                "if the head was restarted, submit the sweep again: finished stages are kept in the"
                " store",
            ) from error
        if silent_s > PATIENCE_S:
            raise EnvironmentFault(
                f"the head has not answered for {silent_s:.0f} s; the job may still be running",
                self.head.address,
                _WANT,
                f"follow it later with: {self.commands()['follow']}",
            ) from error

    def _code(self, details: JobDetails) -> int:
        code = details.driver_exit_code
        if details.status == "STOPPED":
            raise EnvironmentFault(
                "the job was stopped before it finished",
                self.id,
                "a finished job",
                "submit the sweep again: finished stages are kept in the store",
            )
        if code in _NOT_FOUND:
            raise EnvironmentFault(
                "the cluster's head does not have this command",
                details.entrypoint.split()[0],
                "an image with ftsec_ray, or with Python",
                "install ftsec_ray on all nodes, or upload this machine's with --package",
            )
        if code is None and details.status != "SUCCEEDED":
            raise EnvironmentFault(
                f"the job did not start or was lost: {_last_line(details.message)}",
                self.id,
                "a finished job",
                "check the cluster's dashboard, then submit the sweep again: finished stages are"
                " kept in the store",
            )
        return 128 - code if code is not None and code < 0 else code or 0


def connect(address: str | None) -> Head:
    """The Ray head with this dashboard address; EnvironmentFault if there is none, if it refuses
    access, or if its Ray is too old.

    Args:
        address: URL of the dashboard; None: `RAY_API_SERVER_ADDRESS`, else port 8265 of this
            machine.
    """
    address = _dashboard(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    for package in ("ray", "requests", "aiohttp"):
        if find_spec(package) is None:
            raise EnvironmentFault(
                "a package that is needed to submit jobs is not installed",
                package,
                "an installed ray[default]",
                'pip install "ray[default]"',
            )
    answer, headers = _version(address)
    try:
        ray_version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise _no_dashboard(address, f"it answers {answer.status_code} {answer.reason}") from None
    _check_version(ray_version)
    nodes = _nodes(address, headers)
    return Head(address=address, ray_version=ray_version, nodes=nodes, headers=headers)


def hand_over(
    head: Head, command: Sequence[str], archive: Path, *, submission_id: str, name: str
) -> None:
    """Submit a job to a head; EnvironmentFault if the head rejects it.

    Args:
        head: The head.
        command: The command and its arguments.
        archive: Zip file of its working directory.
        submission_id: Id of the job, unique in the cluster.
        name: Name of the job in the dashboard.
    """
    from ray.exceptions import RayError

    started = time.monotonic()
    while True:
        try:
            with _quiet():
                head.client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=submission_id,
                    metadata={"job_name": name},
                    runtime_env={"working_dir": str(archive), "env_vars": limits_set()},
                )
        except (OSError, RuntimeError, RayError) as error:
            if _NO_AGENT not in str(error) or time.monotonic() - started > START_S:
                raise _rejected(error, head, submission_id) from error
            time.sleep(POLL_S)
        else:
            return


def _rejected(error: Exception, head: Head, submission_id: str) -> EnvironmentFault:
    """Why a head did not accept a job."""
    if "already exists" in str(error):
        return EnvironmentFault(
            "the cluster already has a job with this id",
            submission_id,
            "an id that no job of this cluster has used",
            "choose another --submission-id, or leave it out",
        )
    return EnvironmentFault(
        f"the cluster rejected the job: {_last_line(str(error))}",
        head.address,
        _WANT,
        "check the dashboard and the head's log",
    )


def _dashboard(given: str) -> str:
    """The address as a URL; EnvironmentFault if it is not that of a dashboard."""
    url = given.strip().rstrip("/")
    url = url if "://" in url else f"http://{url}"
    parts = urlparse(url)
    try:
        is_good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # an invalid port
        is_good = False
    if not is_good or (parts.port is None and parts.hostname == "auto"):
        raise EnvironmentFault(
            "not the address of a Ray dashboard",
            given,
            _WANT,
            "use the address that `ray start --head` prints; ray:// and HOST:6379 are other servers"
            " of Ray",
        )
    return url


def _version(address: str) -> tuple[Any, Mapping[str, str]]:
    """The head's answer to a request for its version, and the HTTP headers that it requires."""
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
        "the cluster requires a token, and this machine has none"
        if token is None
        else "the cluster rejects this machine's token"
    )
    raise EnvironmentFault(
        what,
        address,
        "the cluster's token in ~/.ray/auth_token, or in the file that RAY_AUTH_TOKEN_PATH names",
        "copy it from the head, where `ray get-auth-token` prints it",
    )


def _get(address: str, headers: Mapping[str, str]) -> Any:
    import requests
    from urllib3.exceptions import ProtocolError

    try:
        return requests.get(f"{address}/api/version", headers=dict(headers), timeout=ANSWER_S)
    except requests.ReadTimeout as error:
        raise _no_dashboard(address, f"no response within {ANSWER_S:g} s") from error
    except requests.RequestException as error:
        if error.args and isinstance(error.args[0], ProtocolError):
            raise _no_dashboard(address, "it does not speak HTTP") from error
        raise EnvironmentFault(
            "no Ray head answers",
            address,
            _WANT,
            "start one with `ray start --head`, check host and port, or open a tunnel: "
            "`ray dashboard CLUSTER.yaml` or `kubectl port-forward service/HEAD 8265:8265`",
        ) from error


def _no_dashboard(address: str, what: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"the server at this address is not a Ray dashboard: {what}",
        address,
        _WANT,
        "use the port of the dashboard, by default 8265; 6379 is the port for nodes, 10001 that of"
        " Ray Client",
    )


def _token() -> str | None:
    """The token of this machine, read from where Ray reads it; None if there is none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    given = os.environ.get("RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not given and path.is_file():
        given = path.read_text(encoding="utf-8")
    return (given or "").strip() or None


def _check_version(ray_version: str) -> None:
    from packaging.version import Version

    if Version(ray_version) < Version(MIN_RAY):
        from importlib.metadata import version

        raise EnvironmentFault(
            "the cluster's Ray is too old",
            f"Ray {ray_version} on the cluster, {version('ray')} on this machine",
            f"Ray {MIN_RAY} or newer on all nodes",
            "start the cluster with a newer image",
        )


def _nodes(address: str, headers: Mapping[str, str]) -> tuple[str, ...]:
    """IP addresses of the live nodes; waits for the first one of a head that is still starting."""
    started = time.monotonic()
    while not (listed := _listed(address, headers)) and time.monotonic() - started < START_S:
        time.sleep(POLL_S)
    return listed


def _listed(address: str, headers: Mapping[str, str]) -> tuple[str, ...]:
    """IP addresses of the nodes that the head lists as alive."""
    from ray.exceptions import RayError
    from ray.util.state import StateApiClient
    from ray.util.state.common import ListApiOptions, StateResource
    from ray.util.state.exception import RayStateApiException

    try:
        with _quiet():
            nodes = StateApiClient(address=address, headers=dict(headers)).list(
                StateResource.NODES,
                ListApiOptions(timeout=int(ANSWER_S)),
                raise_on_missing_output=False,
            )
    except (OSError, RuntimeError, RayError, RayStateApiException) as error:
        raise EnvironmentFault(
            f"cannot get the list of nodes from the head: {_last_line(str(error))}",
            address,
            _WANT,
            "check the head's log",
        ) from error
    return tuple(node.node_ip for node in nodes if node.state == "ALIVE")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Ray's log messages below warnings."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip(" .")]
    return lines[-1] if lines else "Ray gives no reason"
