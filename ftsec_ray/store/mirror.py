"""Step checkpoints beyond this machine: sent to a remote store while a stage runs, and taken from
there by whoever goes on.

A thread looks for finished checkpoints (`step-*`, which appear by a rename) and sends the newest of
each folder, its record last; older ones are deleted there. So a worker that is lost with its
machine costs the steps since the last checkpoint, and training never waits for the upload.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ftsec_ray.errors import StoreError
from ftsec_ray.store.object_io import ObjectIO
from ftsec_ray.store.record import (
    RECORD,
    RECORD_LIMIT,
    dumped,
    fault_of,
    files_of,
    listing_fault,
    member_fault,
)
from ftsec_ray.store.work_folders import STEPS

POLL_S = 5.0
"""Between two looks for a new checkpoint."""
RESTART_S = 60.0
"""After a checkpoint could not be sent."""
_LOOKS = 5
"""Times that the store is asked for checkpoints, where those that it names are gone when they are
read.
"""


class WorkMirror:
    """The checkpoints of one stage, here and in the store."""

    def __init__(self, folder: Path, calls: ObjectIO, root: str) -> None:
        self._folder = folder
        self._calls = calls
        self._root = root
        self._sent: dict[str, str] = {}
        """Folder of checkpoints -> name of the one that the store has."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ftsec-checkpoints", daemon=True)

    def start(self) -> None:
        """Take what the store has and this machine lacks, then watch."""
        self._restore()
        self._thread.start()

    @property
    def is_on(self) -> bool:
        """Whether it watches."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the watching; a checkpoint that is on its way arrives."""
        self._stop.set()
        self._thread.join()

    def drop(self) -> None:
        """Delete the checkpoints from the store."""
        if self._sent:
            self._calls.drop_folder(self._root)

    def _restore(self) -> None:
        """Have the newest checkpoint of every folder here; a worker that has lost its node may
        replace one meanwhile.
        """
        for _ in range(_LOOKS):
            if all([self._has(step) or self._take(step) for step in self._newest()]):
                return

    def _newest(self) -> list[str]:
        """The checkpoints that the store has, of several of one folder the last."""
        names = [
            info.path.removeprefix(f"{self._root}/")
            for info in self._calls.files(self._root, recursive=True)
            if info.size
        ]
        found = sorted(
            name.removesuffix(f"/{RECORD}")
            for name in names
            if name.endswith(f"/{RECORD}") and member_fault(name) is None
        )
        self._sent = {Path(step).parent.as_posix(): step for step in found}
        return [step for step in self._sent.values() if Path(step).match(STEPS)]

    def _has(self, step: str) -> bool:
        held = [path.name for path in (self._folder / step).parent.glob(STEPS)]
        return max(held, default="") >= Path(step).name

    def _take(self, step: str) -> bool:
        """Have one checkpoint here, if it is whole; False when it was not there to read."""
        aside = self._folder / step
        aside = aside.with_name(f".{aside.name}.restored")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            record = json.loads(self._calls.read(f"{self._root}/{step}/{RECORD}", RECORD_LIMIT))
            if not isinstance(record, Mapping) or listing_fault(record) is not None:
                return True
            for name in record["files"]:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                self._calls.receive(f"{self._root}/{step}/{name}", aside / name)
            if fault_of(aside, record) is None:
                aside.rename(self._folder / step)
        except FileNotFoundError:
            return False
        except (ValueError, RecursionError):
            return (
                True  # a damaged checkpoint is none: the stage starts from an earlier one, or anew
            )
        else:
            return True
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _watch(self) -> None:
        wait_s = POLL_S
        while not self._stop.wait(wait_s):
            wait_s = POLL_S
            try:
                self.send_new()
            except (
                StoreError,
                OSError,
            ):  # training goes on without; the stage itself will say when the store stays away
                wait_s = RESTART_S

    def send_new(self) -> None:
        """Send the newest checkpoint of every folder that has one which the store lacks."""
        newest: dict[str, str] = {}
        for path in sorted(self._folder.rglob(STEPS)):
            inner = path.relative_to(self._folder)
            if path.is_dir() and not any(part.startswith(".") for part in inner.parts):
                newest[inner.parent.as_posix()] = inner.as_posix()
        for parent, step in newest.items():
            if self._sent.get(parent) != step:
                with suppress(FileNotFoundError):  # a newer one has taken its place in the meantime
                    self._send(parent, step)

    def _send(self, parent: str, step: str) -> None:
        files = files_of(self._folder / step)
        for name in files:
            self._calls.send(self._folder / step / name, f"{self._root}/{step}/{name}")
        self._calls.write(
            f"{self._root}/{step}/{RECORD}", dumped({"files": files, "sent": time.time()})
        )
        before, self._sent[parent] = self._sent.get(parent), step
        if before is not None:
            self._calls.drop_folder(f"{self._root}/{before}")
