"""Copies checkpoints to a remote store while a stage runs, so that another machine can continue the
stage.

A thread searches for finished checkpoints (`step-*`, which appear by a rename), uploads the newest
one of each folder, its record last, and deletes older ones from the store. If a machine is lost,
only the steps since its last checkpoint are lost. Training never waits for the upload.
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
"""Seconds between two searches for a new checkpoint."""
RESTART_S = 60.0
"""Seconds until the next attempt after a failed upload."""
_LOOKS = 5
"""Listings of the store, at most, if listed checkpoints disappear before they are read."""


class WorkMirror:
    """The checkpoints of one stage, on this machine and in the store."""

    def __init__(self, folder: Path, calls: ObjectIO, root: str) -> None:
        self._folder = folder
        self._calls = calls
        self._root = root
        self._sent: dict[str, str] = {}
        """Folder of checkpoints -> path of the checkpoint that the store has."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ftsec-checkpoints", daemon=True)

    def start(self) -> None:
        """Download checkpoints that this machine lacks, then start to watch for new ones."""
        self._restore()
        self._thread.start()

    @property
    def is_on(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop the thread, after it has finished a running upload."""
        self._stop.set()
        self._thread.join()

    def drop(self) -> None:
        """Delete the checkpoints from the store."""
        if self._sent:
            self._calls.drop_folder(self._root)

    def _restore(self) -> None:
        """Download the newest checkpoint of every folder. A worker that has lost its connection may
        still replace checkpoints meanwhile, so this is repeated.
        """
        for _ in range(_LOOKS):
            if all([self._has(step) or self._take(step) for step in self._newest()]):
                return

    def _newest(self) -> list[str]:
        """The checkpoints in the store, the newest one of each folder."""
        names = [
            info.path.removeprefix(f"{self._root}/")
            for info in self._calls.files(self._root, recursive=True)
            if info.size
        ]
        steps = sorted(
            name.removesuffix(f"/{RECORD}")
            for name in names
            if name.endswith(f"/{RECORD}") and member_fault(name) is None
        )
        self._sent = {Path(step).parent.as_posix(): step for step in steps}
        return [step for step in self._sent.values() if Path(step).match(STEPS)]

    def _has(self, step: str) -> bool:
        held = [path.name for path in (self._folder / step).parent.glob(STEPS)]
        return max(held, default="") >= Path(step).name

    def _take(self, step: str) -> bool:
        """Download one checkpoint, if it is intact; False if it has disappeared."""
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
            # Ignore a damaged checkpoint: the stage starts from an earlier one, or from the start.
            return True
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
            except (StoreError, OSError):
                # Training continues; if the store stays unavailable, the stage reports it.
                wait_s = RESTART_S

    def send_new(self) -> None:
        """Upload the newest checkpoint of every folder, if the store lacks it."""
        newest: dict[str, str] = {}
        for path in sorted(self._folder.rglob(STEPS)):
            inner = path.relative_to(self._folder)
            if path.is_dir() and not any(part.startswith(".") for part in inner.parts):
                newest[inner.parent.as_posix()] = inner.as_posix()
        for parent, step in newest.items():
            if self._sent.get(parent) != step:
                with suppress(FileNotFoundError):  # a newer one has just replaced it
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
