"""What a worker process needs besides the units that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftsec_ray.context import Runtime


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What every worker process of a run needs besides its units."""

    store: str
    """URI of the store."""
    runtime: Runtime
    cache_gib: float
    """Base models that it keeps in memory, at most."""
    runner: str
    """Import path of the function that runs one stage."""
    session: str
    """Import path of what makes its session: (store, runtime, cache_gib) -> session."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that it is started with."""

    def to_json(self) -> dict[str, Any]:
        """A mapping that JSON can hold and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> WorkerSpec:
        """The spec that `to_json` gave."""
        return cls(**{**plain, "runtime": Runtime(**plain["runtime"])})
