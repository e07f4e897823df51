"""Results at a URI: written on this machine as usual, then uploaded completely.

The local copy stays, so that a run that finds all cells done need not collect them again.
`run.json` is uploaded last, as it is written last in a local folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import urlparse

from ftsec_ray.errors import StoreError
from ftsec_ray.identity.cache_folder import cache_folder
from ftsec_ray.results.write import RUN_FILE
from ftsec_ray.schedule.job_paths import is_uri
from ftsec_ray.store.object_io import ObjectIO
from ftsec_ray.store.uri import filesystem_of


def local_results(results: str | Path) -> Path:
    """The folder on this machine in which the results of all sweeps are written before they are
    uploaded.
    """
    text = str(results)
    if not is_uri(text):
        return Path(urlparse(text).path if text.startswith("file:") else text).expanduser()
    return cache_folder() / "results" / hashlib.sha256(text.encode()).hexdigest()[:16]


def send_results(folder: Path, results: str | Path) -> str:
    """Upload the results of a sweep to a URI and return their URI; StoreError if it does not accept
    them.
    """
    try:
        filesystem, root = filesystem_of(str(results))
        calls = ObjectIO(filesystem, str(results))
        target = f"{root.rstrip('/')}/{folder.name}"
        names = sorted(
            (
                path.relative_to(folder).as_posix()
                for path in folder.rglob("*")
                if path.is_file() and not path.name.startswith(".")
            ),
            key=lambda name: (name == RUN_FILE, name),
        )
        for name in names:
            calls.send(folder / name, f"{target}/{name}")
    except (StoreError, OSError) as error:
        why = error.what if isinstance(error, StoreError) else error
        raise StoreError(
            f"the results cannot be uploaded: {why}",
            str(folder),
            "a writable URI",
            "the results are complete in this folder; `ftsec report` makes them again from the"
            " store",
        ) from error
    parts = urlparse(str(results))
    return parts._replace(path=f"{parts.path.rstrip('/')}/{folder.name}").geturl()
