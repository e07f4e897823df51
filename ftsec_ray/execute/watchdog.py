"""A stage that takes longer than it may, and the end of the process that it is stuck in.

A stage that hangs in native code hears no alarm and lets no thread of its process run. So a small
child process watches: it is told when a stage begins and ends. For one that is over its time it
writes the verdict `timeout` into the store, and then kills its parent. Whoever misses that process
finds the verdict, and knows that another attempt would meet the same end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

from ftsec_ray.store import Store

TIMEOUT = "timeout"
"""Error code of a stage that was over its time."""
_LONGEST_LINE = 2**16


class Watchdog:
    """The child that watches this process."""

    def __init__(self, store: str, timeout_s: float) -> None:
        self._command = [
            sys.executable,
            "-m",
            "ftsec_ray.execute.watchdog",
            store,
            str(timeout_s),
            str(os.getpid()),
        ]
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def over(self, digest: str, attempt: int) -> Iterator[None]:
        """Watch a stage until it ends."""
        self._tell({"digest": digest, "attempt": attempt, "began": time.monotonic()})
        try:
            yield
        finally:
            self._tell(None)

    def _tell(self, what: dict[str, Any] | None) -> None:
        if (
            self._child is None or self._child.poll() is not None
        ):  # the first stage, or somebody killed the watchdog
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
                env=child_environment(),
            )
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(what).encode() + b"\n")


def child_environment() -> dict[str, str]:
    """The environment of this process, in which a child finds the modules that this process
    finds.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@cache
def _watchdog(store: str, timeout_s: float) -> Watchdog:
    return Watchdog(store, timeout_s)


def watched(
    store: Store, digest: str, attempt: int, timeout_s: float | None
) -> AbstractContextManager[None]:
    """End this process when a stage takes longer than `timeout_s`; None lets it take its time."""
    if timeout_s is None:
        return nullcontext()
    store.drop_verdict(digest)  # one of an earlier run must not be taken for one of this attempt
    return _watchdog(store.uri, timeout_s).over(digest, attempt)


def watch(store: str, timeout_s: float, parent: int) -> None:
    """What the child does, until its parent closes the pipe or is killed."""
    stage: dict[str, Any] | None = None
    while os.getppid() == parent:
        wait_s = None if stage is None else max(0.0, stage["began"] + timeout_s - time.monotonic())
        if select.select([0], [], [], wait_s)[0]:
            told = os.read(0, _LONGEST_LINE)
            if not told:
                return
            stage = json.loads(told.splitlines()[-1])
        elif stage is not None:
            _end(Store.open(store), stage, timeout_s, parent)
            return


def _end(store: Store, stage: dict[str, Any], timeout_s: float, parent: int) -> None:
    """Write the verdict and kill the parent, whether or not the store takes it: the stage is stuck
    either way.
    """
    error = (
        f"[{TIMEOUT}] the stage took longer than it may and was ended\n  got:  more than"
        f" {timeout_s:g} s\n  want: at most resources.timeout_s: {timeout_s:g}\n  fix:  raise it,"
        " or leave it out; a tune goes on from its last checkpoint"
    )
    try:
        store.write_verdict(
            stage["digest"],
            {
                "digest": stage["digest"],
                "status": "failed",
                "error_code": TIMEOUT,
                "error": error,
                "damaged": None,
                "wall_s": time.monotonic() - stage["began"],
                "attempt": stage["attempt"],
                "host": socket.gethostname(),
            },
        )
    finally:
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
