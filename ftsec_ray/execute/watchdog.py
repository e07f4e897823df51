"""Kills a process whose stage exceeds its time limit.

A stage that hangs in native code reacts to no signal and blocks all threads of its process. So a
small child process watches it: it is notified when a stage starts and ends. If a stage exceeds its
time limit, the child records the result `timeout` in the store and then kills its parent. The
driver reads the recorded timeout and does not retry.
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
"""Error code of a stage that exceeded its time limit."""
_LONGEST_LINE = 2**16


class Watchdog:
    """The child process that watches this process."""

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
        """Watch a stage inside a `with` block."""
        self._tell({"digest": digest, "attempt": attempt, "began": time.monotonic()})
        try:
            yield
        finally:
            self._tell(None)

    def _tell(self, what: dict[str, Any] | None) -> None:
        # Started for the first stage, or again if the watchdog was killed.
        if self._child is None or self._child.poll() is not None:
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
    """The environment for child processes, with the module search path of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@cache
def _watchdog(store: str, timeout_s: float) -> Watchdog:
    return Watchdog(store, timeout_s)


def watched(
    store: Store, digest: str, attempt: int, timeout_s: float | None
) -> AbstractContextManager[None]:
    """A `with` block that kills this process after `timeout_s` seconds; None: no limit."""
    if timeout_s is None:
        return nullcontext()
    store.drop_verdict(digest)  # a timeout of an earlier run must not count for this attempt
    return _watchdog(store.uri, timeout_s).over(digest, attempt)


def watch(store: str, timeout_s: float, parent: int) -> None:
    """Run the child process until its parent closes the pipe or ends."""
    stage: dict[str, Any] | None = None
    while os.getppid() == parent:
        wait_s = None if stage is None else max(0.0, stage["began"] + timeout_s - time.monotonic())
        if select.select([0], [], [], wait_s)[0]:
            message = os.read(0, _LONGEST_LINE)
            if not message:
                return
            stage = json.loads(message.splitlines()[-1])
        elif stage is not None:
            _end(Store.open(store), stage, timeout_s, parent)
            return


def _end(store: Store, stage: dict[str, Any], timeout_s: float, parent: int) -> None:
    """Record the timeout and kill the parent, even if the store cannot be written."""
    error = (
        f"[{TIMEOUT}] the stage exceeded its time limit and was stopped\n  got:  more than"
        f" {timeout_s:g} s\n  want: at most resources.timeout_s: {timeout_s:g}\n  fix:  raise the"
        " limit or remove it, and run again; a fine-tune continues from its last checkpoint"
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
