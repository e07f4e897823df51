"""The calls of a remote store: reads and writes whole objects, and retries transient failures."""

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
    """A `pyarrow.fs` filesystem with clear errors: FileNotFoundError, OSError for a full disk, else
    StoreError.
    """

    def __init__(self, filesystem: FileSystem, uri: str) -> None:
        self._fs = filesystem
        self._uri = uri
        self.has_buckets = filesystem.type_name in OBJECT_STORES
        """Whether it is object storage: no folders, no renames, and atomic writes of objects."""

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
                "a reachable store, and valid credentials in the environment",
                "check the endpoint, the bucket and the credentials, then run again: finished"
                " stages are kept",
            ) from error

    def info(self, key: str) -> FileInfo:
        """Information on a key; its type is NotFound if it does not exist."""
        return self._call("access the store", self._fs.get_file_info, key)

    def files(self, folder: str, *, recursive: bool = False) -> list[FileInfo]:
        """All files of a folder, up to 1000 per request; empty if the folder does not exist."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(folder, recursive=recursive, allow_not_found=True)
        return [
            info
            for info in self._call("list the store", self._fs.get_file_info, selector)
            if info.is_file
        ]

    def send(self, path: Path, key: str) -> None:
        """Upload a file."""
        self._call("upload a file", self._send, path, key)

    def write(self, key: str, text: str) -> None:
        """Write a text atomically."""
        self._call("write to the store", self._write, key, text)

    def read(self, key: str, limit: int) -> bytes:
        """The bytes of an object; ValueError if it has more than `limit`."""
        content = self._call("read from the store", self._read, key, limit + 1)
        if len(content) > limit:
            raise ValueError(f"{key.rsplit('/', 1)[-1]} has more than {limit} bytes")
        return content

    def receive(self, key: str, path: Path) -> None:
        """Download a file."""
        self._call("read from the store", self._receive, key, path)

    def drop_file(self, key: str) -> None:
        """Delete a file; no error if it does not exist."""
        with suppress(FileNotFoundError):
            self._call("delete from the store", self._fs.delete_file, key)

    def drop_folder(self, key: str) -> None:
        """Delete a folder with its content; no error if it does not exist."""
        with suppress(FileNotFoundError):
            self._call("delete from the store", self._fs.delete_dir, key)

    def _sink(self, key: str) -> Any:
        if not self.has_buckets:  # on object storage this would create empty objects
            self._fs.create_dir(key.rsplit("/", 1)[0], recursive=True)
        return self._fs.open_output_stream(key)

    def _send(self, path: Path, key: str) -> None:
        with path.open("rb") as source, self._sink(key) as sink:
            shutil.copyfileobj(source, sink, _CHUNK)

    def _write(self, key: str, text: str) -> None:
        # Without atomic writes, write to a temporary name first.
        aside = key if self.has_buckets else f"{key}.{uuid.uuid4().hex[:8]}"
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
