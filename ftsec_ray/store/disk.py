"""Room on this machine's disks: folders of this process, which of them are left over, and what to
say when a disk is full.
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
    """A warning of this process, however often there is reason for it."""
    _LOG.warning("warning: %s", text)


@cache
def host_mark() -> str:
    """A short name of this machine without dots."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def own_name(digest: str) -> str:
    """A name that no other process uses, and that tells whose it is."""
    return f"{checked_digest(digest)}.{host_mark()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def own_folder(parent: Path, digest: str) -> Path:
    """A fresh empty folder of this process."""
    path = parent / own_name(digest)
    with room(parent):
        make_folder(parent)
        path.mkdir()
    return path


def drop_dead(parent: Path) -> None:
    """Remove the folders of processes of this machine that are no more."""
    for entry in entries(parent):
        host, pid = (*entry.name.split("."), "", "")[1:3]
        if host == host_mark() and pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(entry.path, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing where there is none."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EnvironmentFault(
            f"a folder of the store cannot be read: {error.strerror or error}",
            str(folder),
            "a folder that this user may read",
            "give another one with --store, or change the owner or the mode of this one",
        ) from error


def is_refused(error: OSError) -> bool:
    """Whether an error says that a place takes no files from this user, however much room it
    has.
    """
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
    """The error for a write that found no room."""
    spot = next((p for p in (place, *place.parents) if p.exists()), Path("/"))
    usage = shutil.disk_usage(spot)
    return StoreError(
        f"no space left to publish under {place}",
        f"{usage.free} bytes free of {usage.total} ({error.strerror})",
        "room for the artifact",
        "free some space or choose another --store, then run again: "
        "nothing half-written is left, and what is done stays done",
    )


def check_folder(folder: Path, what: str, option: str) -> None:
    """EnvironmentFault unless files can be made in a folder, which is made where it is not there.

    Args:
        folder: The folder.
        what: Its name in the message.
        option: The option that names it.
    """
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        if is_full(error):
            raise disk_full(error, folder) from error
        raise EnvironmentFault(
            f"the {what} folder cannot be written: {error.strerror or error}",
            str(folder),
            "a folder in which this user may make files",
            f"give another one with {option}, or change the owner or the mode of this one",
        ) from error


def check_may_write(path: Path, *, is_stuck: bool = False) -> None:
    """EnvironmentFault where a folder of the store, perhaps another user's, takes no files from
    this one, or where something `is_stuck` in it; what is not there can be made.
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
        "a part of the store cannot be written by this user",
        f"{path} (owner {owner}, mode {stat.S_IMODE(status.st_mode):o})",
        "a store of this user alone, or one that its group shares",
        "give another one with --store; or share this one: its owner runs `chgrp -R GROUP STORE &&"
        " chmod -R g+rwX STORE && find STORE -type d -exec chmod g+s {} +`",
    )


def _may_not_write(error: OSError, place: Path) -> StoreError:
    return StoreError(
        f"the store cannot be written: {error.strerror or error}",
        str(error.filename or place),
        "a place in which this user may make files",
        "look at the owner, the mode and the mount of it, or give another one with --store: what"
        " is done stays done",
    )


@contextmanager
def room(place: Path) -> Iterator[None]:
    """Turns errors of a full disk, and of a place that may not be written, into the StoreError that
    says so.
    """
    try:
        yield
    except shutil.Error as error:  # copytree gathers its errors
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
