"""A store on object storage, or on another filesystem that `pyarrow.fs` opens. It needs no renames:
the record is uploaded last.

    <root>/artifacts/<first two digits>/<digest>/record.json   one listing gives all artifacts
    <root>/files/<first two digits>/<digest>/<attempt>/<name>  files of the attempt in the record
    <root>/verdicts/<digest>.json, <root>/quarantine/          as in artifact_store.py

Every attempt uploads its files under a name of its own, so the files of two attempts never mix: the
record that is written last names one complete set of files, and `drop_leftovers` later deletes the
other set. Downloads are cached on each machine; checkpoints are uploaded to `work/` while a stage
runs. An interrupted upload can leave invisible parts in the bucket; a lifecycle rule that aborts
incomplete multipart uploads removes them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.durable import is_full
from ftsec_ray.errors import StoreError
from ftsec_ray.identity.cache_folder import cache_folder
from ftsec_ray.store.artifact_store import Store, artifact_key
from ftsec_ray.store.disk import (
    disk_full,
    drop_dead,
    own_folder,
    own_name,
    room,
    warn_once,
)
from ftsec_ray.store.mirror import WorkMirror
from ftsec_ray.store.object_io import ObjectIO
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
    listing_fault,
    record_of,
    verdict_of,
)
from ftsec_ray.store.uri import checked_uri, filesystem_of
from ftsec_ray.store.work_folders import WorkFolders

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

LEFTOVER_AGE_S = 24 * 3600.0
"""Age in seconds from which files that no record names are deleted; an upload may take hours."""
_READERS = 16
"""Number of small objects that are read in parallel."""
_ATTEMPT = re.compile(r"[0-9a-f]{12}")
_Stamp = tuple[datetime, int]
"""Modification time and size of an object."""


class RemoteStore(Store):
    """Artifacts on a `pyarrow.fs` filesystem."""

    def __init__(
        self, filesystem: FileSystem, root: str, *, uri: str, cache: Path | None = None
    ) -> None:
        self._calls = ObjectIO(filesystem, uri)
        self._root = root.rstrip("/")
        self.uri = checked_uri(uri)
        self.cache = (
            cache or cache_folder() / "artifacts" / hashlib.sha256(uri.encode()).hexdigest()[:16]
        )
        self._verified: dict[str, Path] = {}
        self._damaged: set[str] = set()
        """Digests of damaged artifacts that cannot be moved; they count as missing."""
        self._stamps: dict[str, _Stamp] = {}
        """Digest -> stamp of the record in the last listing."""
        self._held: dict[str, tuple[_Stamp, dict[str, Any]]] = {}
        self._work = WorkFolders(self.cache / "work")
        self._mirrors: dict[str, WorkMirror] = {}

    @classmethod
    def at(cls, uri: str, *, cache: Path | None = None) -> RemoteStore:
        """Open the store at a URI; StoreError if the URI is not supported or contains a secret."""
        filesystem, root = filesystem_of(uri)
        return cls(filesystem, root, uri=uri, cache=cache)

    def _key(self, digest: str) -> str:
        return f"{self._root}/{artifact_key(digest)}/{RECORD}"

    def _files(self, digest: str, attempt: str) -> str:
        return f"{self._root}/files/{checked_digest(digest)[:2]}/{digest}/{attempt}"

    # What is done.

    def done(self) -> set[str]:
        """Digests of all artifacts, by one listing of their records."""
        digests: set[str] = set()
        stamps = {}
        for info in self._calls.files(f"{self._root}/artifacts", recursive=True):
            prefix, digest, name = ("", "", *info.path.rsplit("/", 3)[-3:])[-3:]
            if not is_digest(digest) or digest[:2] != prefix or name != RECORD:
                warn_once(
                    "the store contains something that is not an artifact:"
                    f" {info.path!r}; it is ignored; remove it"
                )
            elif info.size and digest not in self._damaged:
                digests.add(digest)
                if info.mtime is not None:
                    stamps[digest] = (info.mtime, info.size)
        self._stamps = stamps
        if not digests:
            self._check_bucket()
        return digests

    def _check_bucket(self) -> None:
        """Raise StoreError if the bucket does not exist. Its listing is empty then, and every
        upload would fail only after the work.
        """
        bucket = self._root.split("/", 1)[0]
        if self._calls.has_buckets and self._calls.info(bucket).type.name == "NotFound":
            raise StoreError(
                "no such bucket",
                self.uri,
                "an existing bucket",
                f"create the bucket {bucket!r}, or correct the URI",
            )

    def has(self, digest: str) -> bool:
        """Whether an artifact is done; an empty record comes from an interrupted write."""
        if digest in self._damaged:
            return False
        info = self._calls.info(self._key(digest))
        return bool(info.is_file and info.size)

    def record(self, digest: str) -> dict[str, Any]:
        """The record of an artifact."""
        if digest in self._damaged:
            raise damaged(digest, "it does not match its record")
        try:
            text = self._calls.read(self._key(digest), RECORD_LIMIT)
            if not text:
                raise damaged(digest, "its record is empty")
            record = record_of(text, digest)
            if not _ATTEMPT.fullmatch(str(record.get("payload"))):
                raise ValueError("its record is not the record of an artifact")
        except FileNotFoundError:
            raise damaged(digest, "it is not in the store") from None
        except ValueError as error:
            self.put_aside(digest, str(error))
            raise damaged(digest, str(error)) from None
        return record

    def records(self, digests: set[str]) -> dict[str, dict[str, Any]]:
        """Digest -> record, for those of the artifacts that exist; read in parallel, and cached
        until `done` lists a changed record.
        """

        def read(digest: str) -> dict[str, Any] | None:
            stamp = self._stamps.get(digest)
            known, held = self._held.get(digest, (None, {}))
            if known is not None and known == stamp:
                return dict(held)
            try:
                record = self.record(digest)
            except DamagedArtifact:
                return None
            if stamp is not None:
                self._held[digest] = (stamp, record)
            return dict(record)

        return self._each(read, sorted(digests))

    @staticmethod
    def _each(
        read: Callable[[str], dict[str, Any] | None], keys: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        keys = list(keys)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="ftsec-store") as pool:
            return {
                key: plain
                for key, plain in zip(keys, pool.map(read, keys), strict=True)
                if plain is not None
            }

    # Publishing.

    def scratch(self, digest: str) -> Path:
        """A new empty folder next to the cache."""
        return own_folder(self.cache / "staging", digest)

    def publish(self, digest: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Upload the files, then the record; if the artifact already exists, discard the folder."""
        attempt = uuid.uuid4().hex[:12]
        self._held.pop(digest, None)
        try:
            if self.has(digest):
                return
            files = files_of(folder)
            for name in files:
                self._calls.send(folder / name, f"{self._files(digest, attempt)}/{name}")
            if self.has(digest):
                self._calls.drop_folder(self._files(digest, attempt))
                return
            self._calls.write(
                self._key(digest),
                dumped({**record, "digest": digest, "files": files, "payload": attempt}),
            )
        except OSError as error:
            if is_full(error):
                raise disk_full(error, self.cache) from error
            raise StoreError(
                f"cannot publish artifact {digest}: {error}",
                self.uri,
                "a readable folder, and a store that can be written",
                "check the store and its credentials, then run again",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # Fetching.

    def fetch(self, digest: str) -> Path:
        """A copy in the cache, verified once per process; a damaged copy is downloaded again."""
        held = self._verified.get(checked_digest(digest))
        if held is not None and held.is_dir():
            return held
        record = self.record(digest)
        fault = self._fetched(digest, record)
        if fault is not None:
            newer = self.record(digest)  # another worker may have published it again
            fault = self._fetched(digest, newer) if newer["payload"] != record["payload"] else fault
        if fault is not None:
            self.put_aside(digest, fault)
            raise damaged(digest, fault)
        return self._verified[digest]

    def _fetched(self, digest: str, record: Mapping[str, Any]) -> str | None:
        """Download the files of a record into the cache; returns what is wrong with the files in
        the store, or None.
        """
        fault = listing_fault(record)
        if fault is not None:
            return fault
        final = self.cache / artifact_key(digest) / record["payload"]
        if not final.is_dir() or fault_of(final, record) is not None:
            aside = self.cache / "staging" / own_name(digest)
            try:
                with room(self.cache):
                    fault = self._copy_down(digest, record, aside) or fault_of(aside, record)
                    if fault is not None:
                        return fault
                    self._take_place(aside, final, record)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        self._verified[digest] = final
        return None

    def _take_place(self, aside: Path, final: Path, record: Mapping[str, Any]) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                aside.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
                if fault_of(final, record) is None:
                    return  # another process of this machine was first
                with suppress(FileNotFoundError):
                    # Renamed, not deleted: another process may be reading it.
                    final.rename(self.cache / "staging" / own_name(final.parent.name))
            else:
                return

    def _copy_down(self, digest: str, record: Mapping[str, Any], folder: Path) -> str | None:
        folder.mkdir(parents=True)
        for name in record["files"]:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._calls.receive(f"{self._files(digest, record['payload'])}/{name}", path)
            except FileNotFoundError:
                return f"{name} is missing"
        return None

    def put_aside(self, digest: str, fault: str) -> None:
        """Move the record to `quarantine/`, so that the artifact counts as missing; its files are
        kept for an inspection.
        """
        self._verified.pop(digest, None)
        self._held.pop(digest, None)
        key, aside = self._key(digest), f"{self._root}/quarantine/{digest}.{uuid.uuid4().hex[:8]}"
        try:
            with suppress(FileNotFoundError, ValueError):  # already moved, or too large
                text = self._calls.read(key, RECORD_LIMIT).decode(errors="replace")
                self._calls.write(f"{aside}.json", text)
            self._calls.drop_file(key)
        except (StoreError, OSError) as error:
            self._damaged.add(digest)
            why = error.what if isinstance(error, StoreError) else error
            warn_once(
                f"an artifact counts as missing: {key!r}: {fault}; its record cannot be moved"
                f" ({why}), so its stage cannot run again in this store until it is removed"
            )
        else:
            warn_once(
                f"a damaged artifact was moved aside, and its stage runs again: {key!r}: {fault};"
                f" its record is now in {f'{aside}.json'!r}, which you may delete"
            )

    # Work folders and leftovers.

    def workdir(self, digest: str) -> Path:
        """The folder of a stage's checkpoints, with the newest checkpoint of the store."""
        path = self._work.take(digest)
        if self._work.is_shared(digest) and not (
            digest in self._mirrors and self._mirrors[digest].is_on
        ):
            self._mirrors[digest] = WorkMirror(path, self._calls, f"{self._root}/work/{digest}")
            self._mirrors[digest].start()
        return path

    def leave_work(self, digest: str) -> None:
        """Release the work folder of an unfinished stage, so that the next attempt can use it, on
        any machine.
        """
        if digest in self._mirrors:
            self._mirrors[digest].stop()
        self._work.leave(digest)

    def drop_work(self, digest: str) -> None:
        """Remove the work folder of a stage."""
        mirror = self._mirrors.pop(digest, None)
        if mirror is not None:
            mirror.stop()
            mirror.drop()
        self._work.drop(digest)

    def drop_leftovers(self) -> None:
        """Remove leftovers of ended processes of this machine from the cache, and old files without
        a record from the store.
        """
        drop_dead(self.cache / "staging")
        self._work.drop_leftovers()
        newest: dict[tuple[str, str], datetime] = {}
        for info in self._calls.files(f"{self._root}/files", recursive=True):
            digest, attempt = (*info.path.removeprefix(f"{self._root}/files/").split("/"), "", "")[
                1:3
            ]
            if is_digest(digest) and _ATTEMPT.fullmatch(attempt) and info.mtime is not None:
                newest[digest, attempt] = max(info.mtime, newest.get((digest, attempt), info.mtime))
        done, limit = (
            self.done() if newest else set(),
            datetime.now(UTC) - timedelta(seconds=LEFTOVER_AGE_S),
        )
        attempts = Counter(digest for digest, _ in newest)
        unsure = {digest for digest, count in attempts.items() if count > 1 and digest in done}
        named = {digest: record["payload"] for digest, record in self.records(unsure).items()}
        for (digest, attempt), mtime in newest.items():
            if mtime < limit and (digest not in done or named.get(digest, attempt) != attempt):
                self._calls.drop_folder(self._files(digest, attempt))

    # Verdicts.

    def _verdict(self, digest: str) -> str:
        return f"{self._root}/verdicts/{checked_digest(digest)}.json"

    def write_verdict(self, digest: str, verdict: Mapping[str, Any]) -> None:
        """Record why a stage failed."""
        self._calls.write(self._verdict(digest), dumped(verdict))

    def drop_verdict(self, digest: str) -> None:
        """Remove the recorded failure of a stage, if there is one."""
        if self._calls.info(self._verdict(digest)).is_file:
            self._calls.drop_file(self._verdict(digest))

    def failures(self) -> dict[str, dict[str, Any]]:
        """Recorded failures of all stages that have not succeeded since, by digest."""
        paths = [
            info.path
            for info in self._calls.files(f"{self._root}/verdicts")
            if info.path.endswith(".json")
        ]
        names = {path.rsplit("/", 1)[-1].removesuffix(".json") for path in paths}
        failed = {name for name in names if is_digest(name)}
        return self._each(self._verdict_or_none, sorted(failed - self.done())) if failed else {}

    def _verdict_or_none(self, digest: str) -> dict[str, Any] | None:
        try:
            return verdict_of(self._calls.read(self._verdict(digest), RECORD_LIMIT))
        except (FileNotFoundError, ValueError):  # the stage has just succeeded, or it is damaged
            return None
