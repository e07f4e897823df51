"""The store: artifacts by digest on any filesystem that `pyarrow.fs` can open.

    <root>/artifacts/<first two digits>/<digest>/   files of the artifact and record.json, which is
    written last <root>/verdicts/<digest>.json                   why a stage failed, until it
    succeeds <root>/work/<digest>/                           step checkpoints, which survive a kill
    <root>/staging, <root>/quarantine               what is being written, and what did not match
    its record

An artifact is done when its record exists. On a local disk its folder is written aside and renamed;
elsewhere the files go up first, under a name of their own attempt, and the record last. Of two
publishers the later one discards its copy. Nothing is ever unpickled.

What is damaged costs its own stage: a record that is none is put aside with a warning, a stray file
is left out with one. A store that takes no writes is read all the same. Users of one store need one
group and a set-group-id root (`chgrp GROUP STORE && chmod 2775 STORE`): all that is made below it
is then the group's, whatever the umask. Elsewhere the umask holds, and what another user keeps for
themselves is told before any work.
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
    """Artifacts, verdicts and scratch of any number of sweeps."""

    uri: str
    """What `Store.open` takes to open the same store in another process."""

    @staticmethod
    def open(uri_or_path: str | Path, *, cache: Path | None = None) -> Store:
        """The store at a local path or a URI (`s3://bucket/prefix`, `gs://...`); `cache` holds
        downloads of a remote one.
        """
        from ftsec_ray.store.local_store import LocalStore
        from ftsec_ray.store.object_store import RemoteStore

        text = str(uri_or_path)
        scheme = urlparse(text).scheme
        if scheme == "file":
            return LocalStore(Path(urlparse(text).path))
        if len(scheme) > 1:  # a single letter is a drive
            return RemoteStore.at(text, cache=cache)
        return LocalStore(Path(text).expanduser())

    @abstractmethod
    def done(self) -> set[str]:
        """Digests of all artifacts, by one listing."""

    @abstractmethod
    def has(self, digest: str) -> bool:
        """Whether an artifact is done."""

    @abstractmethod
    def scratch(self, digest: str) -> Path:
        """A fresh empty local folder to write an artifact in, from where `publish` takes it."""

    @abstractmethod
    def publish(self, digest: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Make a folder the artifact of a digest, with size and checksum of every file in its
        record; consumes the folder.
        """

    @abstractmethod
    def fetch(self, digest: str) -> Path:
        """A local folder with the artifact's files, checked once per process; DamagedArtifact when
        absent or changed.
        """

    @abstractmethod
    def record(self, digest: str) -> dict[str, Any]:
        """The record of an artifact; DamagedArtifact when there is none."""

    @abstractmethod
    def workdir(self, digest: str) -> Path:
        """A local folder for a stage's step checkpoints, which outlives a kill; of two processes at
        once each has its own.
        """

    @abstractmethod
    def leave_work(self, digest: str) -> None:
        """Leave the work folder of a stage that is not done to whoever tries it next."""

    @abstractmethod
    def drop_work(self, digest: str) -> None:
        """Remove the work folder of a stage."""

    @abstractmethod
    def write_verdict(self, digest: str, verdict: Mapping[str, Any]) -> None:
        """Keep why a stage failed: error_code, error, attempt, host."""

    @abstractmethod
    def drop_verdict(self, digest: str) -> None:
        """Forget why a stage failed."""

    @abstractmethod
    def failures(self) -> dict[str, dict[str, Any]]:
        """Verdicts of all stages that failed and have not succeeded since."""

    def check_writable(self, wanted: Collection[str] = ()) -> None:
        """EnvironmentFault where artifacts, those `wanted` above all, cannot be made; what only a
        write can tell is told then.
        """
        return

    def drop_leftovers(self) -> None:
        """Remove what processes that are no more left half-written; nothing where that cannot be
        told.
        """
        return

    def sound(self, kinds: Mapping[str, str]) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """Digests of all artifacts, and the records of those of some stages. An artifact whose
        record is damaged, or is that of another kind of stage, is in neither: it is put aside with
        a warning, and its stage runs again.

        Args:
            kinds: Digest of a stage -> its kind.
        """
        done = self.done()
        wanted = done & kinds.keys()
        records = self.records(wanted)
        for digest, record in list(records.items()):
            if record.get("kind", kinds[digest]) != kinds[digest]:
                fault = f"its record is of a stage {record['kind']!r:.60}, not {kinds[digest]!r}"
                self.put_aside(digest, fault)
                del records[digest]
        return done - (wanted - records.keys()), records

    @abstractmethod
    def put_aside(self, digest: str, fault: str) -> None:
        """Take a damaged artifact out of the way, with a warning; where the store may only be read
        it counts as absent in this process.
        """

    def records(self, digests: set[str]) -> dict[str, dict[str, Any]]:
        """Records of those of the artifacts that are there."""
        found = {}
        for digest in sorted(digests):
            with suppress(DamagedArtifact):
                found[digest] = self.record(digest)
        return found

    def read_json(self, digest: str, name: str) -> Any:
        """A JSON file of an artifact."""
        return json.loads((self.fetch(digest) / name).read_text(encoding="utf-8"))


def artifact_key(digest: str) -> str:
    """Path of an artifact below the root."""
    return f"artifacts/{checked_digest(digest)[:2]}/{digest}"
