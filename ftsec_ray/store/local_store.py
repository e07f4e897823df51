"""A store on a local or shared disk: an artifact appears by one rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftsec_ray.store.artifact_store import Store, artifact_key
from ftsec_ray.store.disk import check_folder, drop_dead, entries, own_folder, room
from ftsec_ray.store.record import (
    RECORD,
    checked_digest,
    damaged,
    dumped,
    fault_of,
    files_of,
    is_digest,
    verdict_of,
)
from ftsec_ray.store.work_folders import WorkFolders


class LocalStore(Store):
    """Artifacts under a folder that every worker can see."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)
        self._verified: set[str] = set()
        self._work = WorkFolders(self.root / "work")

    def _folder(self, digest: str) -> Path:
        return self.root / artifact_key(digest)

    def done(self) -> set[str]:
        """Digests of all artifacts, by one listing."""
        found = set()
        for prefix in entries(self.root / "artifacts"):
            for entry in entries(Path(prefix.path)):
                if os.path.exists(f"{entry.path}/{RECORD}"):  # noqa: PTH110 - ten thousand times, and Path costs more than the call
                    found.add(entry.name)
        return found

    def has(self, digest: str) -> bool:
        """Whether an artifact is done."""
        return (self._folder(digest) / RECORD).is_file()

    def scratch(self, digest: str) -> Path:
        """A fresh empty folder on the filesystem of the store."""
        return own_folder(self.root / "staging", digest)

    def publish(self, digest: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Move a folder to its place with its record inside; a copy that comes second is
        discarded.
        """
        final = self._folder(digest)
        staged = folder
        try:
            with room(self.root):
                if folder.parent != self.root / "staging":
                    staged = self.scratch(digest)
                    shutil.copytree(folder, staged, dirs_exist_ok=True)
                (staged / RECORD).write_text(
                    dumped({**record, "digest": digest, "files": files_of(staged)}),
                    encoding="utf-8",
                )
                final.parent.mkdir(parents=True, exist_ok=True)
                self._take_place(staged, final)
        finally:  # after a rename there is nothing left to remove
            shutil.rmtree(staged, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _take_place(self, staged: Path, final: Path) -> None:
        for _ in range(2):
            try:
                staged.rename(final)
            except OSError:
                if not final.exists():
                    raise
                if (final / RECORD).is_file():
                    return
                self._quarantine(
                    final
                )  # a folder without a record is no artifact and must not block one
            else:
                return

    def fetch(self, digest: str) -> Path:
        """The artifact's own folder, checked once per process."""
        folder = self._folder(digest)
        if digest in self._verified and folder.is_dir():
            return folder
        fault = fault_of(folder, self.record(digest))
        if fault is not None:
            self._quarantine(folder)
            raise damaged(digest, fault)
        self._verified.add(digest)
        return folder

    def record(self, digest: str) -> dict[str, Any]:
        """The record of an artifact."""
        folder = self._folder(digest)
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise damaged(digest, "it is not in the store") from None
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("digest") != digest:
            self._quarantine(folder)
            raise damaged(digest, "its record is not that of an artifact")
        return found

    def _quarantine(self, folder: Path) -> None:
        aside = self.root / "quarantine" / f"{folder.name}.{uuid.uuid4().hex[:8]}"
        self._verified.discard(folder.name)
        with suppress(OSError):  # another worker was first, or this store may only be read
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)

    def check_writable(self) -> None:
        """EnvironmentFault unless files can be made under the root."""
        check_folder(self.root, "store", "--store")

    def drop_leftovers(self) -> None:
        """Remove what processes of this machine that are no more were writing."""
        drop_dead(self.root / "staging")
        self._work.drop_leftovers()

    def workdir(self, digest: str) -> Path:
        """Folder of a stage's step checkpoints, made on first use."""
        return self._work.take(digest)

    def leave_work(self, digest: str) -> None:
        """Leave the work folder of a stage that is not done to whoever tries it next."""
        self._work.leave(digest)

    def drop_work(self, digest: str) -> None:
        """Remove the work folder of a stage."""
        self._work.drop(digest)

    def _verdict(self, digest: str) -> Path:
        return self.root / "verdicts" / f"{checked_digest(digest)}.json"

    def write_verdict(self, digest: str, verdict: Mapping[str, Any]) -> None:
        """Keep why a stage failed."""
        path = self._verdict(digest)
        with room(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
            aside.write_text(dumped(verdict), encoding="utf-8")
            aside.rename(path)

    def drop_verdict(self, digest: str) -> None:
        """Forget why a stage failed."""
        self._verdict(digest).unlink(missing_ok=True)

    def failures(self) -> dict[str, dict[str, Any]]:
        """Verdicts of all stages that failed and have not succeeded since."""
        paths = [
            p
            for p in sorted((self.root / "verdicts").glob("*.json"))
            if is_digest(p.stem) and not self.has(p.stem)
        ]
        found = {p.stem: verdict_of(_text_of(p)) for p in paths}
        return {digest: verdict for digest, verdict in found.items() if verdict is not None}


def _text_of(path: Path) -> str:
    """The text of a file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
