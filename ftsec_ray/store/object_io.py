"""The calls that a remote store makes: whole objects in and out, each call retried when it fails
transiently.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ftsec_ray.durable import is_full
from ftsec_ray.errors import StoreError
from ftsec_ray.store.retry import retried
from ftsec_ray.store.uri import OBJECT_STORES

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

P = ParamSpec("P")
R = TypeVar("R")
_CHUNK = 8 * 2**20


class ObjectIO:
    """A filesystem whose errors are worth reading: FileNotFoundError, an OSError for a full disk,
    else StoreError.
    """

    def __init__(self, filesystem: FileSystem, uri: str) -> None:
        self._fs = filesystem
        self._uri = uri
        self.has_buckets = filesystem.type_name in OBJECT_STORES
        """Whether there are no folders and no renames, and an object appears whole or not at all.
        """

    def _call(self, what: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return retried(call, *args, **kwargs)
        except FileNotFoundError:
            raise
        except OSError as error:
            if is_full(error):
                raise
            raise StoreError(
                f"cannot {what}: {error}",
                self._uri,
                "a store that answers and that the credentials of the environment open",
                "check the endpoint, the bucket and the credentials, then run again: what is done"
                " stays done",
            ) from error

    def info(self, key: str) -> FileInfo:
        """What is known of a key; its type says when there is nothing."""
        return self._call("look into the store", self._fs.get_file_info, key)

    def files(self, folder: str, *, recursive: bool = False) -> list[FileInfo]:
        """All files of a folder, a thousand per request; none when there is no such folder."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(folder, recursive=recursive, allow_not_found=True)
        return [
            info
            for info in self._call("list the store", self._fs.get_file_info, selector)
            if info.is_file
        ]

    def send(self, path: Path, key: str) -> None:
        """Send a file."""
        self._call("send a file", self._send, path, key)

    def write(self, key: str, text: str) -> None:
        """Write a text, so that a reader sees all of it or nothing."""
        self._call("write to the store", self._write, key, text)

    def read(self, key: str, limit: int) -> bytes:
        """The bytes of an object; ValueError where it has more than `limit`."""
        found = self._call("read from the store", self._read, key, limit + 1)
        if len(found) > limit:
            raise ValueError(f"{key.rsplit('/', 1)[-1]} has more than {limit} bytes")
        return found

    def receive(self, key: str, path: Path) -> None:
        """Fetch a file."""
        self._call("read from the store", self._receive, key, path)

    def drop_file(self, key: str) -> None:
        """Delete a file; nothing when another worker was first."""
        with suppress(FileNotFoundError):
            self._call("delete from the store", self._fs.delete_file, key)

    def drop_folder(self, key: str) -> None:
        """Delete a folder with all that it holds; nothing when another worker was first."""
        with suppress(FileNotFoundError):
            self._call("delete from the store", self._fs.delete_dir, key)

    def _sink(self, key: str) -> Any:
        if not self.has_buckets:  # an object store would get an empty object for each level
            self._fs.create_dir(key.rsplit("/", 1)[0], recursive=True)
        return self._fs.open_output_stream(key)

    def _send(self, path: Path, key: str) -> None:
        with path.open("rb") as source, self._sink(key) as sink:
            shutil.copyfileobj(source, sink, _CHUNK)

    def _write(self, key: str, text: str) -> None:
        aside = (
            key if self.has_buckets else f"{key}.{uuid.uuid4().hex[:8]}"
        )  # in a folder a reader could see half of it
        with self._sink(aside) as sink:
            sink.write(text.encode())
        if aside != key:
            self._fs.move(aside, key)

    def _read(self, key: str, count: int) -> bytes:
        with self._fs.open_input_stream(key, compression=None) as source:
            return bytes(source.read(count))

    def _receive(self, key: str, path: Path) -> None:
        with self._fs.open_input_stream(key) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
