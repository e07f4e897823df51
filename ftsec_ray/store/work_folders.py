"""Folders of step checkpoints: the one of a digest belongs to one process at a time.

Two sweeps on one store may run the same stage at once. Whoever comes first holds the folder by a
lock on a file beside it, which the kernel releases when the process dies, so that the next one
continues from its checkpoints. Whoever comes second gets a folder of its own, with a copy of the
newest checkpoints: the first may be a rival that works on, or a worker that has lost its node and
has not noticed yet.
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
"""Names of finished checkpoints, which appear by a rename and go by one."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""A filesystem without locks: its folders are shared as they are."""


class WorkFolders:
    """The work folders below one root."""

    _held: ClassVar[dict[Path, int]] = {}
    """Folder -> descriptor of its lock, of all stores of this process: a lock belongs to a process,
    not to an object.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own: dict[str, Path] = {}

    def take(self, digest: str) -> Path:
        """The folder of a digest, made on first use: the shared one, or one of this process where
        another holds that.
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
        """Whether this process holds the shared folder of a digest, and not one of its own."""
        return self._root / checked_digest(digest) in self._held

    def drop(self, digest: str) -> None:
        """Remove what this process has of a digest, and the shared folder unless another process is
        at work in it.
        """
        folder = self._root / checked_digest(digest)
        if digest in self._own:
            shutil.rmtree(self._own.pop(digest), ignore_errors=True)
        if (folder.exists() or folder in self._held) and self._hold(folder):
            shutil.rmtree(folder, ignore_errors=True)
            self._lock(folder).unlink(
                missing_ok=True
            )  # before the release: whoever waits for this file looks whether it is still there
            os.close(self._held.pop(folder))

    def leave(self, digest: str) -> None:
        """Let another process go on in the shared folder of a digest: the stage failed here, or is
        tried again elsewhere.
        """
        descriptor = self._held.pop(self._root / checked_digest(digest), None)
        if descriptor is not None:
            os.close(descriptor)

    def drop_leftovers(self) -> None:
        """Remove the folders of processes of this machine that are no more; those that hold shared
        checkpoints stay.
        """
        drop_dead(self._root)

    @staticmethod
    def _lock(folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.lock")

    def _hold(self, folder: Path) -> bool:
        """Take the lock of a folder, or have it already; False when another process has it."""
        if folder in self._held:
            return True
        path = self._lock(folder)
        with room(self._root):
            make_folder(path.parent)
            while True:
                try:
                    descriptor = self._open(path)
                except PermissionError:  # another user's, who may be at work
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
                os.close(descriptor)  # its holder removed it between the two calls

    @staticmethod
    def _open(path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        with suppress(PermissionError):  # made by another user, who has seen to it
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
    """Copy the checkpoints of a folder that another process works in; one that goes meanwhile is
    left out.
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
