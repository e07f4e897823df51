"""The session of a worker: the store, the runtime settings, and a cache of models and tasks, kept
between stages.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.context import LoadedModel, Runtime, TaskData
from ftsec_ray.data.rows import CRAFTED, read_table
from ftsec_ray.data.tasks import read_task
from ftsec_ray.models.load import bare, load_model, read_meta
from ftsec_ray.models.precision import as_asked

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.store import Store

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)."""


class Session:
    """Loads inputs of stages by digest, and caches the most recently used ones up to a limit."""

    def __init__(self, store: Store, runtime: Runtime, cache_gib: float) -> None:
        self.store = store
        self.runtime = runtime
        self.cache_gib = cache_gib
        self._limit = int(cache_gib * 2**30)
        self._models: OrderedDict[str, tuple[LoadedModel, int]] = OrderedDict()
        self._tasks: OrderedDict[str, TaskData] = OrderedDict()
        _keep_freed_memory()

    @property
    def _device(self) -> str:
        # DeepSpeed moves each process's shard to its GPU; the whole model may not fit there.
        return "cpu" if self.runtime.worker_group else self.runtime.device

    def model(self, digest: str, *, member: str = "", on_host: bool = False) -> LoadedModel:
        """The model of an artifact; callers share it and must not change it.

        Args:
            digest: Digest of the artifact.
            member: Folder of the model inside the artifact.
            on_host: Whether to keep it in host memory, for callers that move a smaller copy to the
                GPU.
        """
        key = f"{digest}/{member}" + ("@host" if on_host else "")
        if key not in self._models:
            folder = self.store.fetch(digest) / member
            meta = read_meta(folder)
            base, is_packed = meta["base"], meta.get("quantization") is not None
            under = self.model(base, on_host=is_packed) if base else None
            device = "cpu" if on_host else self._device
            self._keep(key, load_model(folder, base=under, device=device))
        self._models.move_to_end(key)
        return self._models[key][0]

    def asked(self, digest: str) -> LoadedModel:
        """The model of an artifact for evaluation, see `models.precision.as_asked`; callers share
        it and must not change it.
        """
        key = f"{digest}/@asked"
        if key not in self._models:
            loaded = self.model(digest)
            ready = as_asked(loaded)
            if ready is loaded:
                return loaded
            self._keep(key, ready)
        self._models.move_to_end(key)
        return self._models[key][0]

    def remember(self, digest: str, loaded: LoadedModel) -> None:
        """Cache a model that a stage has just made, so that the next stage need not load it."""
        if loaded.attention in (None, bare(loaded.model).config._attn_implementation):  # noqa: SLF001
            self._keep(f"{digest}/", loaded)

    def task(self, digest: str) -> TaskData:
        """The rows of a task artifact."""
        if digest not in self._tasks:
            self._tasks[digest] = read_task(self.store.fetch(digest))
            while len(self._tasks) > 4:
                self._tasks.popitem(last=False)
        return self._tasks[digest]

    def rows(self, digest: str) -> pa.Table:
        """The rows that the fine-tune or the next filter gets: a crafted data set, or the `train`
        split of a task.
        """
        file = self.rows_file(digest)
        return read_table(file) if file.name == CRAFTED else self.task(digest).split("train")

    def rows_file(self, digest: str) -> Path:
        """The file with the rows of `rows`."""
        folder = self.store.fetch(digest)
        crafted = folder / CRAFTED
        return crafted if crafted.exists() else folder / "train.parquet"

    def workdir(self, digest: str) -> Path:
        """Work folder of a stage, such as for checkpoints; it is kept if the process is killed."""
        return self.store.workdir(digest)

    def _keep(self, key: str, loaded: LoadedModel) -> None:
        size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        self._models[key] = (loaded, size)
        self._models.move_to_end(key)
        while len(self._models) > 1 and sum(s for _, s in self._models.values()) > self._limit:
            self._models.popitem(last=False)

    def clear(self) -> None:
        """Empty the cache."""
        self._models.clear()
        self._tasks.clear()


def _keep_freed_memory() -> None:
    """Make malloc keep up to 256 MiB of freed memory: the next step needs as much again, and a new
    request to the kernel would be slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 256 * 2**20)
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the maximum of glibc
