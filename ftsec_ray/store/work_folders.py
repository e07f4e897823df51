"""Folders of checkpoints; only one process at a time may use the folder of a digest.

Two sweeps with the same store may run the same stage at once. The first process locks a file next
to the folder. The kernel releases the lock when the process dies, and the next process continues
from its checkpoints. A second process gets a folder of its own, with a copy of the newest
checkpoints, because the first one may still be running.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from ftsec_ray.durable import is_shared, make_folder
from ftsec_ray.store.disk import drop_dead, own_folder, room
from ftsec_ray.store.record import checked_digest

STEPS = "step-*"
"""Pattern of the names of finished checkpoints; they appear and disappear by a rename."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a filesystem without locks; its folders are then shared without a lock."""


class WorkFolders:
    """The work folders below one root."""

    _held: ClassVar[dict[Path, int]] = {}
    """Folder -> file descriptor of its lock, for all stores of this process, since a lock belongs
    to the process.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own: dict[str, Path] = {}

    def take(self, digest: str) -> Path:
        """The folder of a digest, created on first use: the shared one, or a separate one if
        another process uses the shared one.
        """
        folder = self._root / checked_digest(digest)
        if self._hold(folder):
            with room(self._root):
                make_folder(folder)
            return folder
        if digest not in self._own:
            self._own[digest] = own_folder(self._root, digest)
            copy_steps(folder, self._own[digest])
        return self._own[digest]

    def is_shared(self, digest: str) -> bool:
        """Whether this process holds the shared folder of a digest."""
        return self._root / checked_digest(digest) in self._held

    def drop(self, digest: str) -> None:
        """Remove this process's folder of a digest, and the shared one unless another process uses
        it.
        """
        folder = self._root / checked_digest(digest)
        if digest in self._own:
            shutil.rmtree(self._own.pop(digest), ignore_errors=True)
        if (folder.exists() or folder in self._held) and self._hold(folder):
            shutil.rmtree(folder, ignore_errors=True)
            # Removed before the release; `_hold` checks that its lock file still exists.
            self._lock(folder).unlink(missing_ok=True)
            os.close(self._held.pop(folder))

    def leave(self, digest: str) -> None:
        """Release the shared folder of a digest, so that another process can continue in it."""
        descriptor = self._held.pop(self._root / checked_digest(digest), None)
        if descriptor is not None:
            os.close(descriptor)

    def drop_leftovers(self) -> None:
        """Remove separate folders of ended processes of this machine; keep shared ones."""
        drop_dead(self._root)

    @staticmethod
    def _lock(folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.lock")

    def _hold(self, folder: Path) -> bool:
        """Lock a folder, unless this process already holds it; False if another process does."""
        if folder in self._held:
            return True
        path = self._lock(folder)
        with room(self._root):
            make_folder(path.parent)
            while True:
                try:
                    descriptor = self._open(path)
                except PermissionError:  # the lock file of another user, who may be using it
                    return False
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    return False
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        os.close(descriptor)
                        raise
                if self._is_at(path, descriptor):
                    self._held[folder] = descriptor
                    return True
                os.close(descriptor)  # the lock file was removed between open and lock

    @staticmethod
    def _open(path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        with suppress(PermissionError):  # created by another user, who has set the mode
            if is_shared(path.parent):
                os.fchmod(descriptor, 0o664)
        return descriptor

    @staticmethod
    def _is_at(path: Path, descriptor: int) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False


def copy_steps(source: Path, target: Path) -> None:
    """Copy the checkpoints of a folder that another process uses; those that disappear meanwhile
    are skipped.
    """
    for step in sorted(source.rglob(STEPS)):
        inner = step.relative_to(source)
        if any(part.startswith(".") for part in inner.parts):
            continue
        aside = (target / inner).with_name(f".{step.name}.copied")
        try:
            shutil.copytree(step, aside)
            aside.rename(target / inner)
        except (OSError, shutil.Error):
            shutil.rmtree(aside, ignore_errors=True)
