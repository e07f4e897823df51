"""The store of artifacts: `Store.open(path_or_uri)`."""

from ftsec_ray.store.artifact_store import Store
from ftsec_ray.store.record import DamagedArtifact

__all__ = ["DamagedArtifact", "Store"]
