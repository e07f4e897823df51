"""The cache folder of this machine; a cache that cannot be used is no error."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

NAME = "ftsec_ray"


def cache_folder() -> Path:
    """The folder of this package in XDG_CACHE_HOME or ~/.cache; if that cannot be written, a folder
    of this user in the folder for temporary files.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user without an entry
        home = None
    if home is not None and _may_be_written(home / NAME):
        return home / NAME
    return Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}"


def _may_be_written(folder: Path) -> bool:
    """Whether a folder, or its nearest existing parent, can be written."""
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
