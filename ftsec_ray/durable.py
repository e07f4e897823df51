"""Writes files so that they survive a power loss, and so that all users of a shared folder can use
them: for artifacts, records, recorded failures and checkpoints.

A rename alone is not enough: after a crash, a filesystem may have the new name without the content.
So files are written under a temporary name and synced, then renamed, and then their folder is
synced.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk or an exceeded quota."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a filesystem that cannot sync files."""
_LOST = (errno.EIO, *FULL)
"""Errors of a folder's sync after which a name may be lost; other errors mean that the filesystem
cannot sync folders.
"""
_GROUP_FOLDER = stat.S_ISGID | stat.S_IRWXG
_GROUP_FILE = stat.S_IRGRP | stat.S_IWGRP


def settle(aside: Path, final: Path) -> None:
    """Sync a file or a folder with its content, rename it, and sync its new parent folder; OSError
    if the new name exists.
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
    """Write a text file atomically: readers, also after a crash, see the old or the new content."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_text(text, encoding="utf-8")
        settle(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Create a folder and its parents. In a folder that is shared with its group (set-group-id and
    group-writable, as by `chmod 2775`), new folders are shared too, regardless of the umask.
    """
    if path.is_dir():
        return
    if path != path.parent:
        make_folder(path.parent)
    with suppress(FileExistsError):  # created by another process, or a file: checked below
        path.mkdir()
        if is_shared(path.parent):
            os.chmod(path, stat.S_IMODE(path.stat().st_mode) | _GROUP_FOLDER)  # noqa: PTH101
        _sync(path.parent, shared=False)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def is_shared(folder: Path) -> bool:
    """Whether a folder is shared with its group: set-group-id and group-writable."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def plain_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises ValueError for a larger file, and for anything else: a link, a folder, or a pipe, which
    might never end. Raises OSError if the file cannot be read.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise ValueError(f"{path.name} is not a regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{path.name} has {status.st_size} bytes, more than {limit}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(descriptor)


def _sync(path: Path, *, shared: bool) -> None:
    """Sync a regular file or a folder to disk; if `shared`, first make it group-writable."""
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
    """Whether an error means a full disk or an exceeded quota."""
    return error.errno in FULL
