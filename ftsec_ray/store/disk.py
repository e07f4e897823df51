"""Local disks: temporary folders of this process, leftovers of ended processes, and errors of full
or read-only disks.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pwd
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ftsec_ray.durable import is_full, make_folder
from ftsec_ray.errors import EnvironmentFault, StoreError
from ftsec_ray.store.record import checked_digest

_LOG = logging.getLogger("ftsec_ray.store")


@cache
def warn_once(text: str) -> None:
    """Log a warning, but only once per process."""
    _LOG.warning("warning: %s", text)


@cache
def host_mark() -> str:
    """A short identifier of this machine, without dots."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def own_name(digest: str) -> str:
    """A unique name that contains the machine and the process."""
    return f"{checked_digest(digest)}.{host_mark()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def own_folder(parent: Path, digest: str) -> Path:
    """A new empty folder of this process."""
    path = parent / own_name(digest)
    with room(parent):
        make_folder(parent)
        path.mkdir()
    return path


def drop_dead(parent: Path) -> None:
    """Remove the folders of ended processes of this machine."""
    for entry in entries(parent):
        host, pid = (*entry.name.split("."), "", "")[1:3]
        if host == host_mark() and pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(entry.path, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; empty if it does not exist."""
    try:
        with os.scandir(folder) as listed:
            return list(listed)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EnvironmentFault(
            f"cannot read a folder of the store: {error.strerror or error}",
            str(folder),
            "a folder that this user can read",
            "choose another one with --store, or change the owner or the mode of this one",
        ) from error


def is_refused(error: OSError) -> bool:
    """Whether an error means that this user cannot write to a location, apart from a full disk."""
    return error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOENT,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )


def disk_full(error: OSError, place: Path) -> StoreError:
    """The error for a write to a full disk."""
    existing = next((p for p in (place, *place.parents) if p.exists()), Path("/"))
    usage = shutil.disk_usage(existing)
    return StoreError(
        f"no space left on the disk of {place}",
        f"{usage.free} bytes free of {usage.total} ({error.strerror})",
        "enough free space for the artifact",
        "free some space or choose another --store, then run again: partial files are removed, and"
        " finished stages are kept",
    )


def check_folder(folder: Path, what: str, option: str) -> None:
    """Raise EnvironmentFault if files cannot be created in a folder; creates a missing folder.

    Args:
        folder: The folder.
        what: Its name in the message.
        option: The option that sets it.
    """
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        if is_full(error):
            raise disk_full(error, folder) from error
        raise EnvironmentFault(
            f"cannot write to the {what} folder: {error.strerror or error}",
            str(folder),
            "a folder in which this user can create files",
            f"choose another one with {option}, or change the owner or the mode of this one",
        ) from error


def check_may_write(path: Path, *, is_stuck: bool = False) -> None:
    """Raise EnvironmentFault if this user cannot write to a folder of the store, which may belong
    to another user; a missing folder passes.

    Args:
        path: The folder.
        is_stuck: Whether it is a damaged artifact that could not be moved, which always fails.
    """
    try:
        status = path.lstat() if is_stuck else path.stat()
    except OSError:
        return
    is_open = stat.S_ISDIR(status.st_mode) and os.access(path, os.R_OK | os.W_OK | os.X_OK)
    if is_open and not is_stuck:
        return
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    raise EnvironmentFault(
        "this user cannot write to a part of the store",
        f"{path} (owner {owner}, mode {stat.S_IMODE(status.st_mode):o})",
        "a store of this user, or one that is shared with a group of this user",
        "choose another one with --store; or share it: its owner runs `chgrp -R GROUP STORE &&"
        " chmod -R g+rwX STORE && find STORE -type d -exec chmod g+s {} +`",
    )


def _may_not_write(error: OSError, place: Path) -> StoreError:
    return StoreError(
        f"cannot write to the store: {error.strerror or error}",
        str(error.filename or place),
        "a folder in which this user can create files",
        "check its owner, mode and mount, or choose another one with --store; finished stages are"
        " kept",
    )


@contextmanager
def room(place: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk inside a `with` block into a StoreError."""
    try:
        yield
    except shutil.Error as error:  # copytree collects its errors
        causes = [
            OSError(*cause.args) if isinstance(cause, OSError) else cause
            for *_, cause in error.args[0]
        ]
        full = next((c for c in causes if isinstance(c, OSError) and is_full(c)), None)
        if full is None and not any("No space left" in str(c) for c in causes):
            raise
        raise disk_full(full or OSError(errno.ENOSPC, "No space left on device"), place) from error
    except OSError as error:
        if is_full(error):
            raise disk_full(error, place) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise _may_not_write(error, place) from error
        raise
