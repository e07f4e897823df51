"""The settings of a worker process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftsec_ray.context import Runtime


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """The settings of every worker process of a run."""

    store: str
    """URI of the store."""
    runtime: Runtime
    cache_gib: float
    """Memory for cached base models, at most, in GiB."""
    runner: str
    """Import path of the function that runs one stage."""
    session: str
    """Import path of the function that makes its session: (store, runtime, cache_gib) -> session.
    """
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables with which it starts."""

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> WorkerSpec:
        """The settings from the values of `to_json`."""
        return cls(**{**plain, "runtime": Runtime(**plain["runtime"])})
