"""Where this machine keeps what it can make again: a help, and never a fault."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

NAME = "ftsec_ray"


def cache_folder() -> Path:
    """The folder of this package below XDG_CACHE_HOME or ~/.cache; where that cannot be written or
    there is no home, one of this user in the folder for temporary files.
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
    """Whether a folder, or the nearest one above it that is there, takes files."""
    spot = folder
    while not os.path.lexists(spot) and spot != spot.parent:
        spot = spot.parent
    return spot.is_dir() and os.access(spot, os.W_OK | os.X_OK)
