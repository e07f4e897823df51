"""Files that survive a power loss, and that all users of a shared folder may use: the one way in
which artifacts, their records, verdicts and step checkpoints come to their place.

A rename alone is not enough: after a crash a file system may have the new name and none of the
bytes. So everything is written aside and synced, then renamed, then the folder that got the new
name is synced.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a filesystem answers where a disk or a quota is used up."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a filesystem answers that cannot sync a file."""
_LOST = (errno.EIO, *FULL)
"""What it answers where a name in a folder may be lost; others refuse to sync folders at all."""
_GROUP_FOLDER = stat.S_ISGID | stat.S_IRWXG
_GROUP_FILE = stat.S_IRGRP | stat.S_IWGRP


def settle(aside: Path, final: Path) -> None:
    """Sync a file or a folder with all that it holds, give it its final name, and sync the folder
    that now holds it; OSError where the name is taken.
    """
    shared = is_shared(final.parent)
    for parent, folders, names in os.walk(aside, topdown=False):
        for name in names:
            _sync(Path(parent, name), shared=shared)
        for name in folders:
            _sync(Path(parent, name), shared=shared)
    _sync(aside, shared=shared)
    aside.rename(final)
    _sync(final.parent, shared=False)


def put_text(path: Path, text: str) -> None:
    """Write a text, so that a reader or a crash finds all of it or what was there before."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_text(text, encoding="utf-8")
        settle(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Below a folder that its group shares (set-group-id and
    group-writable, as `chmod 2775` makes it) it is the group's too, whatever the umask.
    """
    if path.is_dir():
        return
    if path != path.parent:
        make_folder(path.parent)
    with suppress(FileExistsError):  # another process was first; a file is told by the next line
        path.mkdir()
        if is_shared(path.parent):
            os.chmod(path, stat.S_IMODE(path.stat().st_mode) | _GROUP_FOLDER)  # noqa: PTH101
        _sync(path.parent, shared=False)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def is_shared(folder: Path) -> bool:
    """Whether the group of a folder shares it: set-group-id and group-writable."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def plain_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes.

    ValueError for anything else that has the name: a link, a folder, a pipe, which would never
    end, or a file that is larger. OSError where it cannot be read.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise ValueError(f"{path.name} is no plain file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is no plain file")
        if status.st_size > limit:
            raise ValueError(f"{path.name} has {status.st_size} bytes, more than {limit}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(descriptor)


def _sync(path: Path, *, shared: bool) -> None:
    """Have a plain file or a folder on the disk, first given to the group where that shares it."""
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and not stat.S_ISREG(status.st_mode):
        return
    if shared:
        wanted = stat.S_IMODE(status.st_mode) | (_GROUP_FOLDER if is_folder else _GROUP_FILE)
        os.chmod(path, wanted)  # noqa: PTH101
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _LOST if is_folder else error.errno not in _NO_SYNC:
            raise


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is used up."""
    return error.errno in FULL
