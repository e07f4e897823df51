"""A store on a local or shared disk; an artifact is published by one rename."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ftsec_ray.durable import make_folder, plain_bytes, put_text, settle
from ftsec_ray.errors import EnvironmentFault, StoreError
from ftsec_ray.store.artifact_store import Store, artifact_key
from ftsec_ray.store.disk import (
    check_folder,
    check_may_write,
    drop_dead,
    entries,
    own_folder,
    room,
    warn_once,
)
from ftsec_ray.store.record import (
    RECORD,
    RECORD_LIMIT,
    DamagedArtifact,
    checked_digest,
    damaged,
    dumped,
    fault_of,
    files_of,
    is_digest,
    record_of,
    verdict_of,
)
from ftsec_ray.store.work_folders import WorkFolders


class LocalStore(Store):
    """Artifacts under a folder that every worker can see."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)
        self._verified: set[str] = set()
        self._damaged: set[str] = set()
        """Digests of damaged artifacts that cannot be moved; they count as missing."""
        self._work = WorkFolders(self.root / "work")

    def _folder(self, digest: str) -> Path:
        return self.root / artifact_key(digest)

    def done(self) -> set[str]:
        """Digests of all artifacts; unknown files and folders are ignored with a warning."""
        digests = set()
        for prefix in entries(self.root / "artifacts"):
            if not prefix.is_dir():
                self._tell_stray(prefix)
                continue
            for entry in self._entries(Path(prefix.path)):
                if not is_digest(entry.name) or entry.name[:2] != prefix.name:
                    self._tell_stray(entry)
                elif entry.name in self._damaged:
                    continue
                elif _is_written(record := f"{entry.path}/{RECORD}"):
                    digests.add(entry.name)
                elif os.path.lexists(record):
                    warn_once(
                        f"the record of an artifact is empty or not a regular file: {record!r}; its"
                        " stage runs again if it is needed"
                    )
        return digests

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """The entries of a folder; empty, with a warning, if this user cannot read it."""
        try:
            return entries(folder)
        except EnvironmentFault as fault:
            warn_once(f"{fault.what}: {str(folder)!r}; its artifacts count as missing; {fault.fix}")
            return []

    def _tell_stray(self, entry: os.DirEntry[str]) -> None:
        if not entry.name.startswith("."):
            warn_once(
                f"the store contains something that is not an artifact: {entry.path!r}; it is"
                " ignored; move it elsewhere"
            )

    def has(self, digest: str) -> bool:
        """Whether an artifact is done."""
        return digest not in self._damaged and _is_written(str(self._folder(digest) / RECORD))

    def scratch(self, digest: str) -> Path:
        """A new empty folder on the filesystem of the store."""
        return own_folder(self.root / "staging", digest)

    def publish(self, digest: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Write the record into the folder and rename the folder to its final path; if the artifact
        already exists, discard the folder.
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
                make_folder(final.parent)
                self._take_place(staged, final)
        finally:  # has no effect after a successful rename
            shutil.rmtree(staged, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _take_place(self, staged: Path, final: Path) -> None:
        for _ in range(2):
            try:
                settle(staged, final)
            except OSError:
                if not os.path.lexists(final):
                    raise
                if self._record_fault(final.name) is None:
                    return
                # A folder without a valid record must not block the artifact.
                self.put_aside(final.name, "it is at the path of an artifact, without a record")
            else:
                self._damaged.discard(final.name)
                return
        raise StoreError(
            "a damaged artifact blocks this path and cannot be moved",
            str(final),
            "a store in which this user can move files",
            "ask its owner to remove it, or choose another store with --store",
        )

    def fetch(self, digest: str) -> Path:
        """The artifact's folder, verified once per process."""
        folder = self._folder(digest)
        if digest in self._verified and folder.is_dir():
            return folder
        record = self.record(digest)
        try:
            fault = "it is a link" if folder.is_symlink() else fault_of(folder, record)
        except OSError as error:
            raise self._unreadable(digest, "it cannot be read", error) from error
        if fault is not None:
            self.put_aside(digest, fault)
            raise damaged(digest, fault)
        self._verified.add(digest)
        return folder

    def record(self, digest: str) -> dict[str, Any]:
        """The record of an artifact."""
        if digest in self._damaged:
            raise damaged(digest, "it does not match its record")
        try:
            return self._held_record(digest)
        except (FileNotFoundError, NotADirectoryError):
            raise damaged(digest, "it is not in the store") from None
        except ValueError as error:
            self.put_aside(digest, str(error))
            raise damaged(digest, str(error)) from None
        except OSError as error:
            raise self._unreadable(digest, "its record cannot be read", error) from error

    def _unreadable(self, digest: str, what: str, error: OSError) -> DamagedArtifact:
        """The error for an artifact that cannot be read, but may be intact: it belongs to another
        user, or the disk is temporarily unavailable.
        """
        fault = f"{what}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM):
            self._count_as_absent(digest, fault)
        else:
            warn_once(f"cannot read an artifact, kept: {str(self._folder(digest))!r}: {fault}")
        return damaged(digest, fault)

    def _held_record(self, digest: str) -> dict[str, Any]:
        return record_of(plain_bytes(self._folder(digest) / RECORD, RECORD_LIMIT), digest)

    def _record_fault(self, digest: str) -> str | None:
        try:
            self._held_record(digest)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def put_aside(self, digest: str, fault: str) -> None:
        """Move a damaged artifact to `quarantine/`."""
        folder = self._folder(digest)
        aside = self.root / "quarantine" / f"{digest}.{uuid.uuid4().hex[:8]}"
        self._verified.discard(digest)
        try:
            make_folder(aside.parent)
            folder.rename(aside)
        except OSError:
            if os.path.lexists(folder):  # else another worker was first
                self._count_as_absent(digest, fault)
        else:
            warn_once(
                f"a damaged artifact was moved aside, and its stage runs again: {str(folder)!r}:"
                f" {fault}; it is now in {str(aside)!r}, which you may delete"
            )

    def _count_as_absent(self, digest: str, fault: str) -> None:
        self._damaged.add(digest)
        self._verified.discard(digest)
        warn_once(
            f"an artifact counts as missing: {str(self._folder(digest))!r}: {fault}; this user"
            " cannot move it, so its stage cannot run again in this store until its owner removes"
            " it or changes its mode"
        )

    def check_writable(self, wanted: Collection[str] = ()) -> None:
        """Raise EnvironmentFault if files cannot be created in the root and its folders."""
        check_folder(self.root, "store", "--store")
        inner = [self.root / name for name in ("artifacts", "staging", "work", "verdicts")]
        prefixes = [Path(entry.path) for entry in entries(inner[0]) if len(entry.name) == 2]
        for folder in [*inner, *prefixes]:
            check_may_write(folder)
        for digest in sorted(self._damaged.intersection(wanted)):
            check_may_write(self._folder(digest), is_stuck=True)

    def drop_leftovers(self) -> None:
        """Remove unfinished artifacts of ended processes of this machine."""
        drop_dead(self.root / "staging")
        self._work.drop_leftovers()

    def workdir(self, digest: str) -> Path:
        """The folder of a stage's checkpoints, created on first use."""
        return self._work.take(digest)

    def leave_work(self, digest: str) -> None:
        """Release the work folder of an unfinished stage, so that the next attempt can use it."""
        self._work.leave(digest)

    def drop_work(self, digest: str) -> None:
        """Remove the work folder of a stage."""
        self._work.drop(digest)

    def _verdict(self, digest: str) -> Path:
        return self.root / "verdicts" / f"{checked_digest(digest)}.json"

    def write_verdict(self, digest: str, verdict: Mapping[str, Any]) -> None:
        """Record why a stage failed."""
        path = self._verdict(digest)
        with room(self.root):
            make_folder(path.parent)
            put_text(path, dumped(verdict))

    def drop_verdict(self, digest: str) -> None:
        """Remove the recorded failure of a stage, if there is one."""
        with room(self.root):
            self._verdict(digest).unlink(missing_ok=True)

    def failures(self) -> dict[str, dict[str, Any]]:
        """Recorded failures of all stages that have not succeeded since, by digest."""
        paths = [
            p
            for p in sorted((self.root / "verdicts").glob("*.json"))
            if is_digest(p.stem) and not self.has(p.stem)
        ]
        verdicts = {p.stem: verdict_of(_text_of(p)) for p in paths}
        return {digest: verdict for digest, verdict in verdicts.items() if verdict is not None}


def _text_of(path: Path) -> bytes:
    """The bytes of a recorded failure; empty if it cannot be read."""
    try:
        return plain_bytes(path, RECORD_LIMIT)
    except (OSError, ValueError):
        return b""


def _is_written(path: str) -> bool:
    """Whether a path is a regular file that is not empty. It takes a str, because this runs for
    every artifact and `Path` would be slower.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
