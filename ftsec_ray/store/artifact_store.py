"""The store: artifacts by digest on any filesystem that `pyarrow.fs` can open.

    <root>/artifacts/<first two digits>/<digest>/  the artifact's files, and record.json
    <root>/verdicts/<digest>.json                  why a stage failed, until it succeeds
    <root>/work/<digest>/                          checkpoints, kept if a process is killed
    <root>/staging                                 unfinished artifacts
    <root>/quarantine                              damaged artifacts

An artifact is done when its record exists; the record is written last. On a local disk, the folder
is written to `staging` and then renamed. On object storage, the files are uploaded first, under a
name of the attempt. If two workers publish the same artifact, the later one discards its copy.
Nothing is ever unpickled.

A damaged artifact costs only its own stage: an invalid record is moved to `quarantine` with a
warning, and an unknown file is ignored with a warning. A read-only store can still be read. To
share a store between users, give its root to a common group and set the set-group-id bit
(`chgrp GROUP STORE && chmod 2775 STORE`): all files below it then belong to the group, regardless
of the umask. Otherwise the umask applies, and folders of other users that cannot be written are
reported before any work starts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ftsec_ray.store.record import DamagedArtifact, checked_digest


class Store(ABC):
    """Artifacts, failures and work folders of any number of sweeps."""

    uri: str
    """Path or URI with which `Store.open` opens the same store in another process."""

    @staticmethod
    def open(uri_or_path: str | Path, *, cache: Path | None = None) -> Store:
        """Open the store at a local path or a URI (`s3://bucket/prefix`, `gs://...`); `cache` is
        the folder for downloads from a remote store.
        """
        from ftsec_ray.store.local_store import LocalStore
        from ftsec_ray.store.object_store import RemoteStore

        text = str(uri_or_path)
        scheme = urlparse(text).scheme
        if scheme == "file":
            return LocalStore(Path(urlparse(text).path))
        if len(scheme) > 1:  # a single letter is a drive of Windows
            return RemoteStore.at(text, cache=cache)
        return LocalStore(Path(text).expanduser())

    @abstractmethod
    def done(self) -> set[str]:
        """Digests of all artifacts."""

    @abstractmethod
    def has(self, digest: str) -> bool:
        """Whether an artifact is done."""

    @abstractmethod
    def scratch(self, digest: str) -> Path:
        """A new empty local folder in which an artifact is written before `publish`."""

    @abstractmethod
    def publish(self, digest: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Publish a folder as the artifact of a digest; its record gets the size and checksum of
        every file. The folder is removed.
        """

    @abstractmethod
    def fetch(self, digest: str) -> Path:
        """A local folder with the artifact's files, verified once per process; DamagedArtifact if
        it is missing or changed.
        """

    @abstractmethod
    def record(self, digest: str) -> dict[str, Any]:
        """The record of an artifact; DamagedArtifact if it is missing or invalid."""

    @abstractmethod
    def workdir(self, digest: str) -> Path:
        """A local folder for a stage's checkpoints, which is kept if the process is killed. Two
        processes that run the same stage at once get separate folders.
        """

    @abstractmethod
    def leave_work(self, digest: str) -> None:
        """Release the work folder of an unfinished stage, so that the next attempt can use it."""

    @abstractmethod
    def drop_work(self, digest: str) -> None:
        """Remove the work folder of a stage."""

    @abstractmethod
    def write_verdict(self, digest: str, verdict: Mapping[str, Any]) -> None:
        """Record why a stage failed: error_code, error, attempt, host."""

    @abstractmethod
    def drop_verdict(self, digest: str) -> None:
        """Remove the recorded failure of a stage, if there is one."""

    @abstractmethod
    def failures(self) -> dict[str, dict[str, Any]]:
        """Recorded failures of all stages that have not succeeded since, by digest."""

    def check_writable(self, wanted: Collection[str] = ()) -> None:
        """Raise EnvironmentFault if the store cannot be written, as far as this can be checked
        without a write; `wanted` are the digests of the artifacts to publish.
        """
        return

    def drop_leftovers(self) -> None:
        """Remove unfinished artifacts of processes that have ended."""
        return

    def sound(self, kinds: Mapping[str, str]) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """Digests of all artifacts, and the records of some stages.

        Artifacts with a damaged record, or with the record of another kind of stage, are left out:
        they are moved aside with a warning, and their stages run again.

        Args:
            kinds: Digest of a stage whose record is wanted -> its kind.
        """
        done = self.done()
        wanted = done & kinds.keys()
        records = self.records(wanted)
        for digest, record in list(records.items()):
            if record.get("kind", kinds[digest]) != kinds[digest]:
                fault = f"its record is of stage kind {record['kind']!r:.60}, not {kinds[digest]!r}"
                self.put_aside(digest, fault)
                del records[digest]
        return done - (wanted - records.keys()), records

    @abstractmethod
    def put_aside(self, digest: str, fault: str) -> None:
        """Move a damaged artifact aside, with a warning; in a read-only store, treat it as missing
        in this process.
        """

    def records(self, digests: set[str]) -> dict[str, dict[str, Any]]:
        """Digest -> record, for those of the artifacts that exist."""
        records = {}
        for digest in sorted(digests):
            with suppress(DamagedArtifact):
                records[digest] = self.record(digest)
        return records

    def read_json(self, digest: str, name: str) -> Any:
        """A JSON file of an artifact."""
        return json.loads((self.fetch(digest) / name).read_text(encoding="utf-8"))


def artifact_key(digest: str) -> str:
    """Path of an artifact below the root."""
    return f"artifacts/{checked_digest(digest)[:2]}/{digest}"
